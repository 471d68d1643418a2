"""Building blocks of reports: tables and cells for people, plain values for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

__all__ = ["dimensions", "facts", "mark", "plain", "scientific", "shortened", "significant", "table", "worst"]


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


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, last_is_total: bool = False
) -> Table:
    """A table; a column whose header starts with ``>`` is set flush right."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        made.add_column(
            Text(column.removeprefix(">")), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    cells = [[Text(str(cell)) for cell in row] for row in rows]  # Text: a name with brackets is no markup
    for number, row in enumerate(cells):
        made.add_row(*row, end_section=last_is_total and number == len(cells) - 2)
    return made


def facts(*pairs: tuple[str, str]) -> Table:
    """Names and what is said of them, side by side."""
    made = Table.grid(padding=(0, 2))
    for name, value in pairs:
        made.add_row(Text(name, style="bold"), Text(value))
    return made


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
    """The largest of those that were measured, where not-a-number is worse than all; None if none was."""
    measured = [value for value in values if value is not None]
    if any(math.isnan(value) for value in measured):
        return math.nan
    return max(measured, default=None)
