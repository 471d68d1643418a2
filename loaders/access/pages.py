"""Arithmetic on byte ranges of a mapping: the pages that cover tensors, gaps between ranges, cutting. No CUDA here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Span", "covering_pages", "cut", "gaps"]


class Span(NamedTuple):
    """Bytes ``start`` (inclusive) to ``end`` (exclusive), counted from the first byte of the mapping."""

    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the span."""
        return self.end - self.start


def covering_pages(ranges: Iterable[tuple[int, int]], page_nbytes: int) -> list[Span]:
    """The whole pages under ``ranges``, each ``(offset, nbytes)``: ascending, disjoint, never touching.

    The last page of a file may reach past the file's last byte; a mapping does too (POSIX fills that page with zeros).
    Ranges of zero bytes take no page.
    """
    spans: list[Span] = []
    for offset, nbytes in sorted(ranges):
        if nbytes == 0:
            continue
        start = offset // page_nbytes * page_nbytes
        end = -(-(offset + nbytes) // page_nbytes) * page_nbytes
        if spans and start <= spans[-1].end:
            spans[-1] = Span(spans[-1].start, max(spans[-1].end, end))
        else:
            spans.append(Span(start, end))
    return spans


def gaps(span: Span, taken: Sequence[Span]) -> list[Span]:
    """The parts of ``span`` that no span of ``taken`` (ascending, disjoint) covers, ascending."""
    missing = []
    start = span.start
    for other in taken:
        if other.end <= start:
            continue
        if other.start >= span.end:
            break
        if other.start > start:
            missing.append(Span(start, other.start))
        start = other.end
    if start < span.end:
        missing.append(Span(start, span.end))
    return missing


def cut(span: Span, limit: int) -> list[Span]:
    """``span`` in consecutive pieces of at most ``limit`` bytes."""
    return [Span(start, min(start + limit, span.end)) for start in range(span.start, span.end, limit)]
