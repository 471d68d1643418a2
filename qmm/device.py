"""Products and dequantization on one GPU: scratch memory, launches and copies, given addresses.

Nothing here knows of files or models. A :class:`GPU` belongs to one engine and one device; calls put work on the stream
that they are given and return without waiting.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import numpy.typing as npt

from qmm.arrays import Slab, View
from qmm.children import process
from qmm.cuda import CudaCallError, advice, attribute, call, current_device, runtime
from qmm.errors import ClosedError, DeviceError
from qmm.kernels.formats import Format
from qmm.kernels.ops.matvec.plan import (
    BLOCK,
    COLUMN_TILES,
    WARPS,
    ZERO_NBYTES,
    Machine,
    Schedule,
    Tiling,
    scale_blocks_of,
)
from qmm.kernels.runtime import launch
from qmm.loaders.closing import Closing

__all__ = ["GPU", "Graph", "Product"]

ALIGNMENT = 256
BLOCKS = 4
"""Blocks of WARPS warps that fill the 64 warps of a multiprocessor."""
PREPARED = 4096
"""The most products that are kept prepared."""
NEXT = slice(13, 17)
"""The arguments of :func:`qmm.kernels.ops.matvec.kernel.matvec` that tell of the next product's weights."""
NEXT_OF_L2 = 6
"""What part of L2 they may take. It should last for the 3 us in which memory would idle: on an H100 8 MB (Q4_K,
14336x4096, n = 1: 12.5 us with 6 or 8 MB, 14.4 with 12; Q8_0, 4096x4096: 7.9 with 8, else 8.8)."""
NOTHING = (0, 0, 0, 0)
Moving = tuple[int, int, int]
"""An argument of a launch by its number, the address that it is (0 x, 1 out, 2 scratch memory) and the offset from
there."""


class Product:
    """One product, prepared: its launches with all their arguments but the addresses of x, out and scratch memory.

    Attributes:
        scratch_nbytes: the scratch memory that it needs.
        near: what lies between these is a distance from x to out at which they share memory, if they must not.
        opening: what another product may bring into L2 before this one starts: the address of the weights, the bytes
            from one row, or several, to the next, how many of them, and how many bytes of each.
        announced: the arguments of the launch that does so for the next product.
        launches: what it takes: see :meth:`add`.
    """

    def __init__(self, scratch_nbytes: int) -> None:
        self.scratch_nbytes = scratch_nbytes
        self.near = (0, 0)
        self.opening = NOTHING
        self.announced: ctypes.Array[ctypes.c_int64] | None = None
        self.launches: list[tuple[launch.Launch, ctypes.Array[ctypes.c_int64], Moving, Moving]] = []

    def add(self, made: launch.Launch, source: Moving, target: Moving) -> None:
        """Add a launch.

        Args:
            made: what to launch.
            source: the argument that says where it reads what depends on a call.
            target: the argument that says where it writes.
        """
        self.launches.append((made, made.arguments, source, target))

    def announce(self, opening: tuple[int, int, int, int]) -> None:
        """Have the launches from now on bring another product's :attr:`opening` into L2."""
        if self.announced is not None:
            self.announced[NEXT] = list(opening)

    def meet(self, x: int, out: int) -> bool:
        """Whether arrays at these addresses share memory that the product reads and writes in no order."""
        least, most = self.near
        return least < out - x < most


class Graph(Closing):
    """A captured sequence of work, which can be launched again and again."""

    def __init__(self, gpu: GPU, graph: object) -> None:
        self._gpu = gpu
        self._ended = False
        with ExitStack() as made:
            made.callback(call, "cudaGraphDestroy", graph)
            self._executable = call("cudaGraphInstantiate", graph, 0)
            made.callback(call, "cudaGraphExecDestroy", self._executable)
            self._made = made.pop_all()

    def launch(self, stream: int) -> None:
        """Put one replay on a stream.

        Raises:
            ClosedError: it was ended.
            DeviceError: CUDA refused.
        """
        self._gpu.put("launching a graph", self._launch, stream)

    def _launch(self, stream: int) -> None:
        if self._ended:
            raise ClosedError("the graph was closed meanwhile, by another thread. Make another one.")
        call("cudaGraphLaunch", self._executable, stream)

    def end(self) -> None:
        """Let it be launched no more."""
        with self._gpu.lock:
            self._ended = True

    def close(self) -> None:
        """Free it, once the device is done with it. Twice is harmless."""
        if self._gpu.forked:
            return
        with self._gpu.errors("freeing a graph"), current_device(self._gpu.device):
            self._made.close()


class GPU(Closing):
    """One device as an engine uses it.

    What it makes there, memory and streams, is freed at the latest when the GPU is closed.

    Attributes:
        lock: held by the thread that puts work on the device.
    """

    def __init__(self, device: int) -> None:
        self.device = device = operator.index(device)
        self._process = process.now
        self._made: dict[tuple[str, int], bool] = {}
        self._scratch: dict[int, tuple[int, int]] = {}
        with self.errors("preparing the device"), current_device(device):
            self.multiprocessors = attribute("MultiProcessorCount", device)
            shared_nbytes = attribute("MaxSharedMemoryPerBlockOptin", device)
            bulk = attribute("ComputeCapabilityMajor", device) >= 9
            self.machine = Machine(self.multiprocessors, shared_nbytes, bulk)
            self.stream = self._make("cudaStreamDestroy", "cudaStreamCreateWithFlags", 1)  # cudaStreamNonBlocking
            self._next_nbytes = attribute("L2CacheSize", device) // NEXT_OF_L2
            self._alone = call("cudaGetDeviceCount") == 1
            self._integrated = bool(attribute("Integrated", device))
        self._thread = threading.local()
        self._products: dict[Hashable, Product] = {}
        self.lock = threading.RLock()
        self._stopped = False
        try:
            self._zeros = self.allocate(ZERO_NBYTES, "zeros")
            with self.errors("preparing the device"), current_device(device):
                call("cudaMemset", self._zeros, 0, ZERO_NBYTES)
                call("cudaDeviceSynchronize")  # other streams than the default one would not wait for it
        except BaseException:
            with suppress(DeviceError):  # the error at hand is the one to show
                self.close()
            raise

    @property
    def forked(self) -> bool:
        """Whether this is a forked child: what CUDA holds is the parent's, and is not to be freed here."""
        return self._process != process.now

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turns a failed CUDA call into a DeviceError that says what it was for."""
        try:
            yield
        except (CudaCallError, RuntimeError) as reason:
            raise self._failed(doing, reason) from reason

    def _failed(self, doing: str, reason: Exception) -> DeviceError:
        hint = advice(reason.number) if isinstance(reason, launch.DriverCallError) else ""
        return DeviceError(f"{doing} on CUDA device {self.device}: {reason}{hint}")

    @contextmanager
    def ready(self, doing: str) -> Iterator[None]:
        """Makes the device current inside the block, and turns a failed call into a DeviceError.

        Where there is one device only, a thread is asked once: that saves 2 us a product.
        """
        try:
            if self._alone:
                if not hasattr(self._thread, "ready"):
                    call("cudaSetDevice", self.device)
                    self._thread.ready = True
                yield
            else:
                with current_device(self.device):
                    yield
        except (CudaCallError, RuntimeError) as reason:
            raise self._failed(doing, reason) from reason

    @contextmanager
    def working(self, doing: str) -> Iterator[None]:
        """The same for putting work on the device, which one thread at a time does, and none after :meth:`stop`.

        Raises:
            ClosedError: it was stopped.
        """
        with self.lock, self.ready(doing):
            self._require_work()
            yield

    def put(self, doing: str, work: Callable[..., object], *arguments: object) -> None:
        """Call ``work``, which puts work on the device, as in a block of :meth:`working`, but 2 us faster."""
        with self.lock:
            self._require_work()
            if not hasattr(self._thread, "ready"):
                with self.ready(doing):
                    work(*arguments)
                return
            try:
                work(*arguments)
            except (CudaCallError, RuntimeError) as reason:
                raise self._failed(doing, reason) from reason

    def _require_work(self) -> None:
        """Raise ClosedError after :meth:`stop`; for the thread that holds the lock."""
        if self._stopped:
            raise ClosedError(f"the engine on CUDA device {self.device} was closed. Make another one.")

    # Memory -----------------------------------------------------------------------------------------------------------

    def _make(self, undo: str, function: str, *arguments: int) -> int:
        """The handle or address that a call makes, which the call ``undo`` frees."""
        made = int(call(function, *arguments))
        self._made[undo, made] = True
        return made

    def _unmake(self, undo: str, made: int) -> None:
        """Free what :meth:`_make` made, unless that was done."""
        if self._made.pop((undo, made), False):
            call(undo, made)

    def allocate(self, nbytes: int, what: str) -> int:
        """Device memory of exactly ``nbytes``, until it is freed, or the GPU closed.

        Raises:
            DeviceError: there is not enough.
        """
        with self.errors(f"{nbytes} bytes for {what}"), current_device(self.device):
            return self._make("cudaFree", "cudaMalloc", operator.index(nbytes))

    def free(self, address: int) -> None:
        """Give memory back, once the device is done with it. Twice is harmless."""
        with self.errors("freeing memory"), current_device(self.device):
            self._unmake("cudaFree", address)

    @contextmanager
    def lent(self, nbytes: int, what: str) -> Iterator[int]:
        """Device memory for the ``with`` block, whose own error is the one to show if giving it back fails too."""
        address = self.allocate(nbytes, what)
        try:
            yield address
        except BaseException:
            with suppress(DeviceError):
                self.free(address)
            raise
        self.free(address)

    @contextmanager
    def fresh_stream(self) -> Iterator[int]:
        """A stream of its own for the ``with`` block, on which no other thread puts work."""
        with self.errors("making a stream"), current_device(self.device):
            stream = self._make("cudaStreamDestroy", "cudaStreamCreateWithFlags", 1)  # cudaStreamNonBlocking
        try:
            yield stream
        finally:
            with suppress(DeviceError), self.errors("freeing a stream"), current_device(self.device):
                self._unmake("cudaStreamDestroy", stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any two addresses, on a stream."""
        with self.errors(f"copying {nbytes} bytes"), current_device(self.device):
            call("cudaMemcpyAsync", *map(operator.index, (target, source, nbytes)), 4, stream)  # cudaMemcpyDefault

    def synchronize(self, stream: int) -> None:
        """Wait for a stream; an error of what ran on it shows here."""
        with self.errors("waiting for a stream"), current_device(self.device):
            call("cudaStreamSynchronize", stream)

    def stop(self) -> None:
        """Take no more work, and wait for what there is on the device; an error of any of it shows here."""
        with self.lock:
            self._stopped = True
        self.drain()

    def drain(self) -> None:
        """Wait for all work on the device; an error of any of it shows here."""
        with self.errors("waiting for the device"), current_device(self.device):
            call("cudaDeviceSynchronize")

    def close(self) -> None:
        """Wait for the device, and free all that is left there. Twice is harmless.

        Raises:
            DeviceError: work that was still queued failed.
        """
        if not self._made or self.forked:
            return
        with self.errors("closing"), current_device(self.device):
            call("cudaDeviceSynchronize")
            self._scratch.clear()
            while self._made:
                (undo, made), _ = self._made.popitem()
                call(undo, made)

    def _scratch_for(self, stream: int, nbytes: int) -> int:
        """The address of scratch memory. Each stream has its own, which its later work may overwrite.

        What becomes too small is kept, since queued work and captured graphs may still use it; each is at least twice
        as large as the one before.
        """
        address, held = self._scratch.get(stream, (0, 0))
        if held < nbytes:
            held = max(nbytes, 2 * held)
            address = self.allocate(held, "scratch memory")
            self._scratch[stream] = (address, held)
        return address

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
        if m and math.prod(x.shape[:-1]):
            product = self.prepare(block_format, weights, m, k, x, out, int8)
            if product.meet(x.address, out.address):
                product = self.prepare(block_format, weights, m, k, x, out, int8, apart=False)
            self.queue(product, x.address, out.address, stream)

    def queue(self, product: Product, x: int, out: int, stream: int, scratch: int = 0) -> None:
        """Put a prepared product on a stream.

        Args:
            product: what :meth:`prepare` made.
            x: the address of the activations, of the same strides and alignment to 16 bytes as then.
            out: the address of the results, likewise.
            stream: a stream's handle.
            scratch: the address of ``product.scratch_nbytes`` bytes; else it is the stream's own scratch memory.
        """
        self.put("a product", self._queue, product, x, out, stream, scratch)

    def _queue(self, product: Product, x: int, out: int, stream: int, scratch: int) -> None:
        if product.scratch_nbytes and not scratch:
            scratch = self._scratch_for(stream, product.scratch_nbytes)
        bases = (x, out, scratch)
        for made, arguments, (source, source_base, source_offset), (target, base, offset) in product.launches:
            arguments[source] = bases[source_base] + source_offset
            arguments[target] = bases[base] + offset
            made.queue(stream)

    def sequence(self, products: Sequence[tuple[Product, int, int]], stream: int, scratch: int) -> None:
        """Put products with their arrays' addresses on a stream, as :meth:`queue` does. While one ends, some of the
        next one's weights is brought into L2."""
        with self.lock:
            for (product, x, out), following in itertools.zip_longest(products, products[1:]):
                product.announce(following[0].opening if following else NOTHING)
                try:
                    self.queue(product, x, out, stream, scratch)
                finally:
                    product.announce(NOTHING)

    def prepare(
        self,
        block_format: Format,
        weights: int,
        m: int,
        k: int,
        x: View,
        out: View,
        int8: bool,
        apart: bool = True,
    ) -> Product:
        """A product of at least one column and row; its kernels are compiled if need be.

        Arguments as for :meth:`matmul`; of the arrays' addresses only the alignment of ``x`` to 16 bytes counts. Where
        ``x`` and ``out`` may share memory (:meth:`Product.meet`), ``apart`` is not set.
        """
        of_x = (x.shape, x.strides, x.dtype, x.address % 16 == 0)
        key = (block_format, weights, m, k, of_x, out.shape, out.strides, out.dtype, int8, apart)
        with self.lock:
            product = self._products.get(key)
            if product is None:
                with self.ready(f"the product with {m} x {k} {block_format.name}"):
                    product = self._prepared(block_format, weights, m, k, x, out, int8, apart)
                if len(self._products) >= PREPARED:
                    self._products.clear()
                self._products[key] = product
            return product

    def _prepared(
        self, block_format: Format, weights: int, m: int, k: int, x: View, out: View, int8: bool, apart: bool
    ) -> Product:
        weights, m, k = map(operator.index, (weights, m, k))
        if k == 0:
            return self._zero_product(m, out)
        n = math.prod(x.shape[:-1])
        slabs = list(x.slabs())
        row_stride = slabs[0].row_stride
        fusible = (
            len(slabs) == 1
            and x.dtype == "float32"
            and slabs[0].column_stride == 4
            and x.address % 16 == 0
            and row_stride % 16 == 0
            and k % 4 == 0
        )
        row_nbytes = block_format.row_nbytes(k)
        alignment = launch.alignment_of(weights | row_nbytes)  # what every row starts at
        widest = min(n, COLUMN_TILES[-1])
        mapped = not self._integrated and self._in_host_memory(weights)
        schedule = Schedule.of(block_format, m, k, widest, int8, alignment, fusible, mapped, self.machine)
        activations = schedule.activations
        columns = activations.columns
        scale_blocks = scale_blocks_of(block_format, k)
        area_nbytes = _rounded(activations.nbytes(scale_blocks))
        areas_nbytes = 0 if schedule.fused else -(-n // columns) * area_nbytes
        direct = apart and out.dtype == "float32" and out.contiguous
        product = Product(areas_nbytes + (0 if direct else n * m * 4))
        if schedule.fused and direct:  # results may be stored before all of x was read
            (x_first, x_end), (out_first, out_end) = x.reach, out.reach
            product.near = x_first - out_end, x_end - out_first
        early = self.machine.bulk
        grid = min(self.multiprocessors, -(-m // schedule.tiling.rows))
        if early and not mapped:  # what is read from host memory passes by L2
            product.opening = weights, *self._opening(row_nbytes, m, grid, schedule.tiling.rows)
        if not schedule.fused:
            kernel = launch.quantize_kernel(x.dtype, int8, early)
            spread = max(1, block_format.block_weights // BLOCK)
            for slab in slabs:
                padded = slab.rows + (-n % columns if slab is slabs[-1] else 0)
                blocks = self._grid(-(-padded * scale_blocks // WARPS))
                of_x = (0, slab.row_stride, slab.column_stride, k, scale_blocks, spread, slab.rows, padded, slab.first)
                of_areas = (columns, activations.sums, 0, area_nbytes)
                made = launch.Launch(kernel, self.device, blocks, (*of_x, *of_areas), 0, early)
                product.add(made, (0, 0, slab.address - x.address), (11, 2, 0))
        kernel = launch.matvec_kernel(block_format, schedule)
        chunks = schedule.tiling.chunks(block_format, k)
        of_weights = (weights, row_nbytes, m, block_format.blocks(k), chunks, k, scale_blocks)
        for first in range(0, n, columns):
            arguments = (*of_weights, 0, row_stride, self._zeros, min(columns, n - first), 0, m, *NOTHING)
            made = launch.Launch(kernel, self.device, grid, arguments, schedule.shared_nbytes(scale_blocks), early)
            source = (7, 0, first * row_stride) if schedule.fused else (7, 2, first // columns * area_nbytes)
            product.add(made, source, (11, 1, first * m * 4) if direct else (11, 2, areas_nbytes + first * m * 4))
            product.announced = made.arguments  # the last one's, if there are several
        if not direct:
            self._add_stores(product, areas_nbytes, n, m, out)
        return product

    def _opening(self, row_nbytes: int, m: int, blocks: int, rows: int) -> tuple[int, int, int]:
        """What ``blocks`` blocks take first of a weight, each so many rows: all of them, and more if there is room, or
        the beginning of each. Whole rows are joined, a piece for each block."""
        rows = min(m, max(blocks * rows, self._next_nbytes // row_nbytes))
        nbytes = min(row_nbytes, self._next_nbytes // rows)
        joined = -(-rows // blocks) if nbytes == row_nbytes else 1
        return joined * row_nbytes, rows // joined, joined * nbytes

    def _in_host_memory(self, address: int) -> bool:
        kinds = runtime().cudaMemoryType
        return bool(call("cudaPointerGetAttributes", address).type == kinds.cudaMemoryTypeHost)

    def _add_stores(self, product: Product, results: int, n: int, m: int, out: View) -> None:
        """Copies of float32 results, at an offset in scratch memory, to where ``out`` has them."""
        for slab in out.slabs():
            made = self._cast(out.dtype, slab, m, 0, 4)
            product.add(made, (0, 2, results + slab.first * m * 4), (4, 1, slab.address - out.address))

    def _zero_product(self, m: int, out: View) -> Product:
        """The product with rows of no weights at all, which is zero everywhere."""
        product = Product(0)
        for slab in out.slabs():
            there = (4, 1, slab.address - out.address)
            product.add(self._cast(out.dtype, slab, m, self._zeros, 0), there, there)
        return product

    def _cast(self, dtype: str, slab: Slab, m: int, source: int, pitch: int) -> launch.Launch:
        """A copy of float32 numbers, ``pitch`` bytes apart, to a slab of ``m`` columns."""
        blocks = self._grid(-(-slab.rows * m // (WARPS * 32)))
        arguments = (source, pitch, slab.rows, m, 0, slab.row_stride, slab.column_stride)
        return launch.Launch(launch.cast_kernel(dtype), self.device, blocks, arguments, 0, early=False)

    def dequantize(self, block_format: Format, weights: int, m: int, k: int, out: int, stream: int) -> None:
        """Float32 weights, ``(m, k)`` row-major at ``out``, a multiple of 16 bytes."""
        weights, m, k, out = map(operator.index, (weights, m, k, out))
        if m == 0 or k == 0:
            return
        row_nbytes = block_format.row_nbytes(k)
        tiling = Tiling.of_dequantization(block_format, launch.alignment_of(weights | row_nbytes), self.machine)
        kernel = launch.dequantize_kernel(block_format, tiling, self.machine.bulk)
        with self.working(f"dequantizing {m} x {k} {block_format.name}"):
            kernel.launch(
                self.device,
                min(self.multiprocessors, -(-m // tiling.rows)),
                stream,
                weights,
                row_nbytes,
                m,
                block_format.blocks(k),
                tiling.chunks(block_format, k),
                k,
                out,
                shared_nbytes=tiling.shared_nbytes(0),
            )

    def matmul_host(
        self, block_format: Format, weights: int, m: int, k: int, x: npt.NDArray[np.float32], int8: bool, stream: int
    ) -> npt.NDArray[np.float32]:
        """The product of activations ``(n, k)`` in host memory; waits for the result ``(n, m)``."""
        n = len(x)
        y = np.empty((n, m), np.float32)
        if not y.size:
            return y
        with self.lent(x.nbytes + ALIGNMENT + y.nbytes, "activations and results") as area:
            result = area + -(-x.nbytes // ALIGNMENT) * ALIGNMENT
            self.copy(area, x.ctypes.data, x.nbytes, stream)
            x_view = View((n, k), (4 * k, 4), "float32", area, self.device)
            y_view = View((n, m), (4 * m, 4), "float32", result, self.device)
            self.matmul(block_format, weights, m, k, x_view, y_view, int8, stream)
            self.copy(y.ctypes.data, result, y.nbytes, stream)
            self.synchronize(stream)
        return y

    def dequantize_host(
        self, block_format: Format, weights: int, m: int, k: int, stream: int
    ) -> npt.NDArray[np.float32]:
        """The weights ``(m, k)`` as float32 in host memory, by way of the device."""
        out = np.empty((m, k), np.float32)
        if not out.size:
            return out
        with self.lent(out.nbytes, "dequantized weights") as area:
            self.dequantize(block_format, weights, m, k, area, stream)
            self.copy(out.ctypes.data, area, out.nbytes, stream)
            self.synchronize(stream)
        return out

    def read_bytes(self, address: int, nbytes: int, stream: int) -> bytes:
        """Bytes as a kernel reads them at ``address``; waits for them."""
        with self.lent(nbytes, "bytes read") as area:
            read = np.empty(nbytes, np.uint8)
            with self.working(f"reading {nbytes} bytes"):
                blocks = self._grid(-(-nbytes // (WARPS * 32)))
                launch.read_kernel().launch(self.device, blocks, stream, address, nbytes, area)
            self.copy(read.ctypes.data, area, nbytes, stream)
            self.synchronize(stream)
        return read.tobytes()

    def _grid(self, wanted: int) -> int:
        """Blocks to launch: those wanted, at most as many as the device holds at once."""
        return max(1, min(wanted, self.multiprocessors * BLOCKS))

    def capture(self, work: Callable[[], object], stream: int, batch: int = 1) -> Graph:
        """Keeps what ``work()`` queues on a stream, as a graph, instead of running it.

        Args:
            work: launches and copies, with no allocation left to make: call it once before.
            stream: a handle other than 0.
            batch: calls of ``work`` in one replay.

        Raises:
            DeviceError: something in it cannot be captured.
        """
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with self.errors("capturing a graph"), current_device(self.device), _no_collection():
            call("cudaStreamBeginCapture", stream, mode)
            try:
                for _ in range(batch):
                    work()
            except BaseException:  # a stream left capturing would be of no use to anyone
                with suppress(CudaCallError):  # what failed may have ended it
                    call("cudaGraphDestroy", call("cudaStreamEndCapture", stream))
                raise
            return Graph(self, call("cudaStreamEndCapture", stream))

    @contextmanager
    def replay(self, work: Callable[[], object], stream: int, batch: int = 1) -> Iterator[Callable[[], None]]:
        """Capture calls of ``work()``, for use inside the ``with`` block; arguments as for :meth:`capture`.

        Yields:
            A function that puts one replay on the stream.
        """
        graph = self.capture(work, stream, batch)
        try:
            yield lambda: graph.launch(stream)
        finally:
            graph.close()

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
            start, end = (self._make("cudaEventDestroy", "cudaEventCreate") for _ in range(2))
            made.callback(self._unmake, "cudaEventDestroy", start)
            made.callback(self._unmake, "cudaEventDestroy", end)
            times = []
            for _ in range(repeats + 1):
                call("cudaEventRecord", start, stream)
                replay()
                call("cudaEventRecord", end, stream)
                call("cudaEventSynchronize", end)
                times.append(float(call("cudaEventElapsedTime", start, end)) / batch)
            return times[1:]  # the first replay uploads the graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected in the block: a dropped engine would wait for the device, which ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rounded(nbytes: int) -> int:
    """Up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
