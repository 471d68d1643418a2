"""What ``bench_matvec`` found: README's short table, all of it in ``benchmarks/README.md``, and a chart.

    python -m benchmarks.support.report            # rewrites what is between the markers of both, and the chart
    python -m benchmarks.support.report --check    # only says whether they are those of the newest results

All are made from the newest ``bench_matvec-*.json`` in ``benchmarks/results/`` and from nothing else;
``tests/bench/test_report.py`` holds them to it. Ratios and per cent are rounded down, so that nothing is shown as equal
that is slower. The chart needs matplotlib, which the extra ``bench`` brings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.load import ADVICE

__all__ = ["BEGIN", "END", "GOALS", "PAGES", "Goal", "Results", "main", "newest", "section", "summary", "with_section"]

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
CHART = "bench_matvec.svg"
LARGE_NBYTES = 30e6

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """One results file: its head, its rows, and the digest by which the chart names it."""

    path: Path
    head: dict[str, Any]
    rows: list[Row]
    digest: str

    @classmethod
    def read(cls, path: Path) -> Results:
        data = path.read_bytes()
        head = json.loads(data)
        return cls(path, head, head.pop("rows"), hashlib.sha256(data).hexdigest())

    def of(self, part: str, n: Iterable[int] = (1, 2, 4, 8)) -> list[Row]:
        """The rows of a part, in order, with one of these numbers of columns."""
        return [row for row in self.rows if row["part"] == part and row["n"] in n]

    def by_weight(self, part: str) -> dict[tuple[str, int, int], dict[int, Row]]:
        """A part's rows by type, ``m`` and ``k``, and then by number of columns."""
        found: dict[tuple[str, int, int], dict[int, Row]] = {}
        for row in self.of(part):
            found.setdefault((row["type"], row["m"], row["k"]), {})[row["n"]] = row
        return found


def newest(folder: Path) -> Results | None:
    """The latest results that have a read peak; older files had none."""
    read = [Results.read(path) for path in sorted(folder.glob("bench_matvec-*.json"))]
    return max((results for results in read if "read_peak" in results.head), key=date_of, default=None)


def date_of(results: Results) -> str:
    return str(results.head["date"])


# Goals ----------------------------------------------------------------------------------------------------------------

Figure = tuple[float, str]
"""A number, and the case that it comes from."""


@dataclass(frozen=True)
class Goal:
    """What is aimed at: ``figure`` finds the number and its case, None where that was not measured."""

    what: str
    figure: Callable[[Results], Figure | None]
    least: float | None = None
    most: float | None = None
    unit: str = ""

    def met(self, value: float) -> bool | None:
        """Whether the number is within the limits; None where there is no limit."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def cells(self, results: Results) -> list[str]:
        """The goal's line of the table."""
        limit = "-"
        if self.least is not None:
            limit = f"at least {self.least:g}{self.unit}"
        elif self.most is not None:
            limit = f"at most {self.most:g}{self.unit}"
        found = self.figure(results)
        if found is None:
            return [self.what, limit, "-", "-", "not measured"]
        value, where = found
        met = {True: "yes", False: "**no**", None: "-"}[self.met(value)]
        rounded = up(value, 3) if self.most is not None else down(value, 1 if self.unit == " %" else 3)
        return [self.what, limit, f"{rounded}{self.unit}", where, met]


def of_column(rows: Sequence[Row], column: str) -> list[Figure]:
    return [(row[column], row["id"]) for row in rows if row[column] is not None]


def geometric_mean(rows: Sequence[Row], column: str) -> Figure | None:
    figures = of_column(rows, column)
    if not figures:
        return None
    return statistics.geometric_mean([value for value, _ in figures]), f"{len(figures)} cases"


def undisturbed(rows: Iterable[Row]) -> list[Row]:
    """Those not disturbed while they were timed (:mod:`benchmarks.support.load`); earlier results did not ask."""
    return [row for row in rows if not row.get("disturbed")]


def growth(results: Results, part: str) -> list[Figure]:
    """Time with eight columns in parts of that with one, by weight."""
    weights = ({row["n"]: row for row in undisturbed(rows.values())} for rows in results.by_weight(part).values())
    return [(rows[8]["qmm us"] / rows[1]["qmm us"], rows[8]["id"]) for rows in weights if {1, 8} <= set(rows)]


def peak_of_large(results: Results) -> Figure | None:
    rows = [row for row in results.of("main", [1]) if row["bytes"] >= LARGE_NBYTES]
    return min(of_column(rows, "% of peak"), default=None)


def worst(part: str, n: Iterable[int], column: str = "x ggml") -> Callable[[Results], Figure | None]:
    return lambda results: min(of_column(results.of(part, n), column), default=None)


def mean(part: str, n: Iterable[int]) -> Callable[[Results], Figure | None]:
    return lambda results: geometric_mean(results.of(part, n), "x ggml")


def mapped_change(results: Results) -> Figure | None:
    return max(((abs(ratio - 1), where) for ratio, where in growth(results, "mapped")), default=None)


ALL, SEVERAL = (1, 2, 4, 8), (2, 4, 8)
GOALS = (
    Goal("device, n = 1, tensors of 30 MB or more: part of the read peak, least", peak_of_large, unit=" %", least=80),
    Goal("device, n = 1: speed in parts of ggml's, geometric mean", mean("main", [1]), least=1.6),
    Goal("device, n = 1: the same, least", worst("main", [1]), least=1),
    Goal("device, n = 2, 4, 8: speed in parts of ggml's, geometric mean", mean("main", SEVERAL), least=1.8),
    Goal("device, n = 2, 4, 8: the same, least", worst("main", SEVERAL), least=1),
    Goal(
        "device: time with n = 8 in parts of that with n = 1, most",
        lambda r: max(growth(r, "main"), default=None),
        most=1.5,
    ),
    Goal("mapped: part of what a kernel can read, least", worst("mapped", ALL, "% of peak"), unit=" %", least=97),
    Goal("mapped: change of time from n = 1 to n = 8, most", mapped_change, most=0.03),
    Goal("small tensors: speed in parts of ggml's, least", worst("small", ALL), least=1),
    Goal("other types: speed in parts of ggml's, least", worst("other", ALL), least=1),
)


# The section ----------------------------------------------------------------------------------------------------------


def down(value: float, digits: int) -> str:
    """Rounded down; the last digit of a number that is stored exactly stays."""
    scale = 10**digits
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def up(value: float, digits: int) -> str:
    scale = 10**digits
    return f"{math.ceil(value * scale - 1e-9) / scale:.{digits}f}"


def whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def ratio(value: float | None) -> str:
    """Parts of ggml's speed; bold where qmm is slower."""
    if value is None:
        return "-"
    return f"**{down(value, 2)}**" if value < 1 else down(value, 2)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def cell(rows: dict[int, Row], n: int, column: str, show: Callable[[float | None], str] = whole) -> str:
    if n not in rows:
        return "-"
    return "disturbed" if rows[n].get("disturbed") else show(rows[n][column])


def percent(value: float | None) -> str:
    return "-" if value is None else f"{down(value, 0)} %"


def device_table(results: Results, part: str) -> list[str]:
    columns = [n for n in ALL if results.of(part, [n])]
    header = ["type", "m x k", "GB/s, n = 1", "of the peak", "GB/s, n = 8", *[f"x ggml, n = {n}" for n in columns]]
    lines = [
        [
            name,
            f"{m}x{k}",
            cell(rows, 1, "GB/s"),
            cell(rows, 1, "% of peak", percent),
            cell(rows, 8, "GB/s"),
            *[cell(rows, n, "x ggml", ratio) for n in columns],
        ]
        for (name, m, k), rows in results.by_weight(part).items()
    ]
    return table(header, lines)


def mapped_table(results: Results) -> list[str]:
    header = ["type", "m x k", "GB/s, n = 1", "of the peak", "GB/s, n = 8", "of the peak", "copy engine, GB/s"]

    def tenths(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [
        [
            name,
            f"{m}x{k}",
            *[shown for n in (1, 8) for shown in (cell(rows, n, "GB/s", tenths), cell(rows, n, "% of peak", percent))],
            cell(rows, 1, "copy engine GB/s", tenths),
        ]
        for (name, m, k), rows in results.by_weight("mapped").items()
    ]
    return table(header, lines)


def of_plans(results: Results) -> str:
    """What a plan's products gain by knowing what comes next; nothing where that was not measured."""
    rows = undisturbed(results.rows)
    gains = [row["alone us"] / row["qmm us"] for row in rows if row.get("alone us") is not None]
    if not gains:
        return ""
    gain = down(statistics.geometric_mean(gains), 3)
    return (
        "qmm's products are those of a plan, each of which brings some of the next one's weights into L2; products "
        f"that know nothing of each other take {gain} times as long (geometric mean of {len(gains)} cases). "
    )


def introduction(results: Results) -> str:
    head = results.head
    name = f"benchmarks/results/{results.path.name}"
    beside = f"ggml {head['ggml']}" if head["ggml"] else f"no ggml ({head['ggml_missing']})"
    text = (
        f"**On a GPU** (`bench_matvec`, {head['gpu']}, driver {head['driver']}, {head['date'][:10]}, qmm {head['qmm']} "
        f"beside {beside}; the file is `{name}`). Times are medians of device time from replays of "
        "CUDA graphs, the two sides by turns in one process, weights rotated so that no cache holds them, "
        f"the quantization of the activations included. {of_plans(results)}"
        "GB/s are weight bytes over time. The peak is what a kernel that "
        f"only reads reached in the same run: {head['read_peak']['GB/s']:.0f} GB/s of device memory, and for `mapped` "
        "the same kernel on the same pages, by turns. `x ggml` is ggml's time over qmm's: above 1 qmm is the faster, "
        "and what is below 1 is **bold**. Ratios are rounded to the worse side."
    )
    if results.head.get("earlier"):
        text += (
            f" Rows of {len(results.head['earlier']) + 1} runs of that day were put together, each in parts of the "
            "peak of its own run; the one named is the last run's."
        )
    if len(undisturbed(results.rows)) < len(results.rows):
        text += f" {ADVICE}"
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def section(results: Results) -> str:
    """Markdown, from one marker to the other, without them."""
    lines = [introduction(results), ""]
    lines += table(["figure", "goal", "reached", "case", "met"], [goal.cells(results) for goal in GOALS])
    lines += ["", f"![GB/s by type and shape, beside the measured peak](results/{CHART})"]
    for title, body in (
        ("Device memory:", device_table(results, "main")),
        ("Mapped memory, where ggml's CUDA backend multiplies by nothing:", mapped_table(results)),
        ("Small tensors, of Gemma 3 270M and Qwen 2.5 0.5B:", device_table(results, "small")),
        ("Other types:", device_table(results, "other")),
    ):
        if len(body) > 2:
            lines += ["", title, "", *body]
    return "\n".join(lines) + "\n"


def summary(results: Results) -> str:
    """Markdown of what README has of it: the shapes that were measured in both placements."""
    head = results.head
    beside = f"ggml {head['ggml']}" if head["ggml"] else f"no ggml ({head['ggml_missing']})"
    text = (
        f"On an {head['gpu']} (driver {head['driver']}, {head['date'][:10]}, qmm {head['qmm']} beside {beside}), "
        "device time of a product, the quantization of the activations included, weights cold in L2. GB/s are weight "
        "bytes over time with one column; *of the peak* is their share of the rate that a read-only kernel reaches in "
        "the same run; *x ggml* is ggml's time divided by qmm's: above 1 qmm is faster. The copy engine reads the same "
        "mapped pages."
    )
    one, several = (mean("main", n)(results) for n in ([1], SEVERAL))
    least = min((found for part in ("main", "small", "other") if (found := worst(part, ALL)(results))), default=None)
    if one and several and least:
        text += (
            f" Over all large tensors qmm is {down(one[0], 2)} times as fast as ggml with one column and "
            f"{down(several[0], 2)} times with two to eight (geometric means); the worst of all cases is "
            f"{down(least[0], 2)} ({least[1]})."
        )
    device = results.by_weight("main")
    mapped = results.by_weight("mapped")
    header = ["type", "m x k", "device, GB/s", "of the peak", "x ggml, n = 1", "n = 8", "mapped, GB/s", "copy engine"]
    lines = [
        [
            weight[0],
            f"{weight[1]}x{weight[2]}",
            cell(device.get(weight, {}), 1, "GB/s"),
            cell(device.get(weight, {}), 1, "% of peak", percent),
            *[cell(device.get(weight, {}), n, "x ggml", ratio) for n in (1, 8)],
            cell(rows, 1, "GB/s"),
            cell(rows, 1, "copy engine GB/s"),
        ]
        for weight, rows in mapped.items()
    ]
    chart = f"![GB/s by type and shape, beside the measured peak](benchmarks/results/{CHART})"
    filled = textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)
    return "\n".join([filled, "", chart, "", *table(header, lines)]) + "\n"


PAGES = {"README.md": summary, "benchmarks/README.md": section}
"""The text between the markers of each page."""


def with_section(markdown: str, text: str) -> str:
    """A page with another text between the markers."""
    if markdown.count(BEGIN) != 1 or markdown.count(END) != 1:
        raise ValueError(f"the page must have one line {BEGIN} and one line {END}")
    before, rest = markdown.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def differences(results: Results, root: Path) -> list[str]:
    """What is not as the results have it, of the pages below ``root`` and of the chart."""
    found = []
    for page, text in PAGES.items():
        markdown = (root / page).read_text(encoding="utf-8")
        if with_section(markdown, text(results)) != markdown:
            found.append(f"{page}'s section is not that of {results.path.name}")
    chart = results.path.parent / CHART
    if not chart.exists() or results.digest not in chart.read_text(encoding="utf-8"):
        found.append(f"{chart.name} is not that of {results.path.name}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is out of date")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="the results' folder")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that the pages are in")
    options = parser.parse_args(arguments)
    results = newest(options.results)
    if results is None:
        print(f"{options.results} has no results of bench_matvec with a read peak", file=sys.stderr)
        return 1
    if options.check:
        found = differences(results, options.root)
        print("\n".join(found) or f"as in {results.path.name}")
        return 1 if found else 0
    from benchmarks.support import chart

    chart.draw(results, results.path.parent / CHART)
    for page, text in PAGES.items():
        path = options.root / page
        path.write_text(with_section(path.read_text(encoding="utf-8"), text(results)), encoding="utf-8")
    print(f"written from {results.path.name}: {', '.join(PAGES)}, {results.path.parent / CHART}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
