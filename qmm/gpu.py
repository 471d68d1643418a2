"""Products and dequantization on one GPU: scratch memory, launches and copies, given addresses.

Nothing here knows of files or models. A :class:`GPU` belongs to one engine and one device; calls put work on the stream
that they are given and return without waiting.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt

from qmm.arrays import View
from qmm.errors import DeviceError
from qmm.kernels import launch
from qmm.kernels.formats import Format
from qmm.kernels.staging import BLOCK, COLUMN_TILES, WARPS
from qmm.loaders.cuda import CudaCallError, attribute, call, current_device, runtime

__all__ = ["GPU"]

ALIGNMENT = 256
SHARED_RESERVED = 1024
"""Shared memory that the driver keeps of each block (sm_80 and later)."""
MOST_BLOCKS = 16
"""Blocks of 4 warps that fill the 64 warps of a multiprocessor."""


class GPU:
    """One device as an engine uses it."""

    def __init__(self, device: int) -> None:
        self.device = device
        with self.errors("preparing the device"), current_device(device):
            self.multiprocessors = attribute("MultiProcessorCount", device)
            self.shared_nbytes = attribute("MaxSharedMemoryPerMultiprocessor", device)
            self.stream = int(call("cudaStreamCreateWithFlags", 1))  # cudaStreamNonBlocking
        self._scratch: dict[int, tuple[int, int]] = {}
        self._lock = threading.RLock()

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turns a failed CUDA call into a DeviceError that says what it was for."""
        try:
            yield
        except (CudaCallError, RuntimeError) as reason:
            raise DeviceError(f"{doing} on CUDA device {self.device}: {reason}") from reason

    # Memory -----------------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, what: str) -> int:
        """Device memory of exactly ``nbytes``.

        Raises:
            DeviceError: there is not enough.
        """
        with self.errors(f"{nbytes} bytes for {what}"), current_device(self.device):
            return int(call("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        """Give memory back, once the device is done with it."""
        with self.errors("freeing memory"), current_device(self.device):
            call("cudaFree", address)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any two addresses, on a stream."""
        with self.errors(f"copying {nbytes} bytes"), current_device(self.device):
            call("cudaMemcpyAsync", target, source, nbytes, 4, stream)  # cudaMemcpyDefault

    def synchronize(self, stream: int) -> None:
        """Wait for a stream; an error of what ran on it shows here."""
        with self.errors("waiting for a stream"), current_device(self.device):
            call("cudaStreamSynchronize", stream)

    def drain(self) -> None:
        """Wait for all work on the device; an error of any of it shows here."""
        with self.errors("waiting for the device"), current_device(self.device):
            call("cudaDeviceSynchronize")

    def close(self) -> None:
        """Free scratch memory and the stream, once the device is done with them."""
        with self.errors("closing"), current_device(self.device):
            for address, _ in self._scratch.values():
                call("cudaFree", address)
            self._scratch.clear()
            call("cudaStreamDestroy", self.stream)

    def _scratch_for(self, stream: int, sizes: list[int]) -> list[int]:
        """Addresses of scratch areas of those sizes. Each stream has its own, which its later work may overwrite."""
        rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        needed = sum(rounded)
        address, held = self._scratch.get(stream, (0, 0))
        if held < needed:
            grown = max(needed, 2 * held)
            fresh = self.allocate(grown, "scratch memory")
            if address:
                self.synchronize(stream)
                self.free(address)
            self._scratch[stream] = (fresh, grown)
            address = fresh
        return [address + offset for offset in np.cumsum([0, *rounded[:-1]]).tolist()]

    # Work -------------------------------------------------------------------------------------------------------------

    def matmul(
        self,
        block_format: Format,
        weights: int,
        m: int,
        k: int,
        x: View,
        out: View,
        int8: bool,
        stream: int,
    ) -> None:
        """``out[..., m] = x[..., k] @ W[m, k]^T`` for arrays on this device.

        Args:
            block_format: of the weight.
            weights: the device's address of its first byte.
            m: rows.
            k: weights a row.
            x: activations, any strides.
            out: results, any strides that keep elements apart.
            int8: whether activations are quantized to int8, else to float16.
            stream: a stream's handle.
        """
        n = math.prod(x.shape[:-1])
        if n == 0 or m == 0:
            return
        blocks = -(-k // BLOCK)
        pitch = blocks * BLOCK
        item = 1 if int8 else 2
        direct = out.dtype == "float32" and out.contiguous
        with self._lock, self.errors(f"the product with {m} x {k} {block_format.name}"), current_device(self.device):
            values, scales, sums, results = self._scratch_for(
                stream, [n * pitch * item, n * blocks * 4, n * blocks * 8, 0 if direct else n * m * 4]
            )
            quantize = launch.quantize_kernel(x.dtype, int8)
            for slab in x.slabs():
                first = slab.first
                quantize.launch(
                    self.device,
                    self._grid(-(-slab.rows * blocks // WARPS), 0),
                    stream,
                    slab.address,
                    slab.row_stride,
                    slab.column_stride,
                    k,
                    blocks,
                    slab.rows,
                    values + first * pitch * item,
                    scales + first * blocks * 4,
                    sums + first * blocks * 8,
                )
            y = out.address if direct else results
            self._products(block_format, weights, m, k, (values, scales, sums, pitch), n, y, int8, stream)
            if not direct:
                self._store(results, n, m, out, stream)

    def _products(
        self,
        block_format: Format,
        weights: int,
        m: int,
        k: int,
        activations: tuple[int, int, int, int],
        n: int,
        y: int,
        int8: bool,
        stream: int,
    ) -> None:
        values, scales, sums, pitch = activations
        alignment = launch.alignment_of(weights)
        row_nbytes = block_format.row_nbytes(k)
        widest = COLUMN_TILES[-1]
        for first in range(0, n, widest):
            count = min(widest, n - first)
            columns = next(tile for tile in COLUMN_TILES if tile >= count)
            kernel = launch.matvec_kernel(block_format, columns, int8, alignment)
            kernel.launch(
                self.device,
                self._grid(-(-m // (WARPS * kernel.rows)), kernel.shared_nbytes),
                stream,
                weights,
                row_nbytes,
                m,
                block_format.blocks(k),
                -(-block_format.blocks(k) // kernel.chunk_blocks),
                k,
                values + first * pitch * (1 if int8 else 2),
                scales + first * pitch // BLOCK * 4,
                sums + first * pitch // BLOCK * 8,
                pitch,
                count,
                y + first * m * 4,
                m,
            )

    def _store(self, results: int, n: int, m: int, out: View, stream: int) -> None:
        """Copy float32 results to where ``out`` has them."""
        for slab in out.slabs():
            launch.cast_kernel(out.dtype).launch(
                self.device,
                self._grid(-(-slab.rows * m // (WARPS * 32)), 0),
                stream,
                results + slab.first * m * 4,
                slab.rows,
                m,
                slab.address,
                slab.row_stride,
                slab.column_stride,
            )

    def dequantize(self, block_format: Format, weights: int, m: int, k: int, out: int, stream: int) -> None:
        """Float32 weights, ``(m, k)`` row-major at ``out``, a multiple of 16 bytes."""
        if m == 0 or k == 0:
            return
        kernel = launch.dequantize_kernel(block_format, launch.alignment_of(weights))
        with self._lock, self.errors(f"dequantizing {m} x {k} {block_format.name}"), current_device(self.device):
            kernel.launch(
                self.device,
                self._grid(-(-m // WARPS), kernel.shared_nbytes),
                stream,
                weights,
                block_format.row_nbytes(k),
                m,
                block_format.blocks(k),
                -(-block_format.blocks(k) // kernel.chunk_blocks),
                k,
                out,
            )

    def matmul_host(
        self, block_format: Format, weights: int, m: int, k: int, x: npt.NDArray[np.float32], int8: bool, stream: int
    ) -> npt.NDArray[np.float32]:
        """The product of activations ``(n, k)`` in host memory; waits for the result ``(n, m)``."""
        n = len(x)
        y = np.empty((n, m), np.float32)
        if not y.size:
            return y
        area = self.allocate(x.nbytes + ALIGNMENT + y.nbytes, "activations and results")
        try:
            result = area + -(-x.nbytes // ALIGNMENT) * ALIGNMENT
            self.copy(area, x.ctypes.data, x.nbytes, stream)
            x_view = View((n, k), (4 * k, 4), "float32", area, self.device)
            y_view = View((n, m), (4 * m, 4), "float32", result, self.device)
            self.matmul(block_format, weights, m, k, x_view, y_view, int8, stream)
            self.copy(y.ctypes.data, result, y.nbytes, stream)
            self.synchronize(stream)
        finally:
            self.free(area)
        return y

    def dequantize_host(
        self, block_format: Format, weights: int, m: int, k: int, stream: int
    ) -> npt.NDArray[np.float32]:
        """The weights ``(m, k)`` as float32 in host memory, by way of the device."""
        out = np.empty((m, k), np.float32)
        if not out.size:
            return out
        area = self.allocate(out.nbytes, "dequantized weights")
        try:
            self.dequantize(block_format, weights, m, k, area, stream)
            self.copy(out.ctypes.data, area, out.nbytes, stream)
            self.synchronize(stream)
        finally:
            self.free(area)
        return out

    def read_bytes(self, address: int, nbytes: int, stream: int) -> bytes:
        """Bytes as a kernel reads them at ``address``; waits for them."""
        area = self.allocate(nbytes, "bytes read")
        try:
            read = np.empty(nbytes, np.uint8)
            with self._lock, self.errors(f"reading {nbytes} bytes"), current_device(self.device):
                blocks = self._grid(-(-nbytes // (WARPS * 32)), 0)
                launch.read_kernel().launch(self.device, blocks, stream, address, nbytes, area)
            self.copy(read.ctypes.data, area, nbytes, stream)
            self.synchronize(stream)
        finally:
            self.free(area)
        return read.tobytes()

    def _grid(self, wanted: int, shared_nbytes: int) -> int:
        """Blocks to launch: those wanted, at most as many as the device holds at once."""
        held = MOST_BLOCKS
        if shared_nbytes:
            held = max(1, min(held, self.shared_nbytes // (shared_nbytes + SHARED_RESERVED)))
        return max(1, min(wanted, self.multiprocessors * held))

    @contextmanager
    def replay(self, work: Callable[[], object], stream: int, batch: int = 1) -> Iterator[Callable[[], None]]:
        """Capture calls of ``work()`` into a CUDA graph, for use inside the ``with`` block.

        Args:
            work: queues launches and copies on ``stream``, with no allocation left to make: call it once before.
            stream: a handle other than 0.
            batch: calls in one replay.

        Yields:
            A function that puts one replay on the stream.
        """
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with current_device(self.device), ExitStack() as made:
            with self.errors("capturing a graph"):
                call("cudaStreamBeginCapture", stream, mode)
                try:
                    for _ in range(batch):
                        work()
                finally:  # a stream left capturing would be of no use to anyone
                    graph = call("cudaStreamEndCapture", stream)
                made.callback(call, "cudaGraphDestroy", graph)
                executable = call("cudaGraphInstantiate", graph, 0)
                made.callback(call, "cudaGraphExecDestroy", executable)
            yield lambda: call("cudaGraphLaunch", executable, stream)

    def time(self, work: Callable[[], object], stream: int, repeats: int, batch: int = 8) -> list[float]:
        """Milliseconds of device time that ``work()`` takes.

        Replays of a graph are timed: what Python does between launches, about 0.1 ms a product, is not in it.

        Args:
            work: as for :meth:`replay`.
            stream: as for :meth:`replay`.
            repeats: replays.
            batch: calls in one replay.

        Returns:
            The time of one call, as the mean of each replay.
        """
        with self.replay(work, stream, batch) as replay, self.errors("timing"), ExitStack() as made:
            start, end = call("cudaEventCreate"), call("cudaEventCreate")
            made.callback(call, "cudaEventDestroy", start)
            made.callback(call, "cudaEventDestroy", end)
            times = []
            for _ in range(repeats + 1):
                call("cudaEventRecord", start, stream)
                replay()
                call("cudaEventRecord", end, stream)
                call("cudaEventSynchronize", end)
                times.append(float(call("cudaEventElapsedTime", start, end)) / batch)
            return times[1:]  # the first replay uploads the graph
