"""What the comparisons share: a table at the end, and the same in a file beside the machine and the versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import qmm
from qmm.kernels.cpu import available_cpus

Row = dict[str, Any]
ROWS = pytest.StashKey[dict[str, list[Row]]]()
ABOUT = pytest.StashKey[dict[str, Row]]()
PACKAGES = ("qmm", "numpy", "numba", "llvmlite", "libggml-python", "gguf", "numba-cuda", "cuda-bindings")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        action="store_true",
        help="write each comparison's table to benchmarks/results/, with the machine, versions and date",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}
    config.stash[ABOUT] = {}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to the table of the test's file; ``about`` goes to the head of its results file."""
    name = request.path.stem

    def add(row: Row, **about: Any) -> None:
        request.config.stash[ROWS].setdefault(name, []).append(row)
        request.config.stash[ABOUT].setdefault(name, {}).update(about)

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    for name, rows in config.stash[ROWS].items():
        terminalreporter.section(f"{name}: {cpu_model()}")
        for line in table(rows):
            terminalreporter.write_line(line)
        if config.getoption("--save-results"):
            terminalreporter.write_line(f"saved: {save(name, rows, config.stash[ABOUT][name])}")


def table(rows: list[Row]) -> list[str]:
    names = list(rows[0])
    cells = [names, *([shown(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(name: str, rows: list[Row], about: Row) -> Path:
    date = datetime.datetime.now(datetime.UTC)
    model = re.sub(r"\W+", "-", str(about.get("gpu", cpu_model()))).strip("-").lower()
    path = Path(__file__).parent / "results" / f"{name}-{model}-{date:%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    machine = {
        "cpu": cpu_model(),
        "cpus": available_cpus(),
        "load_average": os.getloadavg(),  # after the run: about that of the run itself, plus whatever else ran
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    everything = {"date": date.isoformat("T", "seconds"), **machine, **about, "rows": rows}
    path.write_text(json.dumps(everything, indent=1) + "\n")
    return path


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
