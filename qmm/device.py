"""One CUDA device as an engine uses it: memory, streams, and executing what ops have planned.

Nothing here knows of files, models or formats. Calls put work on the stream that they are given and return without
waiting.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qmm.children import process
from qmm.cuda import CudaCallError, attribute, call, current_device
from qmm.errors import ClosedError, DeviceError
from qmm.kernels.ops.layout import ZERO_NBYTES
from qmm.kernels.ops.op import BASES, Architecture, At, Work
from qmm.kernels.runtime.launch import Launch
from qmm.loaders.closing import Resource

__all__ = ["Device", "Prepared"]

NONBLOCKING = 1
"""cudaStreamNonBlocking: work on the default stream is not waited for."""
ANYWHERE = 4
"""cudaMemcpyDefault: the addresses say where they are."""


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
        lock: held by the thread that puts work on it.
    """

    def __init__(self, number: int) -> None:
        self.number = number = operator.index(number)
        self._process = process.now
        self._allocated: dict[tuple[str, int], bool] = {}
        self._workspaces: dict[int, tuple[int, int]] = {}
        self._staging = (0, 0)
        self._thread = threading.local()
        self._stopped = False
        self.lock = threading.RLock()
        with self.errors("preparing the device"), current_device(number):
            self.architecture = Architecture(
                sms=attribute("MultiProcessorCount", number),
                shared_nbytes=attribute("MaxSharedMemoryPerBlockOptin", number),
                bulk=attribute("ComputeCapabilityMajor", number) >= 9,
                l2_nbytes=attribute("L2CacheSize", number),
                bus_bits=attribute("GlobalMemoryBusWidth", number),
            )
            self._alone = call("cudaGetDeviceCount") == 1
            self.stream = self._allocate("cudaStreamDestroy", "cudaStreamCreateWithFlags", NONBLOCKING)
        try:
            self._zeros = self.allocate(ZERO_NBYTES, "zeros")
            with self.errors("preparing the device"), current_device(number):
                call("cudaMemset", self._zeros, 0, ZERO_NBYTES)
                call("cudaDeviceSynchronize")  # only the default stream waits for it by itself
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
        return not getattr(self, "_allocated", None) or self.forked

    # Errors and threads -----------------------------------------------------------------------------------------------

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turns a failed CUDA call into a DeviceError that names its purpose."""
        try:
            yield
        except (CudaCallError, RuntimeError) as reason:
            raise self._failed(doing, reason) from reason

    def _failed(self, doing: str, reason: Exception) -> DeviceError:
        return DeviceError(f"{doing} on CUDA device {self.number}: {reason}")

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

    def put(self, doing: str, work: Callable[..., object], *arguments: object) -> None:
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
                    work(*arguments)
                return
            try:
                work(*arguments)
            except (CudaCallError, RuntimeError) as reason:
                raise self._failed(doing, reason) from reason

    # Memory and streams -----------------------------------------------------------------------------------------------

    def _allocate(self, undo: str, function: str, *arguments: int) -> int:
        """The handle or address that a call returns; the call ``undo`` frees it."""
        given = int(call(function, *arguments))
        self._allocated[undo, given] = True
        return given

    def _free(self, undo: str, given: int) -> None:
        if self._allocated.pop((undo, given), False):
            call(undo, given)

    def allocate(self, nbytes: int, what: str) -> int:
        """The address of ``nbytes`` of device memory, until it is freed or the device is closed.

        Raises:
            DeviceError: there is not enough.
        """
        with self.errors(f"{nbytes} bytes for {what}"), current_device(self.number):
            return self._allocate("cudaFree", "cudaMalloc", operator.index(nbytes))

    def free(self, address: int) -> None:
        """Free memory, once the device is done with it. Freeing twice is harmless."""
        with self.errors("freeing memory"), current_device(self.number):
            self._free("cudaFree", address)

    @contextmanager
    def temporary_buffer(self, nbytes: int, what: str) -> Iterator[int]:
        """A temporary buffer on the device for the ``with`` block. An error of the block takes precedence over one of
        freeing."""
        address = self.allocate(nbytes, what)
        try:
            yield address
        except BaseException:
            with suppress(DeviceError):
                self.free(address)
            raise
        self.free(address)

    @contextmanager
    def temporary_stream(self) -> Iterator[int]:
        """A stream for the ``with`` block, on which no other thread puts work."""
        with self.errors("creating a stream"), current_device(self.number):
            stream = self._allocate("cudaStreamDestroy", "cudaStreamCreateWithFlags", NONBLOCKING)
        try:
            yield stream
        finally:
            with suppress(DeviceError), self.errors("freeing a stream"), current_device(self.number):
                self._free("cudaStreamDestroy", stream)

    @contextmanager
    def events(self) -> Iterator[tuple[int, int]]:
        """Two timing events for the ``with`` block; the device must be current."""
        start, end = (self._allocate("cudaEventDestroy", "cudaEventCreate") for _ in range(2))
        try:
            yield start, end
        finally:
            for event in (start, end):
                self._free("cudaEventDestroy", event)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any two addresses, on a stream."""
        with self.errors(f"copying {nbytes} bytes"), current_device(self.number):
            call("cudaMemcpyAsync", *map(operator.index, (target, source, nbytes)), ANYWHERE, stream)

    def synchronize(self, stream: int) -> None:
        """Wait for a stream; an error of its work is raised here."""
        with self.errors("waiting for a stream"), current_device(self.number):
            call("cudaStreamSynchronize", stream)

    def staging(self, nbytes: int) -> int:
        """The address of the staging area for host arrays: kept, and as large as the largest request so far. For the
        thread that holds :attr:`lock`; no work that uses it may be queued."""
        address, held = self._staging
        if held < nbytes:
            if address:
                self.free(address)
                self._staging = (0, 0)
            address = self.allocate(nbytes, "activations and results")
            self._staging = (address, nbytes)
        return address

    def workspace(self, stream: int, nbytes: int) -> int:
        """The address of workspace, for the thread that holds :attr:`lock`. Each stream has its own, which its later
        work may overwrite.

        A workspace that became too small is kept, since queued work and captured graphs may still use it; a new one is
        at least twice as large.
        """
        address, held = self._workspaces.get(stream, (0, 0))
        if held < nbytes:
            held = max(nbytes, 2 * held)
            address = self.allocate(held, "workspace")
            self._workspaces[stream] = (address, held)
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
        with self.lock, self.current(doing):
            launches = []
            for spec in work.launches:
                bound = {name: value for name, value in spec.arguments.items() if not isinstance(value, At)}
                bound |= dict.fromkeys(spec.arguments.keys() - bound.keys(), 0)
                launches.append(Launch(spec.kernel, self.number, spec.ctas, bound, spec.shared_nbytes, spec.early))
            return Prepared(work, launches, self._zeros)

    def queue(
        self, prepared: Prepared, weights: int, x: int, y: int, stream: int, workspace: int = 0, skip: int = 0
    ) -> None:
        """Put prepared work on a stream.

        Args:
            prepared: what :meth:`prepare` gave.
            weights: the address of the weight's first byte.
            x: the address of the activations' first element.
            y: the address of the results' first element.
            stream: a stream's handle.
            workspace: the address of ``prepared.work.workspace_nbytes`` bytes; else it is the stream's own workspace.
            skip: how many launches to leave out at the beginning.

        Raises:
            ClosedError: the device was stopped.
            DeviceError: CUDA refused.
        """
        self.put("a product", self._queue, prepared, weights, x, y, stream, workspace, skip)

    def _queue(self, prepared: Prepared, weights: int, x: int, y: int, stream: int, workspace: int, skip: int) -> None:
        if prepared.workspace_nbytes and not workspace:
            workspace = self.workspace(stream, prepared.workspace_nbytes)
        bases = prepared.bases
        bases[0], bases[1], bases[2], bases[3] = weights, x, y, workspace  # the order of BASES
        for cell, base, offset in prepared.shifted:
            cell.value = bases[base] + offset
        for launch in prepared.launches[skip:] if skip else prepared.launches:
            launch.queue(stream)

    def stop(self) -> None:
        """Refuse new work, and wait for all work on the device; an error of any of it is raised here."""
        with self.lock:
            self._stopped = True
        self.drain()

    def drain(self) -> None:
        """Wait for all work on the device; an error of any of it is raised here."""
        with self.errors("waiting for the device"), current_device(self.number):
            call("cudaDeviceSynchronize")

    def close(self) -> None:
        """Wait for the device, and free everything there. Closing twice is harmless.

        Raises:
            DeviceError: work that was still queued failed.
        """
        if self.closed:
            return
        with self.errors("closing"), current_device(self.number):
            call("cudaDeviceSynchronize")
            self._workspaces.clear()
            self._staging = (0, 0)
            while self._allocated:
                (undo, given), _ = self._allocated.popitem()
                call(undo, given)

    def __repr__(self) -> str:
        return f"<Device {self.number}{' (closed)' if self.closed else ''}>"
