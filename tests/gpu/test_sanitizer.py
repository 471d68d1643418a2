"""compute-sanitizer watches products over memory of exactly the tensor's size (tests/support/exact_products.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qmm.kernels.formats import FORMATS

PROGRAM = Path(__file__).parents[1] / "support" / "exact_products.py"
PRODUCTS = {name: 2 * (4 * (1 if block_format.plain else 2) + 1) for name, block_format in FORMATS.items()}
"""Two shapes, four numbers of columns, one or two kinds of activations; and a dequantization."""


def sanitizer() -> str:
    """Where it is: it comes with the CUDA toolkit, not with a package that qmm needs."""
    homes = [os.environ.get(name, "/usr/local/cuda") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.environ.get("PATH", ""), *[f"{home}/bin" for home in homes]]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    return found


def watched(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program under one of the sanitizer's tools; without it first, so that kernels are compiled."""
    found = sanitizer()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, str(PROGRAM), *arguments]
    alone = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert alone.returncode == 0, alone.stderr
    # The bindings ask the driver for functions that an older one has not, which memcheck would report as API errors.
    options = ["--tool", tool, "--error-exitcode", "9", *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
    command = [found, *options, *program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    print(done.stdout[-4000:], done.stderr[-2000:])
    return done


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_sanitizer_has_nothing_to_say(name: str, tool: str) -> None:
    done = watched(tool, name)
    assert done.returncode == 0
    assert f"{PRODUCTS[name]} products and dequantizations" in done.stdout
    summary = r"RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else r"ERROR SUMMARY: 0 errors"
    assert re.search(summary, done.stdout)


def test_the_sanitizer_sees_one_byte_too_much() -> None:
    done = watched("memcheck", "F16", "--beyond")
    assert done.returncode == 9
    assert "Invalid __global__ read of size 1 bytes" in done.stdout
