"""Python in a process of its own, for what may end a process."""

from __future__ import annotations

import subprocess
from pathlib import Path

from qmm.children import python

__all__ = ["command", "run_python"]


def command(code: str, *arguments: object) -> list[str]:
    """The command of a child that runs ``code`` with the modules of this process and ``sys.argv[1:]``."""
    return [*python(code), *map(str, arguments)]


def run_python(code: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``code`` and wait for its end; one that hangs is killed, and the test fails with its name."""
    return subprocess.run(
        command(code, *arguments), capture_output=True, text=True, timeout=timeout, check=False, cwd=Path.cwd()
    )
