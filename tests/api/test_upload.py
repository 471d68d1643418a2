"""Copies of a file's pages to a device: through locked pieces, or the driver's own way. CUDA is simulated."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_cuda
from gguf_files import random_blocks, write_gguf
from simulated_work import Simulated

import qmm
from qmm import upload
from qmm.errors import DeviceError, MappingError
from qmm.loaders import FileMapping
from qmm.memory.residency import CopyResidency

PIECE = 4096
PIECES = 67  # the last of which is short
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
    cuda, usual = simulated.cuda, FileMapping.read
    monkeypatch.setattr(FileMapping, "read", lambda *arguments: (time.sleep(0.002), usual(*arguments))[1])
    for _ in range(2):
        cuda.copies.clear()
        assert copied(simulated, source) == content(source)
        assert len(cuda.copies) == PIECES
        assert upload.THREADS <= len({start for _, start, _ in cuda.copies}) <= upload.PIECES  # each took one at least
        assert sum(cuda.sizes[block] for block in cuda.locked) == upload.PIECES * PIECE


def test_small_copies_lock_nothing(simulated: Simulated, source: FileMapping) -> None:
    assert copied(simulated, source, 2 * PIECE) == content(source, 2 * PIECE)
    assert [start for _, start, _ in simulated.cuda.copies] == [source.address + OFFSET]
    assert not simulated.cuda.locked


def test_without_locked_memory_copies_go_the_drivers_way(simulated: Simulated, source: FileMapping) -> None:
    simulated.cuda.refused["cudaMallocHost"] = [simulated.cuda.cudaError_t.cudaErrorMemoryAllocation]
    assert copied(simulated, source) == content(source)
    assert len(simulated.cuda.copies) == 1


@pytest.mark.parametrize("started", [0, 1, 3])
def test_copies_do_with_the_threads_that_there_are(
    simulated: Simulated, source: FileMapping, monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    usual, starts = threading.Thread.start, itertools.count()

    def start(thread: threading.Thread) -> None:
        if next(starts) >= started:
            raise RuntimeError("can't start new thread")
        usual(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert copied(simulated, source) == content(source)
    assert copied(simulated, source) == content(source)


def test_an_error_in_a_thread_is_raised_once_all_have_ended(simulated: Simulated, source: FileMapping) -> None:
    cuda = simulated.cuda
    cuda.refused["cudaMemcpyAsync"] = [cuda.cudaError_t.cudaErrorIllegalAddress]
    with pytest.raises(DeviceError, match="returned cudaErrorIllegalAddress"):
        copied(simulated, source)
    assert len(cuda.copies) < PIECES
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


def test_another_upload_meanwhile_does_not_wait(
    simulated: Simulated, source: FileMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be one of a signal handler of this very thread."""
    device, cuda, usual = simulated.device, simulated.cuda, FileMapping.read
    with device.temporary_buffer(NBYTES, "a test") as other, device.temporary_buffer(NBYTES, "a test") as target:

        def read(mapping: FileMapping, offset: int, piece: memoryview) -> None:
            if not nested:
                nested.append(True)
                device.uploads.copy(other, source, OFFSET, NBYTES)
            usual(mapping, offset, piece)

        nested: list[bool] = []
        monkeypatch.setattr(FileMapping, "read", read)
        started = time.monotonic()
        device.uploads.copy(target, source, OFFSET, NBYTES)
        assert time.monotonic() - started < 2
        assert cuda.contents.pop(other) == content(source)
        assert b"".join(cuda.contents[start] for start in sorted(cuda.contents)) == content(source)
    cuda.take_waits()


@pytest.mark.parametrize("reads", [1, 2, 5])
def test_an_interrupted_first_use_frees_its_copy_when_nothing_writes_there_any_more(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    rng, usual, count = np.random.default_rng(0), FileMapping.read, itertools.count(1)
    path = tmp_path / "model.gguf"
    write_gguf(path, {"a": ("Q8_0", (900, 256), random_blocks("Q8_0", (900, 256), rng))})

    def read(*arguments: Any) -> None:
        time.sleep(0.002)
        if threading.current_thread() is threading.main_thread() and next(count) == reads:
            raise KeyboardInterrupt
        usual(*arguments)

    with qmm.open(path) as model:
        tensor = model["a"]
        copy = CopyResidency(tensor, model.mapping(tensor.info.path), simulated.device)
        before = set(simulated.cuda.sizes)
        monkeypatch.setattr(FileMapping, "read", read)
        with pytest.raises(KeyboardInterrupt):
            copy.lease()
        assert set(simulated.cuda.sizes) - before <= set(simulated.cuda.locked)  # the copy was freed
        made = len(simulated.cuda.copies)
        assert made < tensor.nbytes // PIECE
        time.sleep(0.05)
        assert len(simulated.cuda.copies) == made
        simulated.cuda.contents.clear()
        address = copy.lease()
        parts = [simulated.cuda.contents[start] for start in sorted(simulated.cuda.contents)]
        assert b"".join(parts) == tensor.data.tobytes()
        assert address in simulated.cuda.sizes
        copy.release()
    simulated.cuda.take_waits()


def test_a_file_that_is_written_to_during_its_copy_is_an_error(
    simulated: Simulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, usual = tmp_path / "model.gguf", FileMapping.read
    rng = np.random.default_rng(0)
    write_gguf(path, {"a": ("Q8_0", (300, 256), random_blocks("Q8_0", (300, 256), rng))})
    with qmm.open(path) as model:
        tensor = model["a"]
        copy = CopyResidency(tensor, model.mapping(tensor.info.path), simulated.device)

        def read(*arguments: Any) -> None:
            usual(*arguments)
            os.utime(path, ns=(1, 1))

        monkeypatch.setattr(FileMapping, "read", read)
        with pytest.raises(MappingError, match="mtime_ns was"):
            copy.lease()
        assert copy.nbytes == 0
    simulated.cuda.take_waits()


def test_a_refused_upload_keeps_nothing_alive(simulated: Simulated, source: FileMapping) -> None:
    class Held:
        """What a caller's frame refers to."""

    def fail() -> weakref.ref[Held]:
        held = Held()
        cuda.refused["cudaMemcpyAsync"] = [cuda.cudaError_t.cudaErrorIllegalAddress]
        with pytest.raises(DeviceError):
            copied(simulated, source)
        return weakref.ref(held)

    cuda = simulated.cuda
    gc.collect()
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()
    cuda.finish()
    cuda.take_waits()
