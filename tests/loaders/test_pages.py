"""The arithmetic on pages, against counting byte by byte."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmm.loaders.access.pages import Span, covering_pages, cut, gaps

PAGE = 16  # small, so that everything meets everything

ranges = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 90)), max_size=12)
disjoint = st.lists(st.integers(0, 300), max_size=12, unique=True).map(
    lambda cuts: [Span(*pair) for pair in zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False)]
)


def units(spans: list[Span]) -> set[int]:
    return {byte for span in spans for byte in range(span.start, span.end)}


@given(ranges=ranges)
def test_covering_pages_are_exactly_the_pages_that_are_touched(ranges: list[tuple[int, int]]) -> None:
    spans = covering_pages(ranges, PAGE)
    touched = {byte // PAGE for offset, nbytes in ranges for byte in range(offset, offset + nbytes)}
    assert {byte // PAGE for byte in units(spans)} == touched
    assert all(span.start % PAGE == span.end % PAGE == 0 and span.nbytes > 0 for span in spans)
    assert all(left.end < right.start for left, right in itertools.pairwise(spans))


def test_two_tensors_in_one_page_and_in_neighbouring_pages_are_one_span() -> None:
    assert covering_pages([(5, 2), (9, 3)], PAGE) == [Span(0, 16)]
    assert covering_pages([(20, 2), (5, 2)], PAGE) == [Span(0, 32)]
    assert covering_pages([(5, 2), (40, 2)], PAGE) == [Span(0, 16), Span(32, 48)]


@pytest.mark.parametrize(
    ("offset", "nbytes", "span"), [(0, 16, (0, 16)), (15, 1, (0, 16)), (15, 2, (0, 32)), (16, 16, (16, 32))]
)
def test_page_boundaries(offset: int, nbytes: int, span: tuple[int, int]) -> None:
    assert covering_pages([(offset, nbytes)], PAGE) == [span]


@given(span=st.tuples(st.integers(0, 200), st.integers(1, 100)), taken=disjoint)
def test_gaps_are_exactly_what_is_not_taken(span: tuple[int, int], taken: list[Span]) -> None:
    wanted = Span(span[0], span[0] + span[1])
    missing = gaps(wanted, taken)
    assert units(missing) == units([wanted]) - units(taken)
    assert missing == sorted(missing)
    assert all(gap.nbytes > 0 for gap in missing)


@given(start=st.integers(0, 100), nbytes=st.integers(1, 200), limit=st.integers(1, 64))
def test_pieces_join_to_the_span_and_keep_the_limit(start: int, nbytes: int, limit: int) -> None:
    pieces = cut(Span(start, start + nbytes), limit)
    assert pieces[0].start == start
    assert pieces[-1].end == start + nbytes
    assert all(left.end == right.start for left, right in itertools.pairwise(pieces))
    assert all(piece.nbytes == limit for piece in pieces[:-1])
    assert 0 < pieces[-1].nbytes <= limit


def test_sizes_beyond_32_bits() -> None:
    terabyte = 1 << 40
    assert covering_pages([(terabyte - 1, 2)], 4096) == [Span(terabyte - 4096, terabyte + 4096)]
    assert [piece.nbytes for piece in cut(Span(0, terabyte + 4096), 256 << 30)] == [256 << 30] * 4 + [4096]
