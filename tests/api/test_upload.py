"""Copies of a file's pages to a device: through locked pieces, or the driver's own way. CUDA is simulated."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import simulated_cuda
from simulated_work import Simulated

from qmm import upload
from qmm.errors import DeviceError

PIECE = 4096
PIECES = 19  # the last of which is short


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PIECE_NBYTES", PIECE)
    monkeypatch.setattr(upload, "DIRECT_NBYTES", 2 * PIECE)


@pytest.fixture
def source(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, PIECES * PIECE - 77).astype(np.uint8)


def copied(simulated: Simulated, source: np.ndarray) -> bytes:
    """What a buffer on the device holds after a copy."""
    with simulated.device.temporary_buffer(source.nbytes, "a test") as target:
        simulated.device.uploads.copy(target, source.ctypes.data, source.nbytes)
        parts = [simulated.cuda.contents.pop(start) for start in sorted(simulated.cuda.contents)]
    simulated.cuda.take_waits()
    return b"".join(parts)


@pytest.mark.parametrize("pools", [0, 1])
def test_large_copies_go_through_locked_pieces(
    simulated: Simulated, source: np.ndarray, monkeypatch: pytest.MonkeyPatch, pools: int
) -> None:
    """The simulated device reads a locked piece as late as it may, so one that is filled too early spoils the copy."""
    monkeypatch.setitem(simulated_cuda.ATTRIBUTES, "HostMemoryPoolsSupported", pools)
    cuda = simulated.cuda
    for _ in range(2):
        cuda.copies.clear()
        assert copied(simulated, source) == source.tobytes()
        assert len(cuda.copies) == PIECES
        assert len({start for _, start, _ in cuda.copies}) == upload.PIECES
        assert sum(cuda.sizes[block] for block in cuda.locked) == upload.PIECES * PIECE


def test_small_copies_lock_nothing(simulated: Simulated, source: np.ndarray) -> None:
    small = source[: 2 * PIECE]
    assert copied(simulated, small) == small.tobytes()
    assert [start for _, start, _ in simulated.cuda.copies] == [source.ctypes.data]
    assert not simulated.cuda.locked


def no_memory(cuda: Any, patch: pytest.MonkeyPatch) -> None:
    cuda.refused["cudaMallocHost"] = [cuda.cudaError_t.cudaErrorMemoryAllocation]


def no_threads(cuda: Any, patch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("refuse", [no_memory, no_threads], ids=["locked memory", "threads"])
def test_what_the_system_refuses_is_done_without(
    simulated: Simulated, source: np.ndarray, monkeypatch: pytest.MonkeyPatch, refuse: Any
) -> None:
    with monkeypatch.context() as patch:
        refuse(simulated.cuda, patch)
        assert copied(simulated, source) == source.tobytes()
    assert len(simulated.cuda.copies) == 1


def test_an_error_in_a_thread_is_raised_once_all_have_ended(simulated: Simulated, source: np.ndarray) -> None:
    cuda = simulated.cuda
    before = threading.active_count()
    cuda.refused["cudaMemcpyAsync"] = [cuda.cudaError_t.cudaErrorIllegalAddress]
    with pytest.raises(DeviceError, match="returned cudaErrorIllegalAddress"):
        copied(simulated, source)
    assert threading.active_count() == before
    cuda.finish()
    cuda.contents.clear()
    assert copied(simulated, source) == source.tobytes()


def test_an_upload_beside_a_capture(simulated: Simulated, source: np.ndarray) -> None:
    stream = simulated.cuda.stream()
    with simulated.cuda.captured(stream) as graph:
        assert copied(simulated, source) == source.tobytes()
    simulated.cuda.cudaGraphDestroy(graph)


def test_threads_take_turns_with_the_pieces(simulated: Simulated, rng: np.random.Generator) -> None:
    sources = [rng.integers(0, 256, 9 * PIECE).astype(np.uint8) for _ in range(4)]
    device, cuda = simulated.device, simulated.cuda
    targets = [device.allocate(source.nbytes, "a test") for source in sources]
    threads = [
        threading.Thread(target=device.uploads.copy, args=(target, source.ctypes.data, source.nbytes))
        for target, source in zip(targets, sources, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for target, source in zip(targets, sources, strict=True):
        parts = [cuda.contents[target + start] for start in range(0, source.nbytes, PIECE)]
        assert b"".join(parts) == source.tobytes()
    cuda.take_waits()
