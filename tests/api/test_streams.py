"""Streams and their workspaces on a simulated CUDA, whose work is done when a test says so."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import simulated_cuda
from cuda.bindings import driver
from simulated_cuda import Cuda
from simulated_memory import MEMORY
from simulated_work import Library, Simulated

import qmm.pool
from qmm.device import Device
from qmm.errors import ClosedError, OutOfMemoryError
from qmm.streams import HELD, IDLE_NBYTES, REMEMBERED

MIB = 1 << 20


class Owner:
    """A stream's object, which may be dropped."""


def kept(stream: Any = None) -> Library:
    """A library whose streams nothing destroys, as PyTorch's, or one whose objects own them, as CuPy's."""
    return Library(stream or Owner(), True if stream is None else stream)


# Workspace ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [None, kept()], ids=["raw", "kept"])
def test_each_stream_keeps_its_own_workspace(simulated: Simulated, owner: Any) -> None:
    streams = [simulated.cuda.stream() for _ in range(3)]
    first = [simulated.use(stream, owner=owner) for stream in streams]
    assert len(set(first)) == 3
    assert [simulated.use(stream, owner=owner) for stream in reversed(streams)] == first[::-1]


@pytest.mark.parametrize("owner", [None, kept()], ids=["raw", "kept"])
def test_a_workspace_that_grew_is_given_back_once_its_work_is_done(simulated: Simulated, owner: Any) -> None:
    stream, other = simulated.cuda.stream(), simulated.cuda.stream()
    small = simulated.use(stream, MIB, owner)
    large = simulated.use(stream, 4 * MIB, owner)
    assert simulated.use(stream, MIB, owner) == large
    simulated.device.streams.forget_idle()
    assert small in simulated.cuda.sizes
    stream.finish()
    simulated.use(other)  # looks after those that grew
    assert small not in simulated.cuda.sizes


def test_work_without_workspace_allocates_none(simulated: Simulated) -> None:
    before = simulated.cuda.nbytes
    simulated.use(simulated.cuda.stream(), 0)
    assert simulated.cuda.nbytes == before


def test_a_large_workspace_is_not_kept_for_a_small_call(simulated: Simulated) -> None:
    stream = simulated.cuda.stream()
    simulated.use(stream, IDLE_NBYTES + 512)
    stream.finish()
    simulated.use(stream, MIB)
    simulated.device.streams.forget_idle()
    assert simulated.cuda.nbytes < 2 * MIB


def test_little_idle_workspace_stays(simulated: Simulated) -> None:
    streams = [simulated.cuda.stream() for _ in range(12)]
    for stream in streams:
        simulated.use(stream, IDLE_NBYTES // 8)
        stream.finish()
    assert simulated.cuda.nbytes <= IDLE_NBYTES + MIB


def test_what_many_streams_needed_at_once_is_given_back_by_the_next_call(simulated: Simulated) -> None:
    streams = [simulated.cuda.stream() for _ in range(12)]
    for stream in streams:
        simulated.use(stream, IDLE_NBYTES // 8)
    assert simulated.cuda.nbytes > IDLE_NBYTES + 4 * MIB  # they work
    for stream in streams:
        stream.finish()
    simulated.use(streams[0], IDLE_NBYTES // 8)
    assert simulated.cuda.nbytes <= IDLE_NBYTES // 8 + MIB


def test_few_idle_streams_are_remembered(simulated: Simulated) -> None:
    streams = [simulated.cuda.stream() for _ in range(3 * REMEMBERED)]
    for stream in streams:
        simulated.use(stream, 1)
        stream.finish()
    known = simulated.device.streams
    assert len(known._others) + len(known._kept) <= REMEMBERED
    assert len(simulated.cuda.all_events) <= REMEMBERED + 1


def test_streams_that_work_are_remembered_however_many(simulated: Simulated) -> None:
    streams = [simulated.cuda.stream() for _ in range(2 * REMEMBERED)]
    first = [simulated.use(stream) for stream in streams]
    assert [simulated.use(stream) for stream in streams] == first


# Which stream it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [None, kept()], ids=["raw", "library"])
def test_threads_on_their_own_default_streams_share_nothing(simulated: Simulated, owner: Any) -> None:
    found = [simulated.use(2, owner=owner)]
    thread = threading.Thread(target=lambda: found.extend(simulated.use(2, owner=owner) for _ in range(2)))
    thread.start()
    thread.join()
    assert found[0] != found[1] == found[2]
    assert simulated.use(2, owner=owner) == found[0]
    assert not simulated.early  # a thread may end, and its stream with it


def test_a_handle_that_comes_again_is_another_stream(simulated: Simulated) -> None:
    first = simulated.cuda.stream()
    address = simulated.use(first)
    simulated.cuda.destroy(first)  # its work goes on
    second = simulated.cuda.stream()
    assert second.handle == first.handle
    assert simulated.use(second) != address
    simulated.device.streams.forget_idle()
    assert address in simulated.cuda.sizes
    first.finish()
    simulated.device.streams.forget_idle()
    assert address not in simulated.cuda.sizes


def test_kernels_start_early_only_on_streams_that_cannot_be_destroyed(simulated: Simulated) -> None:
    stream = simulated.cuda.stream()
    for owner, early in ((None, False), (int(stream), False), (kept(), True), (None, True)):
        simulated.use(stream, owner=owner)  # what is known to stay may be given as a number later
        assert simulated.early == early
    simulated.use(0)
    assert simulated.early  # the default stream


def test_a_library_is_asked_again_for_another_stream_only(simulated: Simulated) -> None:
    external = Library(Owner(), None)
    stream = simulated.cuda.stream()
    for _ in range(3):
        simulated.use(stream, owner=external)
    assert external.asked == 1
    assert not simulated.early
    simulated.use(stream, owner=kept())
    assert simulated.early


def test_the_object_of_a_stream_lives_until_the_stream_is_forgotten(simulated: Simulated) -> None:
    owner, stream = Owner(), simulated.cuda.stream()
    address, alive = simulated.use(stream, owner=kept(owner)), weakref.ref(owner)
    weakref.finalize(owner, simulated.cuda.destroy, stream)  # as CuPy does
    del owner
    gc.collect()
    simulated.device.streams.forget_idle()
    assert alive() is not None  # its work is not done
    assert simulated.use(stream) == address
    stream.finish()
    simulated.device.streams.forget_idle()
    gc.collect()
    assert alive() is None
    assert address not in simulated.cuda.sizes


# Order, arrays and waiting --------------------------------------------------------------------------------------------


def test_one_stream_waits_for_another(simulated: Simulated) -> None:
    first, then = simulated.cuda.stream(), simulated.cuda.stream()
    simulated.use(first)
    simulated.device.order(int(first), int(then))
    simulated.use(then)
    then.finish()  # needs the other one's work
    assert not first.pending


def test_arrays_live_until_the_work_is_done(simulated: Simulated) -> None:
    stream = simulated.cuda.stream()
    held = []
    for _ in range(2 * HELD):
        array = Owner()
        held.append(weakref.ref(array))
        simulated.use(stream)
        simulated.device.hold(int(stream), array)
        del array
    assert all(array() for array in held)
    stream.finish()
    simulated.device.hold(int(stream), None)
    assert not any(array() for array in held)


def test_draining_waits_for_what_was_queued_and_nothing_else(simulated: Simulated) -> None:
    cuda = simulated.cuda
    raw, owned, foreign, done = (cuda.stream() for _ in range(4))
    simulated.use(raw)
    simulated.use(owned, owner=kept())
    simulated.use(done)
    done.finish()
    later, busy = [cuda._queue(stream, frozenset()) for stream in (raw, foreign)]  # a user's own work
    simulated.device.drain()
    assert cuda.take_waits() == [f"stream {owned.number}", "event"]
    assert not later.done
    assert not busy.done


def test_closing_waits_for_a_destroyed_stream_and_frees_everything(cuda: Cuda) -> None:
    device = Device(0)
    cuda.take_waits()
    simulated, foreign = Simulated(cuda, device), cuda.stream()
    stream = cuda.stream()
    simulated.use(stream)
    cuda.destroy(stream)
    busy = cuda._queue(foreign, frozenset())
    device.close()
    device.close()
    assert cuda.take_waits() == ["event"]
    assert not busy.done
    assert not cuda.sizes
    assert set(cuda.streams) == {0, 1, int(foreign)}


def test_a_temporary_stream_is_destroyed_once_its_work_is_done(simulated: Simulated) -> None:
    with simulated.device.temporary_stream() as stream:
        address, number = simulated.use(stream), simulated.cuda.streams[stream].number
        assert simulated.early  # nobody else destroys it
    assert simulated.cuda.take_waits() == [f"stream {number}"]
    simulated.device.streams.forget_idle()
    assert address not in simulated.cuda.sizes


def test_a_stopped_device_takes_no_work_and_has_waited(simulated: Simulated) -> None:
    stream = simulated.cuda.stream()
    simulated.use(stream)
    simulated.device.stop()
    assert simulated.cuda.take_waits() == ["event"]
    with pytest.raises(ClosedError, match="was closed"):
        simulated.use(stream)


# Out of memory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def caches(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that other libraries cache; emptied when they are asked to give them back."""
    cached: list[int] = []

    def release() -> None:
        while cached:
            cuda.elsewhere -= cached.pop()

    monkeypatch.setattr(qmm.pool, "release_caches", release)
    return cached


def test_out_of_memory_gives_idle_workspace_back_first(simulated: Simulated, caches: list[int]) -> None:
    idle, busy, new = (simulated.cuda.stream() for _ in range(3))
    address, used = simulated.use(idle), simulated.use(busy)
    idle.finish()
    caches.append(1)
    simulated.cuda.elsewhere = 1
    simulated.cuda.limit = simulated.cuda.nbytes + 1 + MIB // 2
    simulated.use(new)
    assert address not in simulated.cuda.sizes
    assert used in simulated.cuda.sizes
    simulated.use(busy)


def test_out_of_memory_asks_other_libraries_next(simulated: Simulated, caches: list[int]) -> None:
    caches.append(64 * MIB)
    simulated.cuda.elsewhere = 65 * MIB
    simulated.cuda.limit = simulated.cuda.nbytes + 66 * MIB
    assert simulated.use(simulated.cuda.stream(), 32 * MIB) >= MEMORY
    assert simulated.cuda.elsewhere == MIB


def test_out_of_memory_at_last_names_both_numbers(simulated: Simulated, caches: list[int]) -> None:
    stream = simulated.cuda.stream()
    small = simulated.use(stream, MIB)
    simulated.cuda.limit = simulated.cuda.nbytes + MIB
    with pytest.raises(OutOfMemoryError, match=rf"^{4 * MIB} bytes for workspace on CUDA device 0 .*: {MIB} bytes are"):
        simulated.use(stream, 4 * MIB)
    assert small in simulated.cuda.sizes  # its work is not done
    assert simulated.use(stream, MIB // 2) != small  # and goes on with another


def test_a_device_without_memory_pools(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(simulated_cuda.ATTRIBUTES, "MemoryPoolsSupported", 0)
    for pooled in ("cudaMemPoolCreate", "cudaFreeAsync"):
        cuda.refused[pooled] = [cuda.cudaError_t.cudaErrorNotSupported]
    device = Device(0)
    simulated, stream = Simulated(cuda, device), cuda.stream()
    address = simulated.use(stream, MIB)
    stream.finish()
    cuda.limit = cuda.nbytes + MIB
    assert simulated.use(stream, 2 * MIB) != address  # in place of the first
    with pytest.raises(OutOfMemoryError):
        simulated.use(cuda.stream(), 2 * MIB)
    cuda.take_waits()
    device.close()
    assert cuda.take_waits() == ["event"]


@pytest.mark.parametrize("attempts", [1, 2])
def test_no_memory_for_a_device_at_all(cuda: Cuda, caches: list[int], attempts: int) -> None:
    """Streams take memory too: other libraries are asked for some, and then it is an error with a way out."""
    refusal = cuda.cudaError_t.cudaErrorMemoryAllocation
    cuda.refused["cudaStreamCreateWithFlags"] = [refusal] * attempts
    if attempts == 1:
        Device(0).close()
        return
    with pytest.raises(OutOfMemoryError, match=r"^preparing the device on CUDA device 0: .*torch\.cuda\.empty_cache"):
        Device(0)


def test_no_memory_for_an_event(simulated: Simulated) -> None:
    """The driver has another name for it than the runtime."""
    simulated.cuda.refused["cuEventCreate"] = [driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY]
    with pytest.raises(OutOfMemoryError, match=r"returned CUDA_ERROR_OUT_OF_MEMORY \(2\).*torch\.cuda\.empty_cache"):
        simulated.use(simulated.cuda.stream())
