"""A small model on disk, and what may become of its file while it is in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf_files import random_blocks, write_gguf

import qmm

__all__ = ["CHANGES", "K", "LOSSES", "M", "Products", "is_mapped", "replace_file", "write_small_model"]

K, M = 256, 64


def write_small_model(path: Path, rng: np.random.Generator) -> None:
    """Two matrices, ``a`` and ``b``, of Q8_0."""
    write_gguf(path, {name: ("Q8_0", (M, K), random_blocks("Q8_0", (M, K), rng)) for name in ("a", "b")})
    os.utime(path, ns=(1, 1))  # a clock of some milliseconds may not tell two writes apart


class Products:
    """A dataset of products with ``a``, whose engine is made where the first one is asked for."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self.engine: qmm.Engine | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray:
        if self.engine is None:
            self.engine = qmm.Engine(self.path, "cpu")
        return self.engine.matmul("a", np.full(K, number, np.float32))

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None


def is_mapped(path: Path) -> bool:
    """Whether this process has a mapping of the file."""
    return f"{path}\n" in Path("/proc/self/maps").read_text()


def rewrite_file(path: Path) -> None:
    """Write one byte into it, and leave its size as it is."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")


def replace_file(path: Path) -> None:
    """Put another file of the same size and time in its place, whose weights are all zero."""
    other = path.with_name("other")
    whole = path.read_bytes()
    start = len(whole) - 2 * (M * K // 32) * 34
    other.write_bytes(whole[:start] + bytes(len(whole) - start))
    os.utime(other, ns=(1, 1))
    other.replace(path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, 5000), r"nbytes was \d+, is 5000"),
    "rewritten": (rewrite_file, r"mtime_ns was 1, is \d+"),
}
"""By what happens: how, and what the error says."""

LOSSES: dict[str, Callable[[Path], object]] = {"replaced": replace_file, "removed": Path.unlink}
"""What leaves the file as it is for those who have it open."""
