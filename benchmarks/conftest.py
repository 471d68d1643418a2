"""What the comparisons share: a table at the end, and the same in files, beside the machine and the versions.

``--save-results`` writes ``<benchmark>-<machine>-<date>.json``, and the rows alone as ``.csv``, after every row: a run
that is cut short leaves what it had measured, and a later one adds to it (:mod:`benchmarks.support.saving`). A module's
KEY names the columns that make two rows the same case; else it is the first column.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import qmm
from benchmarks.support.load import ADVICE
from benchmarks.support.saving import ResultsFile
from qmm.kernels.ops.cpu.parallel import available_cpus

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
ROWS = pytest.StashKey[dict[str, list[Row]]]()
ABOUT = pytest.StashKey[dict[str, Row]]()
SHOWN = pytest.StashKey[dict[str, tuple[str, ...]]]()
KEYS = pytest.StashKey[dict[str, tuple[str, ...]]]()
FILES = pytest.StashKey[dict[str, ResultsFile]]()
STARTED = pytest.StashKey[datetime.datetime]()
PACKAGES = ("qmm", "numpy", "numba", "llvmlite", "libggml-python", "gguf", "numba-cuda", "cuda-bindings")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        action="store_true",
        help="write each comparison's table to benchmarks/results/, with the machine, versions and date",
    )
    parser.addoption("--results-folder", type=Path, default=RESULTS, help="where --save-results writes instead")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}
    config.stash[ABOUT] = {}
    config.stash[SHOWN] = {}
    config.stash[KEYS] = {}
    config.stash[FILES] = {}
    config.stash[STARTED] = datetime.datetime.now(datetime.UTC)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to the table of the test's file; ``about`` goes to the head of its results file."""
    name, config = request.path.stem, request.config
    shown_columns, key = getattr(request.module, "SHOWN", ()), getattr(request.module, "KEY", ())

    def add(row: Row, **about: Any) -> None:
        config.stash[ROWS].setdefault(name, []).append(row)
        config.stash[ABOUT].setdefault(name, {}).update(about)
        config.stash[SHOWN][name] = shown_columns or tuple(row)
        config.stash[KEYS][name] = key or tuple(row)[:1]
        if config.getoption("--save-results"):
            save(name, config)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    for name, rows in config.stash[ROWS].items():
        terminalreporter.section(f"{name}: {cpu_model()}")
        for line in table(rows, config.stash[SHOWN][name]):
            terminalreporter.write_line(line)
        if any(row.get("disturbed") for row in rows):
            terminalreporter.write_line(ADVICE)
        if config.getoption("--save-results"):
            terminalreporter.write_line(save(name, config))


def table(rows: list[Row], names: Sequence[str]) -> list[str]:
    cells = [list(names), *([shown(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(name: str, config: pytest.Config) -> str:
    """Write a benchmark's rows so far, and say where to."""
    rows, about, date = config.stash[ROWS][name], config.stash[ABOUT][name], config.stash[STARTED]
    machine = {
        "cpu": cpu_model(),
        "cpus": available_cpus(),
        "load_average": os.getloadavg(),  # after the run: about that of the run itself, plus whatever else ran
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    head = {"date": date.isoformat("T", "seconds"), **machine, **about}
    if name not in config.stash[FILES]:
        model = re.sub(r"\W+", "-", str(about.get("gpu", cpu_model()))).strip("-").lower()
        folder, stem = Path(config.getoption("--results-folder")), f"{name}-{model}-{date:%Y-%m-%d}"
        config.stash[FILES][name] = ResultsFile.find(folder, stem, head)
    return config.stash[FILES][name].save(head, rows, config.stash[KEYS][name])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # qmm itself, where it is used from the tree
        return qmm.__version__ if package == "qmm" else None


def cpu_model() -> str:
    """The processor's name, with family and model where its name says little."""
    try:
        fields = dict(re.findall(r"(?m)^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text()))
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
