"""The proven walk over string arrays against the plain one."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmm.loaders.gguf import strings
from qmm.loaders.gguf.strings import StringOverrunError, skip_strings


def chain(texts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(text)) + text for text in texts)


def plain_walk(data: bytes, position: int, count: int) -> int:
    for _ in range(count):
        position += 8 + int.from_bytes(data[position : position + 8], "little")
    return position


def skip(data: bytes, position: int, count: int) -> int:
    return skip_strings(lambda start, nbytes: data[start : start + nbytes], position, count, len(data))


# Zeros and small lengths are what headers are made of, so contents of these can imitate any number of them.
hostile = st.one_of(
    st.binary(max_size=12),
    st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 8, 9]), max_size=40).map(bytes),
    st.just(bytes(300)),
    st.integers(250, 600).map(lambda length: b"x" * length),
    st.lists(st.sampled_from([b"", b"a", b"\0"]), max_size=6).map(chain),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and windows so small that every branch and every seam between windows is met."""
    monkeypatch.setattr(strings, "PLAIN_STEPS", 3)
    monkeypatch.setattr(strings, "WINDOW_NBYTES", 128)


@settings(max_examples=500, deadline=None)
@given(texts=st.lists(hostile, max_size=80), before=st.binary(max_size=9), behind=st.binary(max_size=40))
def test_hostile_contents_end_where_the_plain_walk_ends(texts: list[bytes], before: bytes, behind: bytes) -> None:
    data = before + chain(texts) + behind
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strings, "PLAIN_STEPS", 3)
        patch.setattr(strings, "WINDOW_NBYTES", 128)
        assert skip(data, len(before), len(texts)) == len(data) - len(behind)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 60_000))
def test_many_strings_at_the_real_window_size(seed: int, count: int) -> None:
    sizes = random.Random(seed).choices([0, 1, 5, 20, 255, 256, 3000], [1, 200, 200, 200, 2, 1, 1], k=count)
    texts = [b"a" * size for size in sizes]
    data = chain(texts) + b"behind"
    assert skip(data, 0, count) == plain_walk(data, 0, count) == len(data) - len(b"behind")


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(hostile, min_size=1, max_size=40), cut=st.integers(1, 10_000))
def test_a_chain_cut_short_is_never_accepted(texts: list[bytes], cut: int) -> None:
    data = chain(texts)
    data = data[: -min(cut, len(data))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strings, "PLAIN_STEPS", 3)
        patch.setattr(strings, "WINDOW_NBYTES", 128)
        with pytest.raises(StringOverrunError):
            skip(data, 0, len(texts))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("length", [255, 256, 257, 65_535, 65_536])
def test_a_long_string_between_short_ones(length: int) -> None:
    data = chain([b"ab"] * 50 + [b"x" * length] + [b"cd"] * 50)
    assert skip(data, 0, 101) == len(data)


@pytest.mark.usefixtures("small")
def test_overrun_names_the_string_that_does_not_fit() -> None:
    data = chain([b"ab"] * 50) + struct.pack("<Q", 2**63) + b"rest"
    with pytest.raises(StringOverrunError) as caught:
        skip(data, 0, 60)
    assert (caught.value.position, caught.value.length) == (500, 2**63)


def test_no_strings_read_nothing() -> None:
    def read(start: int, nbytes: int) -> bytes:
        raise AssertionError

    assert skip_strings(read, 123, 0, 123) == 123


def test_a_short_array_reads_little_of_what_is_behind() -> None:
    asked: list[int] = []
    data = chain([b"abc"] * 4) + bytes(1 << 20)

    def read(start: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return data[start : start + nbytes]

    skip_strings(read, 0, 4, len(data))
    assert sum(asked) <= 4096
