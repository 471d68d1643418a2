"""The comparison of two checkouts by turns, on the CPU: this one, and one that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def turns(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.turns", *map(str, arguments), "--turns", "1", "--rounds", "3"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_two_checkouts_take_turns() -> None:
    done = turns(ROOT)
    assert done.returncode == 0, done.stderr
    head, row = done.stdout.splitlines()
    assert head.split()[-3:] == ["other", "here", "difference"]
    other, here, difference = map(float, re.fullmatch(r"matmul, NumPy +(\S+) +(\S+) +(\S+)", row).groups())  # type: ignore[union-attr]
    assert other > 0
    assert here > 0
    assert abs(here - other - difference) < 0.011


def test_what_is_no_checkout_is_an_error(tmp_path: Path) -> None:
    done = turns(tmp_path)
    assert done.returncode == 1
    assert f"not from {tmp_path}, which is no checkout" in done.stderr
