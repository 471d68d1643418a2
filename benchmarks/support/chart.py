"""The chart of ``benchmarks.support.report``: GB/s by type and shape, qmm's and ggml's, against the read peak of the
run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.support.report import Results, Row

__all__ = ["draw"]

SIDES = (("qmm", "GB/s", "#1f6f8b"), ("ggml", "ggml GB/s", "#c9a66b"))
PEAK = "#b03a2e"


def draw(results: Results, path: Path) -> None:
    """Writes the chart as SVG; equal results give equal bytes. It carries their digest."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "qmm", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = pyplot.subplots(3, 1, figsize=(10, 9), layout="constrained")
        for axis, n in zip(axes, (1, 8), strict=False):
            rows = results.of("main", [n])
            bars(axis, [f"{row['type']}\n{row['m']}x{row['k']}" for row in rows], rows)
            axis.set_title(f"device memory, n = {n}: {results.head['gpu']}")
        rows = results.of("mapped")
        bars(axes[2], [f"{row['type']}\nn = {row['n']}" for row in rows], rows)
        axes[2].set_title("mapped memory, 14336x4096")
        metadata = {"Date": None, "Description": f"{results.path.name} sha256:{results.digest}"}
        figure.savefig(path, format="svg", metadata=metadata)
        pyplot.close(figure)
    # Without spaces at the ends of lines, which matplotlib leaves in paths.
    path.write_text("\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n")


def bars(axis: Any, labels: Sequence[str], rows: Sequence[Row]) -> None:
    """A bar of each side that was measured, and the peak as a line over each case."""
    sides = [side for side in SIDES if any(row[side[1]] is not None for row in rows)]
    width = 0.8 / max(1, len(sides))
    for number, (name, column, colour) in enumerate(sides):
        places = [i + (number - (len(sides) - 1) / 2) * width for i in range(len(rows))]
        heights = [0 if row.get("disturbed") else row[column] or 0 for row in rows]
        axis.bar(places, heights, width, label=name, color=colour)
    for i, row in enumerate(rows):
        label = "read peak, same run" if i == 0 else None
        if row.get("disturbed"):
            axis.text(i, 0, " disturbed", rotation=90, ha="center", va="bottom", fontsize=6, color=PEAK)
        axis.hlines(row["peak GB/s"], i - 0.45, i + 0.45, color=PEAK, linewidth=1.2, label=label)
    axis.set_xticks(range(len(rows)), labels, rotation=90 if len(rows) > 12 else 0, fontsize=6)
    axis.set_ylabel("GB/s")
    if rows:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    axis.margins(x=0.01)
