"""The tables of GPU figures in two READMEs and the chart are those of the newest results; and the report is true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from saved_results import HEAD, ROWS, row

from benchmarks.support import report

ROOT = Path(__file__).resolve().parents[2]


def test_pages_and_chart_are_those_of_the_newest_results() -> None:
    results = report.newest(ROOT / "benchmarks" / "results")
    if results is None:
        pytest.skip("no results of bench_matvec with a read peak are there yet")
    assert report.differences(results, ROOT) == []


def write(folder: Path, name: str = "bench_matvec-made-up-1", rows: list[Any] = ROWS, **head: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**HEAD, **head, "rows": rows}))
    return path


@pytest.fixture
def results(tmp_path: Path) -> report.Results:
    return report.Results.read(write(tmp_path))


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / page for page in report.PAGES]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    return paths


def with_chart(results: report.Results) -> Path:
    chart = results.path.parent / report.CHART
    chart.write_text(f"<svg><!-- sha256:{results.digest} --></svg>")
    return chart


def test_figures_of_the_goals(results: report.Results) -> None:
    found = {goal.what: goal.figure(results) for goal in report.GOALS}
    values = [None if figure is None else (round(figure[0], 6), figure[1]) for figure in found.values()]
    assert values == [
        (40.0, "Q8_0-40000x4096-n1-device"),  # and not Q2_K's 10: its tensor is small
        (2.0, "3 cases"),  # (2 * 0.5 * 8) ** (1 / 3)
        (0.5, "Q8_0-40000x4096-n1-device"),
        (round((2 * 0.996) ** 0.5, 6), "2 cases"),
        (0.996, "Q8_0-40000x4096-n8-device"),
        (2.5, "Q8_0-40000x4096-n8-device"),
        (round(100 * 40_000 / 1050 / 50, 6), "Q4_K-40000x4096-n8-mapped"),
        (0.05, "Q4_K-40000x4096-n8-mapped"),
        (1.1, "Q8_0-256x4096-n1-device"),
        (0.999, "F16-40000x4096-n2-device"),
    ]


@pytest.mark.parametrize(
    ("least", "most", "value", "met"),
    [
        (1.0, None, 1.0, True),
        (1.0, None, 0.9999, False),
        (None, 0.05, 0.05, True),
        (None, 0.05, 0.0501, False),
        (None, None, 1.0, None),
    ],
)
def test_goals_are_met_at_their_limits(least: float | None, most: float | None, value: float, met: bool | None) -> None:
    goal = report.Goal("speed", lambda _: (value, "here"), least, most)
    assert goal.met(value) is met


def test_a_goal_that_is_missed_by_little_is_not_rounded_to_its_limit(results: report.Results) -> None:
    least = report.Goal("speed", lambda _: (0.99996, "here"), least=1.0)
    assert least.cells(results) == ["speed", "at least 1", "0.999", "here", "**no**"]
    most = report.Goal("change", lambda _: (0.05001, "here"), most=0.05)
    assert most.cells(results) == ["change", "at most 0.05", "0.051", "here", "**no**"]


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    results = report.Results.read(write(tmp_path, rows=ROWS[:1], ggml=None, ggml_missing="nobody built it"))
    assert "no ggml (nobody built it)" in " ".join(report.section(results).split())
    assert [goal.cells(results)[-1] for goal in report.GOALS].count("not measured") == 7


def test_what_plans_gain_is_said_where_it_was_measured(tmp_path: Path, results: report.Results) -> None:
    assert "plan" not in report.introduction(results)
    rows = [ROWS[0] | {"alone us": 550.0}, ROWS[1] | {"alone us": 1584.0}, ROWS[5]]  # 1.1 and 1.98
    text = report.introduction(report.Results.read(write(tmp_path, rows=rows)))
    assert "take 1.475 times as long (geometric mean of 2 cases)" in " ".join(text.split())


def test_rows_without_ggml_have_no_ratio(tmp_path: Path) -> None:
    rows = [row("main", "Q4_K", 40_000, n, 500.0, None) for n in (1, 8)]
    text = report.section(report.Results.read(write(tmp_path, rows=rows)))
    assert "| Q4_K | 40000x4096 | 80 | 80 % | 80 | - | - |" in text


def test_table_shows_what_is_slower(results: report.Results) -> None:
    lines = report.section(results).splitlines()
    assert "| Q4_K | 40000x4096 | 80 | 80 % | 50 | 2.00 | 2.00 |" in lines
    assert "| Q8_0 | 40000x4096 | 40 | 40 % | 16 | **0.50** | **0.99** |" in lines  # 0.996 is not 1.00
    assert "| Q2_K | 10000x4096 | 10 | 10 % | - | 8.00 | - |" in lines
    assert "| Q4_K | 40000x4096 | 40.0 | 80 % | 38.1 | 76 % | 60.0 |" in lines


def test_newest_results_of_the_present_form_are_taken(tmp_path: Path) -> None:
    assert report.newest(tmp_path) is None
    old = write(tmp_path, "bench_matvec-zzz", date="2031-02-05T00:00:00+00:00")
    document = json.loads(old.read_text())
    del document["read_peak"]
    old.write_text(json.dumps(document))
    assert report.newest(tmp_path) is None
    write(tmp_path, "bench_matvec-b", date="2031-02-03T00:00:00+00:00")
    latest = write(tmp_path, "bench_matvec-a", date="2031-02-04T00:00:00+00:00")
    found = report.newest(tmp_path)
    assert found is not None
    assert found.path == latest


def test_check_finds_a_changed_figure_and_a_chart_of_other_results(
    results: report.Results, pages: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--check", "--results", str(results.path.parent), "--root", str(tmp_path)]
    chart = with_chart(results)
    assert report.main(arguments) == 1
    for path, text in zip(pages, report.PAGES.values(), strict=True):
        path.write_text(report.with_section(path.read_text(), text(results)))
        assert path.read_text().startswith("before\n")
        assert path.read_text().endswith("\nafter\n")
    assert report.main(arguments) == 0

    for path in pages:
        good = path.read_text()
        path.write_text(good.replace("| 80 % |", "| 81 % |", 1))
        assert report.main(arguments) == 1
        path.write_text(good)
    assert report.main(arguments) == 0
    chart.write_text(chart.read_text().replace(results.digest[:8], "00000000"))
    assert report.main(arguments) == 1
    with_chart(results)
    rows = [ROWS[0] | {"GB/s": 81.0}, *ROWS[1:]]
    write(results.path.parent, rows=rows)
    capsys.readouterr()
    assert report.main(arguments) == 1
    assert capsys.readouterr().out.splitlines() == [
        "README.md's section is not that of bench_matvec-made-up-1.json",
        "benchmarks/README.md's section is not that of bench_matvec-made-up-1.json",
        "bench_matvec.svg is not that of bench_matvec-made-up-1.json",
    ]


def test_a_page_must_have_the_markers_once(results: report.Results) -> None:
    for markdown in ("none", f"{report.BEGIN}\n{report.END}\n{report.BEGIN}\n{report.END}"):
        with pytest.raises(ValueError, match="must have one line"):
            report.with_section(markdown, report.section(results))
    for page, text in report.PAGES.items():
        report.with_section((ROOT / page).read_text(encoding="utf-8"), text(results))


def test_the_summary_has_the_shapes_of_both_placements(tmp_path: Path, results: report.Results) -> None:
    text = report.summary(results)
    assert text.splitlines()[-1] == "| Q4_K | 40000x4096 | 80 | 80 % | 2.00 | 2.00 | 40 | 60 |"
    said = " ".join(text.split())
    assert "2.00 times as fast as ggml with one column and 1.41 times with two to eight" in said
    assert "the worst of all cases is 0.50 (Q8_0-40000x4096-n1-device)" in said
    alone = [row("main", "Q4_K", 40_000, 1, 500.0, None), row("mapped", "Q8_0", 40_000, 1, 1000.0, None, 50.0)]
    text = report.summary(report.Results.read(write(tmp_path, rows=alone, ggml=None, ggml_missing="nobody built it")))
    assert text.splitlines()[-1] == "| Q8_0 | 40000x4096 | - | - | - | - | 40 | 60 |"
    assert "no ggml (nobody built it)" in " ".join(text.split())
    assert "as fast as" not in text


def test_digest_is_of_the_whole_file(results: report.Results) -> None:
    results.path.write_text(results.path.read_text() + " ")
    changed = report.Results.read(results.path)
    assert changed.digest != results.digest
    assert dataclasses.replace(changed, digest=results.digest) == results
