"""Closing what a GPU may still use: after all work, or not yet. A fake driver answers; nothing runs on a GPU."""

from __future__ import annotations

import ctypes
import functools
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_driver
import numpy as np
import pytest
from cuda.bindings import driver as bindings
from fake_driver import Driver
from small_model import write_small_model

import qmm
from qmm import streams
from qmm.arrays import keeper_of
from qmm.children import PerProcess, process
from qmm.cuda import CudaCallError
from qmm.device import Device
from qmm.graph import Graph
from qmm.graph_life import GraphLife
from qmm.in_flight import InFlight
from qmm.loaders.closing import Resource
from qmm.memory.residency import CopyResidency
from qmm.plan import Plan
from qmm.pool import Pool
from qmm.streams import Streams, Use

OWN, USERS = 1 << 20, 2 << 20
MIB = 1 << 20


class Answers(Driver):
    """Streams of which some are being captured, and some cannot be used because others are."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: set[int] = set()
        self.implicit: set[int] = set()
        self.waited: list[int] = []
        self.interrupts = False

    def cuStreamIsCapturing(self, stream: Any) -> tuple[Any, int]:  # noqa: N802
        error = "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT" if int(stream) in self.implicit else "CUDA_SUCCESS"
        return getattr(bindings.CUresult, error), int(stream) in self.captured

    def cuStreamSynchronize(self, stream: Any) -> tuple[int]:  # noqa: N802
        if self.interrupts:
            raise KeyboardInterrupt
        self.waited.append(int(stream))
        return (0,)

    def cuEventCreate(self, flags: int) -> tuple[int, object]:  # noqa: N802
        return 0, object()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Answers:
    monkeypatch.setattr(fake_driver, "Driver", Answers)
    made = fake_driver.install(monkeypatch)
    assert isinstance(made, Answers)
    return made


@pytest.fixture
def device(fake: Answers, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """One with a product on a stream of the user's, which nothing destroys."""
    for module in ("device", "streams"):
        monkeypatch.setattr(f"qmm.{module}.on_device", lambda number: nullcontext())
        monkeypatch.setattr(f"qmm.{module}.call", lambda function, *arguments: None)
    device = object.__new__(Device)
    device.number, device.own_streams, device._alone, device.stream = 0, {OWN: True}, True, OWN
    device.lock, device._thread, device._stopped = threading.RLock(), threading.local(), False
    device._queued = 0
    device._process, device.freed = process.now, []
    device.free = device.freed.append
    device.streams = Streams(device)
    device._thread.ready = True
    device.streams._kept[USERS] = Use(bindings.CUstream(USERS))
    yield device
    device.own_streams = {}


def engine_on(device: Device, released: list[str]) -> qmm.Engine:
    engine = object.__new__(qmm.Engine)
    engine._closed, engine._process, engine._closing = False, process.now, threading.RLock()
    engine._in_flight = PerProcess(functools.partial(InFlight, "closed"))
    engine.gpu, engine.explanation, engine._held = device, "on a fake", ExitStack()
    engine._held.callback(released.append, "weights")
    return engine


def plan_on(device: Device, released: list[str]) -> Plan:
    class Graph:
        closed = False

        def stop(self) -> None:
            """Refuse replays."""

    plan = object.__new__(Plan)
    plan._closed, plan._device, plan._closing, plan._length = False, device, threading.RLock(), 1
    plan._graph, plan._held = Graph(), ExitStack()
    plan._held.callback(setattr, plan._graph, "closed", True)
    plan._held.callback(released.append, "arrays")
    return plan


@pytest.mark.parametrize("make", [engine_on, plan_on], ids=["engine", "plan"])
@pytest.mark.parametrize("default", [False, True], ids=["that stream's", "one that the default stream waits for"])
def test_nothing_is_released_while_a_capture_is_in_the_way_of_waiting(
    fake: Answers, device: Device, make: Any, default: bool
) -> None:
    released: list[str] = []
    closed = make(device, released)
    which = "the default stream cannot be used" if default else "stream 0x200000 is being captured"
    if default:
        device.streams._kept[0] = Use(bindings.CUstream(0))
    (fake.implicit if default else fake.captured).add(0 if default else USERS)
    with pytest.raises(qmm.DeviceError, match=f"{which}.* cannot be waited for.*close again once the capture"):
        closed.close()
    assert closed.closed
    assert not released
    fake.implicit.clear()
    fake.captured.clear()
    closed.close()
    assert released
    assert fake.waited[0] == USERS


@pytest.mark.parametrize("make", [engine_on, plan_on], ids=["engine", "plan"])
def test_an_interrupt_of_the_waiting_releases_nothing(fake: Answers, device: Device, make: Any) -> None:
    released: list[str] = []
    closed = make(device, released)
    fake.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        closed.close()
    assert not released
    fake.interrupts = False
    closed.close()
    assert released


@pytest.mark.parametrize("make", [engine_on, plan_on], ids=["engine", "plan"])
def test_what_is_dropped_during_a_capture_is_closed_after_it(fake: Answers, device: Device, make: Any) -> None:
    released: list[str] = []
    held = [make(device, released)]
    fake.captured.add(USERS)
    with pytest.warns(ResourceWarning, match="dropped before it was closed"):
        held.clear()
    gc.collect()
    assert not released
    fake.captured.clear()
    gc.collect()
    assert released


@pytest.mark.parametrize("make", [engine_on, plan_on], ids=["engine", "plan"])
def test_what_is_collected_while_this_thread_queues_work_is_closed_later(
    fake: Answers, device: Device, make: Any
) -> None:
    """As a plan's call may collect its engine, and with it the graph that is about to be launched."""
    released: list[str] = []
    held = [make(device, released)]
    with device.lock:
        with pytest.warns(ResourceWarning, match="dropped before it was closed"):
            held.clear()
        assert not released
    gc.collect()
    assert released


def test_only_what_waits_for_closing_is_looked_at_when_garbage_is_collected() -> None:
    class Stubborn(Resource):
        closed = False
        attempts = 0

        def close(self) -> None:
            Stubborn.attempts += 1
            raise qmm.DeviceError("no")

    with pytest.warns(ResourceWarning):
        Stubborn()
    for _ in range(2):
        gc.collect()
    assert Stubborn.attempts == 1


def test_work_is_not_ended_by_a_default_stream_that_cannot_be_asked(fake: Answers, device: Device) -> None:
    """As while a "blocking" stream is captured: it is neither idle nor an error."""
    device.streams._kept[0] = Use(bindings.CUstream(0))
    fake.implicit.add(0)
    device.streams.forget_idle()
    assert list(device.streams._kept) == [0]
    with pytest.raises(CudaCallError, match="use another stream, or capture a non-blocking one"):
        device.streams.order(0, 5)
    fake.captured.add(5)
    device.streams.order(0, 5)  # a captured stream waits for nothing


def test_a_workspace_that_is_given_back_is_never_in_use_too(device: Device) -> None:
    class Interrupted(list):
        def append(self, item: object) -> None:
            raise KeyboardInterrupt

    use = device.streams._kept[USERS]
    use.address, use.nbytes = 4096, MIB
    device.streams._retired = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        device.streams._retire(use)
    assert (use.address, use.nbytes) == (0, 0)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The semaphores of graphs, as CUDA gets to know them."""
    semaphores: list[int] = []

    def call(function: str, *arguments: Any) -> object:
        if function == "cudaUserObjectCreate":
            semaphores.append(arguments[0])
        return object()

    monkeypatch.setattr("qmm.graph_life.call", call)
    monkeypatch.setattr(streams, "capture_of", lambda stream: (7, object()))
    return semaphores


def test_a_graph_is_over_once_cuda_says_so(graphs: list[int]) -> None:
    life = GraphLife(object())
    assert not life.over
    libc = ctypes.CDLL(None)
    libc.sem_post(ctypes.c_void_p(graphs[0]))
    assert life.over
    assert life.over


def test_threads_in_one_capture_have_a_workspace_each_for_their_own_default_streams(
    fake: Answers, device: Device, graphs: list[int]
) -> None:
    """Their handles are the same number."""
    fake.captured.add(2)
    uses = [device.streams.begin(2), device.streams.begin(2)]
    thread = threading.Thread(target=lambda: uses.append(device.streams.begin(2)))
    thread.start()
    thread.join()
    assert uses[0] is uses[1]
    assert uses[0] is not uses[2]
    assert uses[0].life is uses[2].life


def test_an_array_that_only_qmm_knows_lives_as_long_as_the_graph(
    fake: Answers, device: Device, graphs: list[int]
) -> None:
    class Array:
        pass

    array, collected = Array(), []
    weakref.finalize(array, collected.append, True)
    fake.captured.add(5)
    device.keep_for_graph(5, array)
    del array
    device.streams.forget_graphs()
    assert not collected
    ctypes.CDLL(None).sem_post(ctypes.c_void_p(graphs[0]))
    device.streams.forget_graphs()
    assert collected


def test_the_default_stream_of_each_thread_is_kept_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keeper_of(None, 0, 0) is True
    monkeypatch.setattr("qmm.arrays._LEGACY", (1,))  # as if cuda-python took 0 for each thread's own
    assert keeper_of(None, 0, 0) is None
    assert keeper_of(None, 2, 0) is None


def test_a_copy_that_was_released_is_not_made_again(tmp_path: Path, rng: np.random.Generator) -> None:
    """A call of another thread may have begun before the engine was closed, and come to its weight after that."""
    write_small_model(tmp_path / "small.gguf", rng)
    with qmm.open(tmp_path / "small.gguf") as model:
        tensor = model["a"]
        copy = CopyResidency(tensor, model.mapping(tensor.info.path), None)  # type: ignore[arg-type]
        copy.release()
        with pytest.raises(qmm.ClosedError, match=r"small\.gguf: the engine was closed"):
            copy.lease()


def test_a_closed_pool_allocates_nothing() -> None:
    with pytest.raises(CudaCallError, match="closed"):
        Pool(0).allocate(1)


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_a_number_that_is_no_handle_is_refused(device: Device, number: int) -> None:
    with pytest.raises(qmm.DeviceError, match=f"an event on CUDA device 0: {number} is not the handle of a stream"):
        device.hold(number, [])


def test_all_events_are_destroyed_with_the_streams(
    fake: Answers, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    monkeypatch.setattr(fake, "cuEventCreate", lambda flags: (0, events.append(object()) or events[-1]), raising=False)
    monkeypatch.setattr(fake, "cuEventDestroy", lambda event: (0, events.remove(event)), raising=False)
    device.hold(USERS, ["an array"])
    device.hold(5, ["another"])
    use = device.streams.begin(5)
    use.address = use.nbytes = MIB
    device.streams._retire(use)
    assert len(events) == 4
    device.streams.close()
    assert not events


class CuPyLike:
    """A stream that is destroyed when the last reference to it goes."""

    handle = 6


def test_a_stream_lives_as_long_as_a_replay_on_it(
    fake: Answers, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels may start early, which a stream that is destroyed does not survive."""
    launched: list[tuple[object, ...]] = []
    runtime = SimpleNamespace(cudaGraphLaunch=lambda *arguments: launched.append(arguments) or (0,))
    monkeypatch.setattr("qmm.graph.runtime", lambda: runtime)
    monkeypatch.setattr(streams, "keeper_of", lambda owner, handle, number: owner)
    graph = object.__new__(Graph)
    graph._device, graph._stopped, graph._ended, graph._executable = device, False, False, "executable"
    stream = CuPyLike()
    gone = weakref.ref(stream)
    assert graph.launch(stream.handle, stream)
    assert launched == [("executable", 6)]
    del stream
    assert gone() is not None
    device.streams.forget_idle()
    assert gone() is None
    graph.stop()
    with pytest.raises(qmm.ClosedError, match="the graph was closed by another thread"):
        graph.launch(6)
    graph._ended = True


def test_an_engine_that_is_dropped_is_closed_after_the_graphs_that_need_it(
    fake: Answers, device: Device, graphs: list[int]
) -> None:
    released: list[str] = []
    held = [engine_on(device, released)]
    fake.captured.add(5)
    device.streams.begin(5)  # a product is captured
    fake.captured.clear()
    with pytest.warns(ResourceWarning, match="dropped before it was closed"):
        held.clear()
    gc.collect()
    assert not released
    ctypes.CDLL(None).sem_post(ctypes.c_void_p(graphs[0]))
    gc.collect()
    assert released


def test_only_engines_wait_for_the_replays_of_graphs(
    fake: Answers, device: Device, graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be anywhere, so all of the device is waited for. CUDA forbids that while anything is captured."""
    fake.captured.add(5)
    device.streams.begin(5)

    def call(function: str, *arguments: object) -> None:
        if function == "cudaDeviceSynchronize":
            raise CudaCallError("it was refused", "cudaErrorStreamCaptureUnsupported", 900)

    monkeypatch.setattr(streams, "call", call)
    released: list[str] = []
    plan_on(device, released).close()
    assert released == ["arrays"]
    released.clear()
    engine = engine_on(device, released)
    with pytest.raises(qmm.DeviceError, match=r"it was refused\. A graph of yours has products in it.*close again"):
        engine.close()
    assert not released
    ctypes.CDLL(None).sem_post(ctypes.c_void_p(graphs[0]))
    engine.close()
    assert released == ["weights"]
