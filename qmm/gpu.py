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
from qmm.kernels.staging import BLOCK, COLUMN_TILES, SHARED_NBYTES, WARPS, ZERO_NBYTES, Activations, Tiling, scale_blocks_of
from qmm.loaders.cuda import CudaCallError, attribute, call, current_device, runtime

__all__ = ["GPU"]

ALIGNMENT = 256
BLOCKS = 4
"""Blocks of 16 warps that fill the 64 warps of a multiprocessor."""
import os
RING_NBYTES = int(os.environ.get("QMM_RING", 144 << 10))
FUSE = int(os.environ.get("QMM_FUSE", 1))
PDL = int(os.environ.get("QMM_PDL", 1))
WARPS_ = int(os.environ.get("QMM_WARPS", 16))
UNITS = int(os.environ.get("QMM_UNITS", 1))
LROWS = int(os.environ.get("QMM_LROWS", 2))
ROWW = int(os.environ.get("QMM_ROWW", 0))


class GPU:
    """One device as an engine uses it."""

    def __init__(self, device: int) -> None:
        self.device = device
        with self.errors("preparing the device"), current_device(device):
            self.multiprocessors = attribute("MultiProcessorCount", device)
            self.shared_nbytes = attribute("MaxSharedMemoryPerBlockOptin", device)
            self.programmatic = bool(PDL) and attribute("ComputeCapabilityMajor", device) >= 9
            self.stream = int(call("cudaStreamCreateWithFlags", 1))  # cudaStreamNonBlocking
        self._scratch: dict[int, tuple[int, int]] = {}
        self._lock = threading.RLock()
        self._zeros = self.allocate(ZERO_NBYTES, "zeros")
        call("cudaMemset", self._zeros, 0, ZERO_NBYTES)

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
            call("cudaFree", self._zeros)
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
        columns = next((tile for tile in COLUMN_TILES if tile >= n), COLUMN_TILES[-1])
        activations = Activations(columns, int8)
        scale_blocks = scale_blocks_of(block_format, k)
        area_nbytes = -(-activations.nbytes(scale_blocks) // ALIGNMENT) * ALIGNMENT
        direct = out.dtype == "float32" and out.contiguous
        fused = (
            bool(FUSE)
            and int8
            and n == 1
            and x.dtype == "float32"
            and x.strides[-1] == 4
            and x.address % 16 == 0
            and self._fits(activations.nbytes(scale_blocks))
        )
        groups = 0 if fused else -(-n // columns)
        with self._lock, self.errors(f"the product with {m} x {k} {block_format.name}"), current_device(self.device):
            area, results = self._scratch_for(stream, [groups * area_nbytes, 0 if direct else n * m * 4])
            if not fused:
                self._quantize(block_format, x, k, columns, area, area_nbytes, int8, stream)
            y = out.address if direct else results
            for first in range(0, n, columns):
                source = x.address if fused else area + first // columns * area_nbytes
                count = min(columns, n - first)
                self._product(block_format, weights, m, k, source, activations, fused, count, y + first * m * 4, stream)
            if not direct:
                self._store(results, n, m, out, stream)

    def _fits(self, x_nbytes: int) -> bool:
        """Whether activations have room in shared memory beside a ring."""
        return x_nbytes + (96 << 10) <= self.shared_nbytes

    def _quantize(self, block_format: Format, x: View, k: int, columns: int, area: int, area_nbytes: int, int8: bool, stream: int) -> None:
        blocks = scale_blocks_of(block_format, k)
        for slab in x.slabs():
            launch.quantize_kernel(x.dtype, int8, self.programmatic).launch(
                self.device,
                self._grid(-(-slab.rows * blocks // WARPS)),
                stream,
                slab.address,
                slab.row_stride,
                slab.column_stride,
                k,
                blocks,
                max(1, block_format.block_weights // BLOCK),
                slab.rows,
                slab.first,
                columns,
                area,
                area_nbytes,
                programmatic=self.programmatic,
            )

    def _product(
        self,
        block_format: Format,
        weights: int,
        m: int,
        k: int,
        x: int,
        activations: Activations,
        fused: bool,
        n: int,
        y: int,
        stream: int,
    ) -> None:
        x_nbytes = activations.nbytes(scale_blocks_of(block_format, k))
        x_shared = self._fits(x_nbytes)
        room = self.shared_nbytes - (x_nbytes if x_shared else 0) - (20 << 10)
        row_warps = ROWW or 1
        tiling = Tiling.of(block_format, launch.alignment_of(weights), min(RING_NBYTES, room), row_warps, WARPS_, UNITS, LROWS)
        shared_nbytes = tiling.shared_nbytes(activations.columns) + (x_nbytes if x_shared else 0)
        kernel = launch.matvec_kernel(
            block_format, activations.columns, activations.int8, tiling, x_shared, fused, self.programmatic, self.shared_nbytes
        )
        blocks = block_format.blocks(k)
        kernel.launch(
            self.device,
            min(self.multiprocessors, -(-m // tiling.rows)),
            stream,
            weights,
            block_format.row_nbytes(k),
            m,
            blocks,
            -(-blocks // tiling.chunk_blocks),
            k,
            x,
            self._zeros,
            n,
            y,
            m,
            shared_nbytes=shared_nbytes,
            programmatic=self.programmatic,
        )

    def _store(self, results: int, n: int, m: int, out: View, stream: int) -> None:
        """Copy float32 results to where ``out`` has them."""
        for slab in out.slabs():
            launch.cast_kernel(out.dtype).launch(
                self.device,
                self._grid(-(-slab.rows * m // (WARPS * 32))),
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
        tiling = Tiling.of(block_format, launch.alignment_of(weights), 160 << 10)
        kernel = launch.dequantize_kernel(block_format, tiling, self.programmatic)
        with self._lock, self.errors(f"dequantizing {m} x {k} {block_format.name}"), current_device(self.device):
            kernel.launch(
                self.device,
                min(self.multiprocessors, -(-m // tiling.rows)),
                stream,
                weights,
                block_format.row_nbytes(k),
                m,
                block_format.blocks(k),
                -(-block_format.blocks(k) // tiling.chunk_blocks),
                k,
                out,
                shared_nbytes=kernel.shared_nbytes,
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
                blocks = self._grid(-(-nbytes // (WARPS * 32)))
                launch.read_kernel().launch(self.device, blocks, stream, address, nbytes, area)
            self.copy(read.ctypes.data, area, nbytes, stream)
            self.synchronize(stream)
        finally:
            self.free(area)
        return read.tobytes()

    def _grid(self, wanted: int) -> int:
        """Blocks to launch: those wanted, at most as many as the device holds at once."""
        return max(1, min(wanted, self.multiprocessors * BLOCKS))

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
