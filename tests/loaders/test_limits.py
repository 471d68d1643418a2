"""Hostile headers: sparse files that make every count plausible cost a second and 64 MB at most."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from qmm.errors import GGUFError
from qmm.loaders import GGUFIndex
from qmm.loaders.gguf.header import (
    COUNT_LIMIT,
    HEADER_LIMIT,
    NESTED_LIMIT,
    STRING_LIMIT,
    TEXT_LIMIT,
)


def sparse(path: Path, prefix: bytes) -> None:
    """``prefix``, then zeros up to 1 TiB that take no room on the disk."""
    path.write_bytes(prefix)
    os.truncate(path, 1 << 40)


def head(tensors: int, keys: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)


def key(kind: int) -> bytes:
    return struct.pack("<Q1sI", 1, b"k", kind)


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def array(name: bytes, item: int, count: int) -> bytes:
    return text(name) + struct.pack("<IIQ", 9, item, count)


def keys(count: int) -> bytes:
    return b"".join(text(b"k%d" % index) + struct.pack("<II", 4, index) for index in range(count))


def rows(count: int) -> bytes:
    return b"".join(text(b"t%d" % index) + struct.pack("<IQIQ", 1, 8, 0, 32 * index) for index in range(count))


LONG = "\U000e0001".encode() * (TEXT_LIMIT // 4 - 8)  # as text four bytes a character, as a repr ten


# A sparse file makes every count and length plausible: what is left is the bounds of header.py.
HOSTILE = {
    "strings-2^36": head(0, 1) + key(9) + struct.pack("<IQ", 8, 1 << 36),
    "strings-at-the-limit": head(2, 1) + key(9) + struct.pack("<IQ", 8, STRING_LIMIT),
    "bytes-2^39": head(0, 1) + key(9) + struct.pack("<IQ", 0, 1 << 39),
    "nested-2^36": head(0, 1) + key(9) + struct.pack("<IQ", 9, 1 << 36),
    "nested-at-the-limit": head(0, 3) + key(9) + struct.pack("<IQ", 9, NESTED_LIMIT),
    "deep": head(0, 1) + key(9) + struct.pack("<IQ", 9, 1) * 1000,
    "string-2^39": head(0, 1) + key(8) + struct.pack("<Q", 1 << 39),
    "long-string-in-array": head(0, 2) + key(9) + struct.pack("<IQQ", 8, 1 << 20, 1 << 39),
    "keys-2^36": head(0, 1 << 36),
    "keys-at-the-limit": head(0, COUNT_LIMIT) + keys(COUNT_LIMIT - 1) + key(99),
    "tensors-2^34": head(1 << 34, 0),
    "tensors-at-the-limit": head(COUNT_LIMIT, 0) + rows(COUNT_LIMIT - 1) + rows(1),
    "long-name": head(1, 0) + struct.pack("<Q", 1 << 30),
    "long-name-of-a-misaligned-tensor": head(1, 0) + text(LONG) + struct.pack("<IQIQ", 1, 8, 0, 3),
    "long-name-twice": head(2, 0) + (text(LONG[: len(LONG) // 2]) + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2,
    "long-key-of-an-unknown-type": head(0, 1) + text(LONG) + struct.pack("<I", 99),
    "alignment-of-megabytes": head(0, 1) + text(b"general.alignment") + struct.pack("<I", 8) + text(LONG),
    "alignment-is-an-array": head(0, 1) + array(b"general.alignment", 0, HEADER_LIMIT - 100),
    "split-count-is-an-array": head(0, 1) + array(b"split.count", 0, HEADER_LIMIT - 100),
    "split-count-is-strings": head(0, 1) + array(b"split.count", 8, STRING_LIMIT),
}


@pytest.mark.parametrize("prefix", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_costs_neither_time_nor_memory(tmp_path: Path, prefix: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    sparse(path, prefix)
    started = time.process_time()  # not the wall: a busy machine must not fail this
    with pytest.raises(GGUFError) as caught:
        GGUFIndex.read(path)
    assert time.process_time() - started < 1
    assert len(str(caught.value)) < 3000
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            GGUFIndex.read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_header_at_every_limit_is_read_within_a_second_and_64_mb(tmp_path: Path) -> None:
    """Each limit is bearable alone; one file may reach them all."""
    path = tmp_path / "full.gguf"
    texts = keys(COUNT_LIMIT - 2), rows(COUNT_LIMIT - 1)
    taken = len(texts[0]) + len(texts[1]) - 16 * (COUNT_LIMIT - 2) - (8 + 24) * (COUNT_LIMIT - 1) + 2
    name = LONG[: (TEXT_LIMIT - taken) // 4 * 4]
    chain = struct.pack("<Q", 8) + struct.pack("<Q", 1)  # contents that look like headers: the slowest to step over
    prefix = b"".join([
        head(COUNT_LIMIT, COUNT_LIMIT),
        texts[0],
        array(b"n", 9, NESTED_LIMIT),
        (struct.pack("<IQ", 8, 1) + text(b"")) * NESTED_LIMIT,
        array(b"s", 8, STRING_LIMIT - NESTED_LIMIT),
        chain * (STRING_LIMIT - NESTED_LIMIT),
        texts[1],
        text(name) + struct.pack("<IQIQ", 1, 8, 0, 32 * COUNT_LIMIT),
    ])  # fmt: skip
    sparse(path, prefix)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        index = GGUFIndex.read(path)
        seconds.append(time.process_time() - started)
    assert (len(index.tensors), len(index.metadata)) == (COUNT_LIMIT, COUNT_LIMIT)
    assert min(seconds) < 1
    del index
    tracemalloc.start()
    try:
        GGUFIndex.read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
