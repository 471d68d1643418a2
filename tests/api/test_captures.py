"""A device beside and inside of captures, on a simulated CUDA where what would spoil one is an AssertionError."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from simulated_arrays import Array, Arrays, K, M
from simulated_cuda import Capture, Cuda
from simulated_work import Library, Simulated

from qmm.arrays import KINDS
from qmm.copies import copy_in, copy_out
from qmm.cuda import on_device
from qmm.device import Device
from qmm.errors import DeviceError, OutOfMemoryError
from qmm.graph import capture
from qmm.plan import Plan

MIB = 1 << 20
KEPT = Library(object(), True)


def captured(simulated: Simulated, stream: Any, nbytes: int = MIB) -> tuple[Capture, int]:
    """The graph of some work, and its workspace."""
    with simulated.cuda.captured(stream) as graph:
        address = simulated.use(stream, nbytes)
    return graph, address


# Workspaces of graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [None, KEPT], ids=["raw", "kept"])
def test_each_capture_has_its_own_workspace(simulated: Simulated, owner: Any) -> None:
    stream = simulated.cuda.stream()
    eager = simulated.use(stream, owner=owner)
    graphs, addresses = zip(*(captured(simulated, stream) for _ in range(2)), strict=True)
    assert len({eager, *addresses}) == 3
    assert simulated.use(stream, owner=owner) == eager
    for graph in graphs:
        simulated.cuda.cudaGraphDestroy(graph)


def test_streams_of_one_capture_have_a_workspace_each(simulated: Simulated) -> None:
    cuda, stream, side = simulated.cuda, simulated.cuda.stream(), simulated.cuda.stream()
    with cuda.captured(stream) as graph:
        cuda.fork(side, graph)
        first, second = simulated.use(stream), simulated.use(side)
        assert first != second
        assert (simulated.use(stream), simulated.use(side)) == (first, second)
    assert len(graph.retained) == 1
    cuda.cudaGraphDestroy(graph)


def test_a_graphs_workspaces_are_given_back_after_the_last_that_replays_it(simulated: Simulated) -> None:
    cuda, stream = simulated.cuda, simulated.cuda.stream()
    with cuda.captured(stream) as graph:
        addresses = {simulated.use(stream, MIB), simulated.use(stream, 2 * MIB)}  # both are in its nodes
    assert len(addresses) == 2
    _, executable = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaGraphDestroy(graph)
    cuda.cudaGraphLaunch(executable, int(stream))
    cuda.cudaGraphExecDestroy(executable)
    simulated.device.streams.forget_idle()
    assert addresses <= cuda.sizes.keys()  # a replay still runs
    stream.finish()
    simulated.device.streams.forget_idle()
    assert not addresses & cuda.sizes.keys()


def test_the_next_capture_gives_back_what_destroyed_graphs_used(simulated: Simulated) -> None:
    stream = simulated.cuda.stream()
    before = simulated.cuda.nbytes
    for _ in range(5):
        graph, _ = captured(simulated, stream)
        assert simulated.cuda.nbytes == before + MIB
        simulated.cuda.cudaGraphDestroy(graph)


def test_a_replay_and_work_on_the_stream_it_was_captured_on_share_nothing(simulated: Simulated) -> None:
    cuda, stream, other = simulated.cuda, simulated.cuda.stream(), simulated.cuda.stream()
    simulated.use(stream)
    graph, _ = captured(simulated, stream)
    _, executable = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaGraphLaunch(executable, int(other))
    simulated.use(stream)  # else an AssertionError
    simulated.use(stream, 8 * MIB)
    stream.finish()
    simulated.device.streams.forget_idle()
    cuda.finish()
    cuda.cudaGraphExecDestroy(executable)
    cuda.cudaGraphDestroy(graph)


def test_nothing_of_a_capture_is_ordered_or_held(simulated: Simulated) -> None:
    stream, other = simulated.cuda.stream(), simulated.cuda.stream()
    simulated.use(other)
    with simulated.cuda.captured(stream) as graph:
        simulated.use(stream)
        simulated.device.order(int(other), int(stream))
        simulated.device.order(int(stream), int(other))
        simulated.device.hold(int(stream), object())
    assert not simulated.device.streams._held
    simulated.cuda.cudaGraphDestroy(graph)


# Waiting --------------------------------------------------------------------------------------------------------------


def test_draining_waits_for_the_device_only_while_a_captured_graph_exists(simulated: Simulated) -> None:
    cuda, stream, other = simulated.cuda, simulated.cuda.stream(), simulated.cuda.stream()
    graph, _ = captured(simulated, stream)
    cuda._queue(other, frozenset())  # it may be a replay
    simulated.device.drain()
    assert cuda.take_waits() == ["device"]
    cuda.cudaGraphDestroy(graph)
    cuda._queue(other, frozenset())
    simulated.device.drain()
    assert cuda.take_waits() == []


def test_draining_waits_for_replays_of_a_plan_but_not_for_the_device(simulated: Simulated) -> None:
    cuda, foreign, raw = simulated.cuda, simulated.cuda.stream(), simulated.cuda.stream()
    device, prepared = simulated.device, simulated.prepared(MIB)
    with device.temporary_stream() as stream:
        graph = capture(device, lambda: device.queue(prepared, 16, 32, 64, stream), stream)
    assert graph.launch(int(raw))
    busy = cuda._queue(foreign, frozenset())
    device.drain()
    assert cuda.take_waits() == ["event"]
    assert not busy.done
    before = cuda.nbytes
    graph.close()
    assert cuda.nbytes == before - MIB


def test_a_graph_is_not_replayed_into_a_capture(simulated: Simulated) -> None:
    device, prepared, user = simulated.device, simulated.prepared(0), simulated.cuda.stream()
    with device.temporary_stream() as stream:
        graph = capture(device, lambda: device.queue(prepared, 16, 32, 64, stream), stream)
    with simulated.cuda.captured(user) as other:
        assert not graph.launch(int(user))
    graph.close()
    simulated.cuda.cudaGraphDestroy(other)


def test_work_before_a_capture_of_the_same_stream_cannot_be_waited_for(simulated: Simulated) -> None:
    stream = simulated.cuda.stream()
    simulated.use(stream, owner=KEPT)
    cannot = pytest.raises(DeviceError, match="is being captured, and what was queued there before cannot be waited")
    with simulated.cuda.captured(stream) as graph, cannot:
        simulated.device.drain()
    simulated.device.drain()
    assert simulated.cuda.take_waits() == [f"stream {stream.number}"]
    simulated.cuda.cudaGraphDestroy(graph)


# What is unsafe in a capture ------------------------------------------------------------------------------------------


def copies(simulated: Simulated) -> None:
    array, device = np.zeros(8, np.float32), simulated.device
    with device.temporary_buffer(array.nbytes, "a test") as address:
        copy_in(device, address, array, device.stream)
        copy_out(device, array, address, device.stream)


def more_streams_than_are_remembered(simulated: Simulated) -> None:
    for _ in range(40):
        stream = simulated.cuda.stream()
        simulated.use(stream)
        simulated.device.hold(int(stream), None)
        stream.finish()


def grown_workspace(simulated: Simulated) -> None:
    stream = simulated.cuda.stream()
    for nbytes in (MIB, 4 * MIB, 128 * MIB, MIB):
        simulated.use(stream, nbytes, KEPT)
        stream.finish()


def ordered_streams(simulated: Simulated) -> None:
    streams = [simulated.cuda.stream() for _ in range(2)]
    simulated.device.order(*map(int, streams))


def a_plan(simulated: Simulated) -> None:
    device, prepared = simulated.device, simulated.prepared(MIB)
    with device.temporary_stream() as stream:
        graph = capture(device, lambda: device.queue(prepared, 16, 32, 64, stream), stream)
    graph.launch(0)
    simulated.cuda.finish()
    graph.close()


def out_of_memory(simulated: Simulated) -> None:
    simulated.cuda.limit = simulated.cuda.nbytes
    with pytest.raises(OutOfMemoryError):
        simulated.use(simulated.cuda.stream())


UNSAFE: dict[str, Callable[[Simulated], object]] = {
    "a new device": lambda simulated: Device(0).close(),
    "preparing": lambda simulated: simulated.prepared(MIB),
    "copies": copies,
    "many streams": more_streams_than_are_remembered,
    "a first call on a default stream": lambda simulated: (simulated.use(0), simulated.use(2), simulated.cuda.finish()),
    "grown workspace": grown_workspace,
    "out of memory": out_of_memory,
    "order": ordered_streams,
    "a plan": a_plan,
    "draining": lambda simulated: simulated.device.drain(),
}


@pytest.mark.parametrize("what", UNSAFE)
def test_nothing_unsafe_is_called_beside_a_capture(simulated: Simulated, what: str) -> None:
    user = simulated.cuda.stream()
    with simulated.cuda.captured(user) as graph:
        UNSAFE[what](simulated)
    simulated.cuda.cudaGraphDestroy(graph)
    simulated.cuda.take_waits()


@pytest.mark.parametrize("nbytes", [0, MIB, 128 * MIB])
def test_nothing_unsafe_is_called_for_first_work_in_a_capture(simulated: Simulated, nbytes: int) -> None:
    """In another thread than the device was opened in, too."""
    stream, graphs = simulated.cuda.stream(), []

    def work() -> None:
        graphs.append(captured(simulated, stream, nbytes)[0])

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    for graph in graphs:
        simulated.cuda.cudaGraphDestroy(graph)


def test_closing_beside_a_capture(cuda: Cuda) -> None:
    device, user, raw = Device(0), cuda.stream(), cuda.stream()
    cuda.take_waits()
    Simulated(cuda, device).use(raw)
    with cuda.captured(user) as graph:
        device.close()
    assert cuda.take_waits() == ["event"]
    cuda.cudaGraphDestroy(graph)


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True])
def test_host_arrays_that_cuda_refuses_go_through_pages_of_their_own(simulated: Simulated, refused: bool) -> None:
    array, back = np.arange(8, dtype=np.float32).reshape(2, 4), np.zeros((2, 4), np.float32)
    device, cuda = simulated.device, simulated.cuda
    refusals = [cuda.cudaError_t.cudaErrorInvalidValue] * refused
    with device.temporary_buffer(array.nbytes, "a test") as address:
        cuda.refused["cudaMemcpyAsync"] = list(refusals)
        copy_in(device, address, array, device.stream)
        cuda.refused["cudaMemcpyAsync"] = list(refusals)
        copy_out(device, back, address, device.stream)
        np.testing.assert_array_equal(back, array)
        (_, source, _), (target, _, _) = cuda.copies
    assert (source == array.ctypes.data, target == back.ctypes.data) == (not refused,) * 2
    if refused:
        assert source % 4096 == target % 4096 == 0
    cuda.take_waits()


def test_other_refusals_of_a_copy_are_errors(simulated: Simulated) -> None:
    array, device, cuda = np.zeros(8, np.float32), simulated.device, simulated.cuda
    for copied in (copy_in, copy_out):
        cuda.refused["cudaMemcpyAsync"] = [cuda.cudaError_t.cudaErrorIllegalAddress]
        arguments = (0, array) if copied is copy_in else (array, 0)
        with pytest.raises(DeviceError, match=r"copying 32 bytes .* returned cudaErrorIllegalAddress"):
            copied(device, *arguments, device.stream)
    assert not cuda.copies


# Interrupts -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_replay_is_waited_for(simulated: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    device, cuda, stream = simulated.device, simulated.cuda, simulated.cuda.stream()
    prepared, usual = simulated.prepared(MIB), Cuda.cudaGraphLaunch
    with device.temporary_stream() as own:
        graph = capture(device, lambda: device.queue(prepared, 16, 32, 64, own), own)

    def launch(cuda: Cuda, *arguments: Any) -> None:
        usual(cuda, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "cudaGraphLaunch", launch)
        with pytest.raises(KeyboardInterrupt):
            graph.launch(int(stream))
    cuda.take_waits()
    device.settle(graph, graphs=False)
    assert cuda.take_waits() == ["event"]
    graph.close()


def test_a_block_that_was_not_left_does_not_stand_for_the_next(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an interrupt at its end, when the user has made another device current meanwhile."""
    current = [0]
    monkeypatch.setattr(Cuda, "cudaGetDevice", lambda cuda: (0, current[0]))
    monkeypatch.setattr(Cuda, "cudaSetDevice", lambda cuda, device: (0, current.__setitem__(0, device))[:1])
    left = on_device(0)
    left.__enter__()
    current[0] = 1
    with on_device(0):
        assert current == [0]
    assert current == [1]
    current[0] = 0
    left.__exit__(None, None, None)


def test_a_plan_waits_for_the_streams_that_its_arrays_name(
    simulated: Simulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, filling, user = simulated.cuda, simulated.cuda.stream(), simulated.cuda.stream()
    kind = Arrays(int(user), recycles=False)
    monkeypatch.setitem(KINDS, Array, kind)
    x, y = Array((1, K), 0x4000, named=int(filling)), Array((1, M), 0x5000)
    with Plan(simulated.device, [], 1, [], kind, [(x, y)], "model.gguf") as plan:
        busy = cuda._queue(filling, frozenset())
        plan()
        assert any(busy in item.after for item in user.items)
        cuda.finish()
