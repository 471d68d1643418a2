"""One CUDA device as an engine uses it: memory, streams, and executing what ops have planned.

Nothing here knows of files, models or formats. Calls put work on the stream that they are given and return without
waiting.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import Any

from qmm.children import process
from qmm.cuda import ANYWHERE, CudaCallError, attribute, call, current_device, on_device
from qmm.errors import ClosedError, DeviceError, OutOfMemoryError
from qmm.kernels.ops.layout import ZERO_NBYTES
from qmm.kernels.ops.op import BASES, Architecture, At, Work
from qmm.kernels.runtime.launch import Launch
from qmm.loaders.closing import Resource, close_later
from qmm.pool import WAY_OUT, Pool, new_stream
from qmm.streams import IDLE_NBYTES, Streams
from qmm.upload import Uploads

__all__ = ["Device", "Prepared"]

DISTURBED = (
    "a finalizer or a signal handler of the same thread multiplied in the middle of a product, whose results may be "
    "wrong. Multiply again."
)


class _Errors:
    """The block of :meth:`Device.errors`."""

    __slots__ = ("_device", "_doing")

    def __init__(self, device: Device, doing: str) -> None:
        self._device, self._doing = device, doing

    def __enter__(self) -> None:
        """Nothing is done."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, CudaCallError | RuntimeError):
            raise self._device._failed(self._doing, error) from error


class Prepared:
    """Work on a device, ready to be queued again and again: kernels loaded, launches packed.

    Attributes:
        work: what was planned.
        workspace_nbytes: its work's, at hand for each call.
        launches: one for each of the work's.
        bases: the addresses that BASES names, which the launches read when they are queued.
        shifted: arguments at an offset from a base: each with the base's number and the offset.
    """

    def __init__(self, work: Work, launches: list[Launch], zeros: int) -> None:
        """Args are the work, its launches in order, and the address of the device's zeros."""
        self.work = work
        self.workspace_nbytes = work.workspace_nbytes
        self.launches = launches
        self.bases = (ctypes.c_int64 * len(BASES))()
        self.bases[BASES.index("zeros")] = zeros
        self.shifted: list[tuple[ctypes.c_int64, int, int]] = []
        for launch, spec in zip(launches, work.launches, strict=True):
            for name, value in spec.arguments.items():
                if isinstance(value, At):
                    base = BASES.index(value.base)
                    if value.offset:
                        self.shifted.append((launch.cell(name), base, value.offset))
                    else:
                        launch.read_from(name, self.bases, base)


class Device(Resource):
    """A CUDA device. Closing it frees what is still allocated there: memory and streams.

    Attributes:
        number: CUDA's number of the device.
        architecture: its properties that plans depend on.
        stream: a stream of its own.
        own_streams: the handles of all of its own.
        streams: what was queued, on this and other streams.
        pool: where its memory is from.
        uploads: copies of files' pages to it.
        lock: held by the thread that puts work on it.
    """

    def __init__(self, number: int) -> None:
        self.number = number = operator.index(number)
        self._process = process.now
        self.own_streams: dict[int, bool] = {}
        self._staging = (0, 0)
        self._thread = threading.local()
        self._stopped = False
        self._queued = 0
        self.lock = threading.RLock()
        self.pool = Pool(number)
        self.uploads = Uploads(self)
        try:
            with self.errors("preparing the device"), on_device(number):
                self.architecture = Architecture(
                    sms=attribute("MultiProcessorCount", number),
                    shared_nbytes=attribute("MaxSharedMemoryPerBlockOptin", number),
                    bulk=attribute("ComputeCapabilityMajor", number) >= 9,
                    l2_nbytes=attribute("L2CacheSize", number),
                    bus_bits=attribute("GlobalMemoryBusWidth", number),
                )
                self._alone = call("cudaGetDeviceCount") == 1
                self.streams = Streams(self)
                self.stream = self._new_stream()
                self.pool.open()
            self._zeros = self.allocate(ZERO_NBYTES, "zeros")
            with self.errors("preparing the device"), on_device(number):
                call("cudaMemsetAsync", self._zeros, 0, ZERO_NBYTES, self.stream)
                call("cudaStreamSynchronize", self.stream)
        except BaseException:
            with suppress(DeviceError):  # the first error takes precedence
                self.close()
            raise

    @property
    def forked(self) -> bool:
        """Whether this is a forked child: CUDA's resources are the parent's, and are not freed here."""
        return self._process != process.now

    @property
    def closed(self) -> bool:
        """Whether it was closed, or this is a forked child."""
        return not getattr(self, "own_streams", None) or self.forked

    @property
    def _in_use(self) -> bool:
        """Whether this thread is in the middle of putting work on it."""
        return not self.forked and bool(self.lock._is_owned())  # type: ignore[attr-defined]

    # Errors and threads -----------------------------------------------------------------------------------------------

    def errors(self, doing: str) -> AbstractContextManager[None]:
        """Turns a failed CUDA call into a DeviceError that names its purpose."""
        return _Errors(self, doing)

    def _failed(self, doing: str, reason: Exception) -> DeviceError:
        message = f"{doing} on CUDA device {self.number}: {reason}"
        if isinstance(reason, CudaCallError) and reason.out_of_memory:
            return OutOfMemoryError(f"{message}. {WAY_OUT}")
        return DeviceError(message)

    @contextmanager
    def current(self, doing: str) -> Iterator[None]:
        """Makes the device current inside the block, and turns a failed call into a DeviceError.

        If there is only one device, this is done once for each thread, which saves 2 us a product.
        """
        with self.errors(doing):
            if not self._alone:
                with current_device(self.number):
                    yield
                return
            if not hasattr(self._thread, "ready"):
                call("cudaSetDevice", self.number)
                self._thread.ready = True
            yield

    def put(self, doing: str, work: Callable[..., Any], *arguments: object) -> Any:
        """Call ``work``, which puts work on the device: one thread at a time, and none after :meth:`stop`.

        Raises:
            ClosedError: it was stopped.
            DeviceError: CUDA refused.
        """
        with self.lock:
            if self._stopped:
                raise ClosedError(f"the engine on CUDA device {self.number} was closed. Create another one.")
            if not hasattr(self._thread, "ready"):
                with self.current(doing):
                    return work(*arguments)
            try:
                return work(*arguments)
            except (CudaCallError, RuntimeError) as reason:
                raise self._failed(doing, reason) from reason

    # Memory and streams -----------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, what: str) -> int:
        """The address of ``nbytes`` of device memory, until it is freed or the device is closed.

        Where there is not enough, libraries are asked to give back what they merely cache.

        Args:
            nbytes: how many.
            what: what they are for, for messages.

        Raises:
            OutOfMemoryError: there is not enough.
        """
        with self.errors(f"{nbytes} bytes for {what}"), on_device(self.number):
            address = self.pool.allocate(operator.index(nbytes))
            if address is None:
                with self.lock:
                    self.streams.forget_idle()
                address = self.pool.allocate_at_last(nbytes, f"{nbytes} bytes for {what} on CUDA device {self.number}")
            return address

    def free(self, address: int) -> None:
        """Free memory, once the device is done with it. Freeing twice is harmless."""
        with self.errors("freeing memory"), on_device(self.number):
            self.pool.free(address)

    def require_usable(self, doing: str) -> None:
        """Raise DeviceError if a kernel failed, after which the device takes no more work from this process. Compilers
        and array libraries have errors of their own for that, which say less.

        Args:
            doing: what it is for, for messages.
        """
        with self.errors(doing), on_device(self.number):
            call("cudaMemGetInfo")  # which waits for nothing

    def _new_stream(self) -> int:
        stream = new_stream()
        self.own_streams[stream] = True
        return stream

    def _destroy(self, stream: int) -> None:
        if self.own_streams.pop(stream, False):
            with suppress(CudaCallError):  # kernels on it may start early: destroying it before they end can hang
                call("cudaStreamSynchronize", stream)
            with self.lock:
                self.streams.forget(stream)
            call("cudaStreamDestroy", stream)

    @contextmanager
    def temporary_buffer(self, nbytes: int, what: str) -> Iterator[int]:
        """A temporary buffer on the device for the ``with`` block. An error of the block takes precedence over one of
        freeing."""
        address = self.allocate(nbytes, what)
        try:
            yield address
        except BaseException:
            with suppress(DeviceError):
                self.drain(graphs=False)  # the exception may have come before the block had waited
                self.free(address)
            raise
        self.free(address)

    @contextmanager
    def temporary_stream(self) -> Iterator[int]:
        """A stream for the ``with`` block, on which no other thread puts work; its end waits for that work."""
        with self.errors("creating a stream"), on_device(self.number):
            stream = self._new_stream()
        try:
            yield stream
        finally:
            with suppress(DeviceError), self.errors("freeing a stream"), on_device(self.number):
                self._destroy(stream)

    @contextmanager
    def events(self) -> Iterator[tuple[int, int]]:
        """Two timing events for the ``with`` block; the device must be current."""
        start, end = (int(call("cudaEventCreate")) for _ in range(2))
        try:
            yield start, end
        finally:
            for event in (start, end):
                call("cudaEventDestroy", event)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any two addresses, on a stream."""
        with self.errors(f"copying {nbytes} bytes"), on_device(self.number):
            call("cudaMemcpyAsync", *map(operator.index, (target, source, nbytes)), ANYWHERE, stream)

    def synchronize(self, stream: int) -> None:
        """Wait for a stream; an error of its work is raised here."""
        with self.errors("waiting for a stream"), on_device(self.number):
            call("cudaStreamSynchronize", stream)

    def staging(self, nbytes: int) -> int:
        """The address of the staging area for host arrays: kept, and as large as the largest request so far. For the
        thread that holds :attr:`lock`; no work that uses it may be queued."""
        address, held = self._staging
        if held < nbytes:
            if address:
                self._staging = (0, 0)
                self.synchronize(self.stream)  # a call that KeyboardInterrupt ended may have work there
                self.free(address)
            address = self.allocate(nbytes, "activations and results")
            self._staging = (address, nbytes)
        return address

    # Work -------------------------------------------------------------------------------------------------------------

    def prepare(self, work: Work, doing: str) -> Prepared:
        """Work, ready to be queued; its kernels are compiled if need be.

        Args:
            work: what an op has planned.
            doing: what it is for, for messages.

        Raises:
            DeviceError: a kernel cannot be compiled or loaded.
        """
        self.require_usable(doing)
        # Not under the lock: another thread may compile, and finalize what needs the lock.
        with self.errors(doing), on_device(self.number):
            launches = []
            for spec in work.launches:
                bound = {name: value for name, value in spec.arguments.items() if not isinstance(value, At)}
                bound |= dict.fromkeys(spec.arguments.keys() - bound.keys(), 0)
                launches.append(Launch(spec.kernel, self.number, spec.ctas, bound, spec.shared_nbytes, spec.early))
            return Prepared(work, launches, self._zeros)

    def queue(
        self, prepared: Prepared, weights: int, x: int, y: int, stream: int, workspace: int = 0, owner: object = None
    ) -> None:
        """Put prepared work on a stream.

        Args:
            prepared: what :meth:`prepare` gave.
            weights: the address of the weight's first byte.
            x: the address of the activations' first element.
            y: the address of the results' first element.
            stream: a stream's handle.
            workspace: the address of ``prepared.work.workspace_nbytes`` bytes; 0 for the stream's own.
            owner: the stream's object, or the kind of array whose library gave the handle; None for a stream that the
                caller may destroy while the work is queued.

        Raises:
            ClosedError: the device was stopped.
            DeviceError: CUDA refused.
        """
        with self.lock:
            if self._stopped or not hasattr(self._thread, "ready"):
                self.put("a product", self._queue, prepared, weights, x, y, stream, workspace, owner)
                return
            try:
                self._queue(prepared, weights, x, y, stream, workspace, owner)
            except (CudaCallError, RuntimeError) as reason:
                raise self._failed("a product", reason) from reason

    def _queue(
        self, prepared: Prepared, weights: int, x: int, y: int, stream: int, workspace: int, owner: object
    ) -> None:
        number, streams = self._queued, self.streams
        use = streams.begin(stream, owner)
        nbytes = prepared.workspace_nbytes
        if nbytes and not workspace:
            fits = nbytes <= use.nbytes <= IDLE_NBYTES and not streams.crowded
            workspace = use.address if fits else streams.workspace(use, nbytes)
        event = use.event
        try:
            self.launch(prepared, weights, x, y, stream, workspace, event is None)
        finally:
            if event is not None:
                streams.end(use)
        if self._queued != number + 1:
            raise CudaCallError(DISTURBED)

    def launch(
        self, prepared: Prepared, weights: int, x: int, y: int, stream: int, workspace: int, early: bool, skip: int = 0
    ) -> None:
        """Put prepared work on a stream, between :meth:`Streams.begin` and :meth:`Streams.end`; arguments as for
        :meth:`queue`.

        Args:
            early: whether kernels may start before their predecessors end.
            skip: how many launches to leave out at the beginning.
        """
        self._queued += 1
        bases = prepared.bases
        bases[0], bases[1], bases[2], bases[3] = weights, x, y, workspace  # the order of BASES
        for cell, base, offset in prepared.shifted:
            cell.value = bases[base] + offset
        for launch in prepared.launches[skip:] if skip else prepared.launches:
            launch.queue(stream, early)

    @contextmanager
    def undisturbed(self, products: int) -> Iterator[None]:
        """For the thread that holds :attr:`lock`, while it queues so many products that share memory.

        Raises:
            DeviceError: it queued others too: a finalizer or a signal handler ran in the middle.
        """
        before = self._queued
        yield
        if self._queued != before + products:
            raise DeviceError(f"products on CUDA device {self.number}: {DISTURBED}")

    def order(self, first: int, then: int) -> None:
        """Let what is queued on one stream from now on wait for what is queued on another; nothing is done if one of
        them is being captured."""
        self.put("an event", self.streams.order, first, then)

    def hold(self, stream: int, arrays: object) -> None:
        """Keep arrays alive until what is queued on a stream now is done, and somewhat longer."""
        self.put("an event", self.streams.hold, stream, arrays)

    def keep_for_graph(self, stream: int, array: object) -> None:
        """If a stream is being captured, keep an array that only qmm knows until the graph is destroyed."""
        self.put("a captured product", self.streams.keep_for_graph, stream, array)

    def stop(self, resource: Resource | None = None) -> None:
        """Refuse new work, and :meth:`settle`, before a resource is released, or the device itself."""
        with self.lock:
            self._stopped = True
        self.settle(self if resource is None else resource)

    def settle(self, resource: Resource, graphs: bool = True) -> None:
        """Wait for the work that was queued, before a resource is released that it may use; arguments as for
        :meth:`drain`. That work failed is no error here, but is one of :meth:`drain`.

        Raises:
            DeviceError: a capture is in the way. The resource may not be released yet; it is closed later.
        """
        try:
            self.drain(graphs)
        except DeviceError as error:
            if isinstance(error.__cause__, CudaCallError) and error.__cause__.captured:
                close_later(resource)
                raise

    def drain(self, graphs: bool = True) -> None:
        """Wait for the work that was queued here, whatever else the device does; an error of any of it is raised here.

        Args:
            graphs: whether to wait for replays of the user's graphs too. While there is one that has work of this
                device's in it, that means all work on the GPU.
        """
        with self.errors("waiting for the device"), on_device(self.number):
            self.streams.wait(graphs)
            call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Wait for the work that was queued here, and free everything. Closing twice is harmless.

        Raises:
            DeviceError: work that was still queued failed.
        """
        if self.closed:
            return
        self.settle(self)
        with self.errors("closing"), on_device(self.number):
            self.streams.wait(graphs=True)  # all is done: this raises what failed
            call("cudaStreamSynchronize", self.stream)
            self.streams.close()
            self.uploads.close()
            self._staging = (0, 0)
            self.pool.close()
            while self.own_streams:
                stream, _ = self.own_streams.popitem()
                call("cudaStreamDestroy", stream)

    def __repr__(self) -> str:
        return f"<Device {self.number}{' (closed)' if self.closed else ''}>"
