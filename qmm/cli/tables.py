"""Building blocks of reports: tables and cells for people, plain values for JSON.

A report is shown as blocks: tables, facts, and sentences, which are plain ``str``. Each becomes lines for a terminal of
so many columns, or, without a terminal (``width`` None), lines that are only aligned. Rich's
tables would take 4 to 8 s for the 10,000 tensors of a large model, and break numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len, chop_cells

from qmm.output import printable

__all__ = [
    "Block",
    "Facts",
    "Table",
    "dimensions",
    "lines_of",
    "mark",
    "plain",
    "scientific",
    "shortened",
    "significant",
    "worst",
]

GAP = "  "
NARROWEST = 12
"""Columns that a column of texts is given at least; where there are fewer, a table becomes a list."""
ALIGNED = 64
"""Where there is no terminal, texts are aligned up to this length: a longer one does not widen every row."""
WORDS = re.compile(r"`[^`]*`\S*|\S+")
"""The pieces that lines break between: words; a command in backquotes is one."""

NUMBER = re.compile("[0-9.,e+-]+")
PARTS = re.compile(r"[^._/-]*[._/-]+|[^._/-]+")
"""The pieces that an overlong word breaks between."""


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses become objects, NumPy's numbers and arrays Python's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@dataclass(frozen=True)
class Table:
    """Rows under a title. A column whose header starts with ``>`` is set flush right, as numbers are; one with ``~``
    holds texts, which may be broken where room is short. No other cell is."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    last_is_total: bool = False

    def lines(self, width: int | None) -> Iterator[str]:
        """The table; as a list, where its columns would not fit side by side."""
        if self.title:
            yield from _folded(printable(self.title), width)
        heads = [column.lstrip(">~") for column in self.columns]
        rows = [[printable(str(cell)) for cell in row] for row in self.rows]
        columns = list(zip(heads, *rows, strict=True))
        widths = self._widths(columns, width)
        if widths is None:
            yield from self._list(heads, rows, width or 0)
            return
        yield from self._row(heads, widths, width)
        rule = "-" * (sum(widths) + len(GAP) * (len(widths) - 1))
        if width is not None:
            yield rule
        for number, row in enumerate(rows):
            if self.last_is_total and width is not None and number == len(rows) - 1:
                yield rule
            yield from self._row(row, widths, width)

    def _widths(self, columns: Sequence[Sequence[str]], width: int | None) -> list[int] | None:
        """Each column's cells; columns of texts get what the others leave. None if that is too little."""
        natural = [max(map(_cells, column)) for column in columns]
        texts = [index for index, column in enumerate(self.columns) if column.startswith("~")]
        if width is None:
            return [min(cells, ALIGNED) if index in texts else cells for index, cells in enumerate(natural)]
        room = width - len(GAP) * (len(natural) - 1) - sum(natural)
        limit = max((natural[index] for index in texts), default=0)
        least = {} if room >= 0 else {index: _longest_number(columns[index]) for index in texts}
        while room < 0 and limit > NARROWEST:
            limit -= 1
            for index in texts:
                if natural[index] > max(limit, least[index]):
                    natural[index] -= 1
                    room += 1
        return natural if room >= 0 else None

    def _row(self, cells: Sequence[str], widths: list[int], width: int | None) -> Iterator[str]:
        """One row, on as many lines as its longest text takes."""
        if width is None or all(_cells(cell) <= room for cell, room in zip(cells, widths, strict=True)):
            yield self._line(cells, widths)
            return
        parts = [_folded(cell, room, break_words=True) for cell, room in zip(cells, widths, strict=True)]
        for line in itertools.zip_longest(*parts, fillvalue=""):
            yield self._line(line, widths)

    def _line(self, cells: Sequence[str], widths: list[int]) -> str:
        padded = [
            " " * (room - _cells(cell)) + cell if column.startswith(">") else cell + " " * (room - _cells(cell))
            for cell, room, column in zip(cells, widths, self.columns, strict=True)
        ]
        return GAP.join(padded).rstrip()

    def _list(self, heads: list[str], rows: list[list[str]], width: int) -> Iterator[str]:
        """Each row's first cell, and below it the others with their headers; what does not fit a line is a text."""
        for first, *others in rows:
            yield from _folded(first, width, break_words=True)
            named = [f"{head}: {cell}" for head, cell in zip(heads[1:], others, strict=True) if cell]
            parts = [_folded(cell, width - 4, break_words=True) for cell in named]
            for cell in parts[:-1]:
                cell[-1] += ","
            yield from (GAP + line for line in _joined(itertools.chain(*parts), width - 2))


@dataclass(frozen=True)
class Facts:
    """Names and their values, side by side."""

    pairs: Sequence[tuple[str, str]]

    def lines(self, width: int | None) -> Iterator[str]:
        """One fact a line, or more where it does not fit."""
        indent = max((_cells(name) for name, _ in self.pairs), default=0) + len(GAP)
        for name, value in self.pairs:
            label = name.ljust(indent)
            for line in _folded(printable(value), None if width is None else width - indent):
                yield f"{label}{line}".rstrip()
                label = " " * indent


Block = Table | Facts | str


def lines_of(blocks: Iterable[Block], width: int | None) -> Iterator[str]:
    """Blocks as lines of at most ``width`` columns, an empty line between them."""
    for number, block in enumerate(blocks):
        if number:
            yield ""
        yield from _folded(printable(block), width) if isinstance(block, str) else block.lines(width)


def _cells(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _longest_number(cells: Iterable[str]) -> int:
    return max((len(cell) for cell in cells if NUMBER.fullmatch(cell)), default=0)


def _folded(text: str, width: int | None, break_words: bool = False) -> list[str]:
    """Lines of at most ``width`` cells. Longer words stay whole, so that they can be copied, or are broken too."""
    if width is None or _cells(text) <= width:
        return [text]
    words = [str(word) for word in WORDS.findall(text)]
    if break_words:
        words = [part for word in words for part in _broken(word, width)]
    return _joined(words, width)


def _broken(word: str, width: int) -> list[str]:
    """Pieces of at most ``width`` cells; they end behind a dot, a slash or the like where there is one."""
    if _cells(word) <= width:
        return [word]
    pieces = [""]
    for part in PARTS.findall(word):
        if _cells(pieces[-1]) + _cells(part) <= width:
            pieces[-1] += part
        else:
            pieces.extend(chop_cells(part, width))
    return [piece for piece in pieces if piece]


def _joined(words: Iterable[str], width: int) -> list[str]:
    lines = [""]
    for word in words:
        if not lines[-1]:
            lines[-1] = word
        elif _cells(lines[-1]) + 1 + _cells(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def dimensions(shape: Sequence[int]) -> str:
    """``2048x640``."""
    return "x".join(map(str, shape))


def mark(value: bool | None) -> str:
    """yes, no, or a dash for what was not asked."""
    return "-" if value is None else "yes" if value else "NO"


def significant(value: float | None) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return "-"
    if not math.isfinite(value) or value == 0:
        return str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def scientific(value: float | None) -> str:
    """Two digits and an exponent."""
    return "-" if value is None else f"{value:.1e}"


def shortened(value: object, limit: int = 60) -> str:
    """A metadata value on one line."""
    text = f"{value:.9g}" if isinstance(value, float) else " ".join(str(plain(value)).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def worst(values: Iterable[float | None]) -> float | None:
    """The largest measured value, NaN above all; None if there is none."""
    measured = [value for value in values if value is not None]
    if any(math.isnan(value) for value in measured):
        return math.nan
    return max(measured, default=None)
