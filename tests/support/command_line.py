"""The command line as tests call it, and the file that they give it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files
import numpy as np
from typer.testing import CliRunner

from qmm.cli.app import app

__all__ = ["IQ1_S", "ROOT", "SHAPES", "Result", "invoke", "start", "write_three_tensors"]

ROOT = Path(__file__).resolve().parents[2]
IQ1_S = 19
"""A type without a kernel."""
SHAPES = {"up": ("Q8_0", (5, 96)), "down": ("Q4_K", (3, 512)), "norm": ("F32", (50,))}


class Result(SimpleNamespace):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Parse stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)


def invoke(*arguments: object) -> Result:
    """Call the command in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="qmm", env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(code=done.exit_code, out=done.stdout, err=done.stderr)


def start(*arguments: object, **environment: str) -> Result:
    """Call the command in a process of its own."""
    command = [sys.executable, "-m", "qmm", *map(str, arguments)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
    return Result(code=done.returncode, out=done.stdout, err=done.stderr)


def write_three_tensors(path: Path) -> None:
    """SHAPES, and one that has no kernel."""
    random = np.random.default_rng(3)
    tensors: dict[str, tuple[str | int, tuple[int, ...], bytes]] = {"exotic": (IQ1_S, (2, 256), bytes(100))}
    for name, (kind, shape) in SHAPES.items():
        tensors[name] = (kind, shape, gguf_files.random_blocks(kind, shape, random))
    metadata = {
        "general.architecture": "test",
        "general.name": "a [small] model",
        "test.tokens": ["a", "b", "c"],
        "test.eps": 1e-6,
    }
    gguf_files.write_gguf(path, tensors, metadata=metadata)
