"""Copies of a file's pages to a device: through locked pieces, or the driver's own way. CUDA is simulated."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_cuda
from simulated_work import Simulated

from qmm import upload
from qmm.errors import DeviceError, MappingError
from qmm.loaders import FileMapping

PIECE = 4096
PIECES = 19  # the last of which is short
OFFSET, NBYTES = 1000, PIECES * PIECE - 77


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PIECE_NBYTES", PIECE)
    monkeypatch.setattr(upload, "DIRECT_NBYTES", 2 * PIECE)


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Iterator[FileMapping]:
    path = tmp_path / "file"
    path.write_bytes(rng.bytes(OFFSET + NBYTES + 5000))
    with FileMapping.open(path) as mapping:
        yield mapping


def content(source: FileMapping, nbytes: int = NBYTES) -> bytes:
    return source.path.read_bytes()[OFFSET : OFFSET + nbytes]


def copied(simulated: Simulated, source: FileMapping, nbytes: int = NBYTES) -> bytes:
    """What a buffer on the device holds after a copy."""
    with simulated.device.temporary_buffer(nbytes, "a test") as target:
        simulated.device.uploads.copy(target, source, OFFSET, nbytes)
        parts = [simulated.cuda.contents.pop(start) for start in sorted(simulated.cuda.contents)]
    simulated.cuda.take_waits()
    return b"".join(parts)


@pytest.mark.parametrize("pools", [0, 1])
def test_large_copies_go_through_locked_pieces(
    simulated: Simulated, source: FileMapping, monkeypatch: pytest.MonkeyPatch, pools: int
) -> None:
    """The simulated device reads a locked piece as late as it may, so one that is filled too early spoils the copy."""
    monkeypatch.setitem(simulated_cuda.ATTRIBUTES, "HostMemoryPoolsSupported", pools)
    cuda = simulated.cuda
    for _ in range(2):
        cuda.copies.clear()
        assert copied(simulated, source) == content(source)
        assert len(cuda.copies) == PIECES
        assert len({start for _, start, _ in cuda.copies}) == upload.PIECES
        assert sum(cuda.sizes[block] for block in cuda.locked) == upload.PIECES * PIECE


def test_small_copies_lock_nothing(simulated: Simulated, source: FileMapping) -> None:
    assert copied(simulated, source, 2 * PIECE) == content(source, 2 * PIECE)
    assert [start for _, start, _ in simulated.cuda.copies] == [source.address + OFFSET]
    assert not simulated.cuda.locked


def no_memory(cuda: Any, patch: pytest.MonkeyPatch) -> None:
    cuda.refused["cudaMallocHost"] = [cuda.cudaError_t.cudaErrorMemoryAllocation]


def no_threads(cuda: Any, patch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("refuse", [no_memory, no_threads], ids=["locked memory", "threads"])
def test_what_the_system_refuses_is_done_without(
    simulated: Simulated, source: FileMapping, monkeypatch: pytest.MonkeyPatch, refuse: Any
) -> None:
    with monkeypatch.context() as patch:
        refuse(simulated.cuda, patch)
        assert copied(simulated, source) == content(source)
    assert len(simulated.cuda.copies) == 1


def test_an_error_in_a_thread_is_raised_once_all_have_ended(simulated: Simulated, source: FileMapping) -> None:
    cuda = simulated.cuda
    cuda.refused["cudaMemcpyAsync"] = [cuda.cudaError_t.cudaErrorIllegalAddress]
    with pytest.raises(DeviceError, match="returned cudaErrorIllegalAddress"):
        copied(simulated, source)
    assert len(cuda.copies) == PIECES - 5  # all but those of one thread
    cuda.finish()
    cuda.contents.clear()
    assert copied(simulated, source) == content(source)


def test_a_file_that_becomes_shorter_meanwhile_is_an_error(simulated: Simulated, source: FileMapping) -> None:
    """Reading it through the mapping would end the process."""
    os.truncate(source.path, OFFSET + 3 * PIECE)
    with pytest.raises(MappingError, match=r"file: became shorter since it was opened: there is no byte \d+. Open"):
        copied(simulated, source)
    simulated.cuda.take_waits()
    simulated.cuda.finish()


def test_an_upload_beside_a_capture(simulated: Simulated, source: FileMapping) -> None:
    stream = simulated.cuda.stream()
    with simulated.cuda.captured(stream) as graph:
        assert copied(simulated, source) == content(source)
    simulated.cuda.cudaGraphDestroy(graph)


def test_two_uploads_at_once(simulated: Simulated, source: FileMapping) -> None:
    device, cuda = simulated.device, simulated.cuda
    targets = [device.allocate(NBYTES, "a test") for _ in range(4)]
    threads = [
        threading.Thread(target=device.uploads.copy, args=(target, source, OFFSET, NBYTES)) for target in targets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for target in targets:
        parts = [cuda.contents[target + start] for start in range(0, NBYTES, PIECE)]
        assert b"".join(parts) == content(source)
    cuda.take_waits()
