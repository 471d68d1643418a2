"""``--save-results``: runs of one day go into one file; and rows that something else disturbed have no ratio."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from saved_results import HEAD as REPORT_HEAD
from saved_results import ROWS as REPORT_ROWS

from benchmarks.support import load, report
from benchmarks.support.load import ADVICE, LIMIT, Load
from benchmarks.support.saving import ResultsFile

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"date": "2031-02-03T04:05:06+00:00", "gpu": "Made-up 1", "driver": "999.1", "load_average": (1.0, 2.0, 3.0)}
LATER = HEAD | {"date": "2031-02-03T10:00:00+00:00", "load_average": (4.0, 5.0, 6.0)}


def row(name: str, us: float, **more: Any) -> dict[str, Any]:
    return {"id": name, "us": us, **more}


def save(folder: Path, head: dict[str, Any], *rows: dict[str, Any]) -> str:
    return ResultsFile.find(folder, "bench-x", head).save(head, rows, ("id",))


def read(folder: Path, name: str = "bench-x") -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    with (folder / f"{name}.csv").open(newline="") as file:
        assert [line["id"] for line in csv.DictReader(file)] == [row["id"] for row in document["rows"]]
    return document


def test_rows_of_a_later_run_replace_the_same_cases_and_leave_the_others(tmp_path: Path) -> None:
    save(tmp_path, HEAD, row("a", 1.0), row("b", 2.0))
    said = save(tmp_path, LATER, row("b", 3.0, disturbed=None), row("c", 4.0, disturbed="much"))
    document = read(tmp_path)
    assert [(row["id"], row["us"]) for row in document["rows"]] == [("a", 1.0), ("b", 3.0), ("c", 4.0)]
    assert document["date"] == LATER["date"]
    assert document["earlier"] == [{"date": HEAD["date"], "load_average": [1.0, 2.0, 3.0]}]
    assert "2 rows, 1 of them in place of earlier ones; 1 of 2031-02-03T04:05:06+00:00 kept" in said


def test_a_run_that_saves_after_every_row_keeps_what_was_there_before_it(tmp_path: Path) -> None:
    save(tmp_path, HEAD, row("a", 1.0), row("b", 2.0))
    file = ResultsFile.find(tmp_path, "bench-x", LATER)
    file.save(LATER, [row("b", 3.0)], ("id",))
    file.save(LATER, [row("b", 3.0), row("c", 4.0)], ("id",))
    document = read(tmp_path)
    assert [row["id"] for row in document["rows"]] == ["a", "b", "c"]
    assert len(document["earlier"]) == 1


def test_a_run_that_measures_everything_again_leaves_nothing_of_the_earlier_one(tmp_path: Path) -> None:
    save(tmp_path, HEAD, row("a", 1.0))
    save(tmp_path, LATER, row("a", 2.0))
    assert "earlier" not in read(tmp_path)
    assert [row["us"] for row in read(tmp_path)["rows"]] == [2.0]


@pytest.mark.parametrize("other", [{"driver": "1000.0"}, {"gpu": "Made-up 2"}, {"ggml": "1.2.3"}])
def test_another_machine_or_version_has_a_file_of_its_own(tmp_path: Path, other: dict[str, str]) -> None:
    save(tmp_path, HEAD, row("a", 1.0))
    said = save(tmp_path, LATER | other, row("b", 2.0))
    ((name, value),) = other.items()
    assert (
        f"bench-x-2.json: 1 rows; not put into bench-x.json (its {name} is {HEAD.get(name)!r}, not {value!r})" in said
    )
    assert [row["id"] for row in read(tmp_path)["rows"]] == ["a"]
    save(tmp_path, LATER | other, row("c", 3.0))
    assert [row["id"] for row in read(tmp_path, "bench-x-2")["rows"]] == ["b", "c"]
    assert not (tmp_path / "bench-x-3.json").exists()


def test_a_file_that_was_cut_short_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, HEAD, row("a", 1.0))
    (tmp_path / "bench-x.json").write_text('{"date": ')
    assert "bench-x-2.json" in save(tmp_path, LATER, row("b", 2.0))
    assert (tmp_path / "bench-x.json").read_text() == '{"date": '


BENCHMARK = """
import pytest

@pytest.mark.parametrize("name", ["first", "second"])
def test_case(name, record):
    record({"id": name, "us": 1.5, "disturbed": "waited for a CPU 50% of the time" if name == "second" else None})
"""


def test_two_runs_of_pytest_with_different_cases_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "bench_made_up.py").write_text(BENCHMARK)
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.conftest",
        "-c",
        "pytest.ini",
        "bench_made_up.py",
    ]
    command += ["--save-results", "--results-folder", "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = []
    for name in ("first", "second"):
        done = subprocess.run(
            [*command, "-k", name], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
    (path,) = (tmp_path / "out").glob("*.json")
    assert [row["id"] for row in json.loads(path.read_text())["rows"]] == ["first", "second"]
    assert ADVICE not in said[0]
    assert ADVICE in said[1]
    assert "1 rows, 0 of them in place of earlier ones; 1 of " in said[1]


# Disturbances ---------------------------------------------------------------------------------------------------------


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


counted = pytest.mark.skipif(load.waits() is None, reason="this kernel does not count waits (schedstat)")


@counted
def test_threads_that_wait_for_a_cpu_are_disturbed() -> None:
    """A process of its own and others beside it, all on one CPU."""
    cpu = min(os.sched_getaffinity(0))
    code = (
        f"import os, time; os.sched_setaffinity(0, {{{cpu}}}); print('on', flush=True); time.sleep(0)\nwhile True: pass"
    )
    others = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    found: list[Load] = []

    def measure() -> None:
        os.sched_setaffinity(0, {cpu})
        with Load() as measured:
            spin(0.3)
        found.append(measured)

    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        thread = threading.Thread(target=measure)  # the affinity is the thread's
        thread.start()
        thread.join()
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert found[0].waited is not None
    assert found[0].waited > 0.3
    assert found[0].disturbed == f"waited for a CPU {found[0].waited:.0%} of the time"


@counted
def test_a_thread_that_sleeps_waits_for_no_cpu() -> None:
    with Load() as measured:
        time.sleep(0.5)
    assert measured.waited is not None
    assert measured.waited < LIMIT
    assert measured.disturbed is None


def test_what_runs_between_rounds_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([0, 1, 100, 102])  # milliseconds: before, at the beginning and the end of the setup, after
    monkeypatch.setattr(load, "waits", lambda: {"1": next(counted) * 10**6})
    monkeypatch.setattr(load, "stolen_seconds", lambda: 0.0)
    with Load(2) as measured:
        time.sleep(0.02)
        measured.without(lambda: time.sleep(0.5))()
        time.sleep(0.02)
    assert measured.waited is not None
    assert 0.003 / (2 * 0.4) < measured.waited <= 0.003 / (2 * 0.04)


def test_where_the_kernel_does_not_count_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load.waits(tmp_path) is None
    assert load.stolen_seconds(tmp_path / "stat") == 0
    monkeypatch.setattr(load, "waits", lambda: None)
    with Load() as measured:
        spin(0.01)
    assert (measured.waited, measured.disturbed) == (None, None)


def test_what_the_hypervisor_took_counts(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    stat = tmp_path / "stat"
    stat.write_text(
        f"cpu  9 9 9 9 9 9 9 999 0 0\ncpu{cpu} 1 2 3 4 5 6 7 50 0 0\ncpu1000 1 2 3 4 5 6 7 90 0 0\nintr 5\n"
    )
    assert load.stolen_seconds(stat) == 50 / os.sysconf("SC_CLK_TCK")


DISTURBED = {"disturbed": "waited for a CPU 60% of the time", "x ggml": None, "% of peak": None}


def results(folder: Path, rows: list[dict[str, Any]], **head: Any) -> report.Results:
    path = folder / "bench_matvec-made-up-1.json"
    path.write_text(json.dumps({**REPORT_HEAD, **head, "rows": rows}))
    return report.Results.read(path)


def test_the_report_has_no_ratio_of_a_disturbed_row_and_says_why(tmp_path: Path) -> None:
    """ROWS[2] is the slowest of the main part, ROWS[3] grows most from one column to eight."""
    rows = [{**row, **DISTURBED} if number in (2, 3) else row for number, row in enumerate(REPORT_ROWS)]
    found = results(tmp_path, rows)
    text = report.section(found)
    assert "| Q8_0 | 40000x4096 | disturbed | disturbed | disturbed | disturbed | disturbed |" in text
    assert ADVICE in " ".join(text.split())
    assert "Q8_0-40000x4096" not in text.split("![GB/s")[0]  # no goal is judged by it
    assert ADVICE not in " ".join(report.section(results(tmp_path, REPORT_ROWS)).split())


def test_the_report_says_that_runs_were_put_together(tmp_path: Path) -> None:
    text = " ".join(report.section(results(tmp_path, REPORT_ROWS, earlier=[{"date": "2031-02-03"}])).split())
    assert "Rows of 2 runs of that day were put together" in text


def test_the_chart_marks_a_disturbed_row(tmp_path: Path) -> None:
    from benchmarks.support import chart

    class Axis:
        """What of matplotlib's axis the chart uses, which only the extra `bench` brings."""

        def __init__(self) -> None:
            self.heights: list[list[float]] = []
            self.texts: list[str] = []

        def bar(self, places: Any, heights: list[float], *rest: Any, **options: Any) -> None:
            self.heights.append(heights)

        def text(self, x: float, y: float, text: str, **options: Any) -> None:
            self.texts.append(text.strip())

        def __getattr__(self, name: str) -> Any:
            return lambda *rest, **options: None

    axis = Axis()
    chart.bars(axis, ["a", "b"], [REPORT_ROWS[0], {**REPORT_ROWS[2], **DISTURBED}])
    assert [heights[1] for heights in axis.heights] == [0, 0]
    assert all(heights[0] > 0 for heights in axis.heights)
    assert axis.texts == ["disturbed"]
