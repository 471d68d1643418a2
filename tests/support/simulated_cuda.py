# ruff: noqa: N802  # functions are named as CUDA names them
"""A small model of CUDA for machines without a GPU: streams, events, captures, graphs and memory.

Work that is queued stays unfinished until a test says that it is done (:meth:`Stream.finish`), or until somebody waits
for it, which is noted in :attr:`Cuda.waited`. What would crash, hang, spoil a capture or mix up memory on a real device
is an AssertionError.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fake_driver
import pytest
from cuda.bindings import driver, runtime
from simulated_memory import Memory
from simulated_objects import Capture, Event, Executable, Item, Stream

from qmm import cuda
from qmm.kernels.runtime import launch

__all__ = ["Capture", "Cuda", "Stream", "installed"]

PER_THREAD = 2
SAFE = frozenset(
    """
    cudaGetDevice cudaSetDevice cudaGetDeviceCount cudaDeviceGetAttribute cudaThreadExchangeStreamCaptureMode
    cudaGetLastError cudaStreamBeginCapture cudaStreamEndCapture cudaStreamGetCaptureInfo cuStreamIsCapturing
    cuStreamGetId cuEventRecord cuStreamWaitEvent cuLaunchKernelEx cudaGraphLaunch cudaUserObjectCreate
    cudaGraphRetainUserObject cudaGraphDestroy cuEventCreate cuEventDestroy
    """.split()  # noqa: SIM905  # a list would be a line each
)
"""What any thread may call while a stream is captured; all else is treated as unsafe."""
ATTRIBUTES = {
    "ComputeCapabilityMajor": 9,
    "ComputeCapabilityMinor": 0,
    "MaxSharedMemoryPerBlockOptin": fake_driver.SHARED_NBYTES,
    "MemoryPoolsSupported": 1,
    "MultiProcessorCount": 132,
}


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode: Any = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
        self.stream: Stream | None = None


class Cuda(Memory):
    """Both ``cuda.bindings.driver`` and ``cuda.bindings.runtime``.

    Attributes:
        waited: for each wait that found unfinished work, what waited: ``"stream 5"`` (its number), ``"event"`` or
            ``"device"``. A test takes what it expects (:meth:`take_waits`).
        refused: errors that functions return, by name, as often as they are listed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.refused: dict[str, list[Any]] = {}
        self._thread = _Thread()
        self._lock = threading.RLock()
        self._numbers = iter(range(100, 1 << 30))
        self._handles = iter(range(0x1000, 1 << 30, 16))
        self._free_handles: list[int] = []
        self.streams = {handle: Stream(handle, next(self._numbers)) for handle in (0, 1)}
        self.streams[1] = self.streams[0]
        self.all_streams = [self.streams[0]]
        self.all_events: list[Event] = []
        self.captures: list[Capture] = []
        self.graphs: list[Capture] = []

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found
        refused = object.__getattribute__(self, "refused").get(name)
        if refused:
            return lambda *arguments: (refused.pop(0), None)
        if name not in SAFE and object.__getattribute__(self, "captures") and callable(found):
            relaxed = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
            assert self._thread.mode == relaxed, f"{name} during a capture"
        return functools.partial(self._called, found) if callable(found) else found

    def _called(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """One thread at a time."""
        with self._lock:
            return function(*arguments)

    def __getattr__(self, name: str) -> Any:
        for module in (runtime, driver):
            found = getattr(module, name, None)
            if isinstance(found, type | int):
                return found
        raise AttributeError(f"the simulated CUDA has no {name}")

    # What tests do as a user, or as the device ------------------------------------------------------------------------

    def stream(self) -> Stream:
        """A new stream; handles of destroyed ones come again."""
        handle = self._free_handles.pop() if self._free_handles else next(self._handles)
        made = self.streams[handle] = Stream(handle, next(self._numbers))
        self.all_streams.append(made)
        return made

    def destroy(self, stream: Stream) -> None:
        """As a user does; queued work goes on."""
        self.cudaStreamDestroy(stream.handle)

    def per_thread(self) -> Stream:
        """This thread's stream of handle 2."""
        if self._thread.stream is None:
            self._thread.stream = Stream(PER_THREAD, next(self._numbers))
            self.all_streams.append(self._thread.stream)
        return self._thread.stream

    def finish(self) -> None:
        """The device has done everything."""
        for stream in self.all_streams:
            stream.finish()

    def take_waits(self) -> list[str]:
        taken, self.waited = self.waited, []
        return taken

    def fork(self, stream: Stream, capture: Capture) -> None:
        """Let a stream join a capture."""
        stream.capture = capture
        capture.streams.append(stream)

    @contextmanager
    def captured(self, stream: Stream) -> Iterator[Capture]:
        """A user captures a stream; the block's graph is left, for :meth:`cudaGraphDestroy`."""
        self.cudaStreamBeginCapture(stream.handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal)
        assert stream.capture is not None
        try:
            yield stream.capture
        finally:
            self.cudaStreamEndCapture(stream.handle)

    @property
    def mode(self) -> Any:
        """This thread's, of captures."""
        return self._thread.mode

    def _at(self, handle: Any, idle: bool = False) -> Stream:
        if int(handle) == PER_THREAD:
            return self.per_thread()
        stream = self.streams.get(int(handle))
        assert stream is not None, f"{int(handle):#x} is no stream"
        assert not (idle and stream.capture), "this spoils the capture of its stream"
        return stream

    def _wait(self, items: list[Item], what: str) -> tuple[int]:
        if any(not item.done for item in items):
            self.waited.append(what)
            for item in list(items):
                item.finish()
        return (0,)

    def _ready(self, items: list[Item]) -> tuple[Any]:
        return (0,) if all(item.done for item in items) else (driver.CUresult.CUDA_ERROR_NOT_READY,)

    # The device -------------------------------------------------------------------------------------------------------

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return (0, 1)

    def cudaGetDevice(self) -> tuple[int, int]:
        return (0, 0)

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (0,)

    def cudaDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[int, int]:
        return (0, ATTRIBUTES.get(attribute.name.removeprefix("cudaDevAttr"), 0))

    def cudaThreadExchangeStreamCaptureMode(self, mode: Any) -> tuple[int, Any]:
        before, self._thread.mode = self._thread.mode, mode
        return (0, before)

    def cudaDeviceSynchronize(self) -> tuple[int]:
        assert not self.captures, "cudaDeviceSynchronize spoils every capture"
        return self._wait([item for stream in self.all_streams for item in stream.pending], "device")

    # Streams and events -----------------------------------------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        return (0, self.stream().handle)

    def cudaStreamDestroy(self, handle: int) -> tuple[int]:
        stream = self._at(handle, idle=True)
        assert handle > PER_THREAD
        assert not any(item.early for item in stream.pending), "destroyed with kernels that may start early: it hangs"
        stream.alive = False
        del self.streams[handle]
        self._free_handles.append(handle)
        return (0,)

    def cuStreamIsCapturing(self, handle: Any) -> tuple[int, int]:
        return (0, int(self._at(handle).capture is not None))

    def cudaStreamGetCaptureInfo(self, handle: Any) -> tuple[Any, ...]:
        capture = self._at(handle).capture
        return (0, 1, capture.number, capture, [], 0) if capture else (0, 0, 0, None, [], 0)

    def cuStreamGetId(self, handle: Any) -> tuple[int, int]:
        return (0, self._at(handle, idle=True).number)

    def cudaStreamSynchronize(self, handle: Any) -> tuple[int]:
        stream = self._at(handle, idle=True)
        self.fresh.clear()
        return self._wait(stream.pending, f"stream {stream.number}")

    cuStreamSynchronize = cudaStreamSynchronize  # noqa: N815

    def cuStreamQuery(self, handle: Any) -> tuple[Any]:
        return self._ready(self._at(handle, idle=True).pending)

    def cuEventCreate(self, flags: int) -> tuple[int, Event]:
        self.all_events.append(Event())
        return (0, self.all_events[-1])

    def cuEventDestroy(self, event: Event) -> tuple[int]:
        assert event.alive, "an event was destroyed twice"
        event.alive = False
        return (0,)

    def cuEventRecord(self, event: Event, handle: Any) -> tuple[int]:
        stream = self._at(handle)
        assert event.alive
        event.captured, event.items = stream.capture is not None, list(stream.pending)
        return (0,)

    def cuEventQuery(self, event: Event) -> tuple[Any]:
        assert event.alive
        assert not event.captured, "a query of a captured event"
        return self._ready(event.items)

    def cuEventSynchronize(self, event: Event) -> tuple[int]:
        assert event.alive
        assert not event.captured
        return self._wait(event.items, "event")

    def cuStreamWaitEvent(self, handle: Any, event: Event, flags: int) -> tuple[int]:
        stream = self._at(handle)
        assert event.alive
        assert event.captured == (stream.capture is not None), "an event from outside of the capture"
        stream.items.append(Item(after=tuple(event.items)))
        return (0,)

    # Work -------------------------------------------------------------------------------------------------------------

    def cuLaunchKernelEx(self, config: Any, function: Any, packed: int, extra: int) -> tuple[Any]:
        result = super().cuLaunchKernelEx(config, function, packed, extra)
        made, stream = self.launches[-1], self._at(config.hStream)
        self._queue(stream, frozenset(map(self.block, made.arguments)) - {None}, made.early)
        return result

    def _queue(self, stream: Stream, blocks: frozenset[Any], early: bool = False) -> Item:
        if stream.capture:
            stream.capture.blocks |= blocks
            return Item()
        for other in self.all_streams:
            shared = [item for item in other.pending if other is not stream and item.blocks & blocks]
            assert not shared, f"streams {other.number} and {stream.number} use the same memory at once"
        item = Item(blocks, early=early)
        stream.items.append(item)
        return item

    # Captures and graphs ----------------------------------------------------------------------------------------------

    def cudaStreamBeginCapture(self, handle: int, mode: Any) -> tuple[int]:
        stream = self._at(handle, idle=True)
        capture = Capture(next(self._numbers))
        self.captures.append(capture)
        self.fork(stream, capture)
        return (0,)

    def cudaStreamEndCapture(self, handle: int) -> tuple[int, Capture]:
        capture = self._at(handle).capture
        assert capture is not None
        self.captures.remove(capture)
        self.graphs.append(capture)
        for stream in capture.streams:
            stream.capture = None
        return (0, capture)

    def cudaGraphInstantiate(self, graph: Capture, flags: int) -> tuple[int, Executable]:
        return (0, Executable(graph))

    def cudaGraphLaunch(self, executable: Executable, handle: int) -> tuple[int]:
        stream = self._at(handle, idle=True)
        executable.last = Item(frozenset(executable.graph.blocks))
        stream.items.append(executable.last)
        return (0,)

    def cudaGraphDestroy(self, graph: Capture) -> tuple[int]:
        graph.drop()
        return (0,)

    def cudaGraphExecDestroy(self, executable: Executable) -> tuple[int]:
        if executable.last.done:
            executable.graph.drop()
        else:  # CUDA waits for it, in a thread of its own
            executable.last.then.append(executable.graph.drop)
        return (0,)

    def cudaUserObjectCreate(self, address: int, destroy: Any, count: int, flags: Any) -> tuple[int, Any]:
        post = ctypes.CDLL(None).sem_post
        assert int(destroy) == ctypes.cast(post, ctypes.c_void_p).value
        assert count == 1
        return (0, lambda: post(ctypes.c_void_p(address)) and None)

    def cudaGraphRetainUserObject(self, graph: Capture, counted: Any, count: int, flags: Any) -> tuple[int]:
        graph.retained.append(counted)
        return (0,)


@contextmanager
def installed(patch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """Put one in the place of CUDA's, on a machine with one device. In the end nothing of it may be left, and all waits
    must have been taken."""
    made = Cuda()
    for module in ("driver", "runtime"):
        patch.setitem(sys.modules, f"cuda.bindings.{module}", made)
    patch.setattr(launch, "_loaded", {})
    cuda.runtime.cache_clear()
    cuda.driver.cache_clear()
    try:
        yield made
    finally:
        cuda.runtime.cache_clear()
        cuda.driver.cache_clear()
    assert made.mode == runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal, "the thread's mode was changed"
    assert not made.sizes, "memory was left"
    assert not [event for event in made.all_events if event.alive], "events were left"
