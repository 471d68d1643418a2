"""What making a file readable by the GPU costs: registering its mapping, and the memory that this takes.

Run: pytest benchmarks/bench_registration.py (needs a GPU). The file is 1 GiB in a warm page cache.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import qmm
from qmm.loaders import FileMapping, HostRegistration

GIB = 1 << 30


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 GiB of random bytes, just written, so in the page cache."""
    path = tmp_path_factory.mktemp("registration") / "1 GiB.bin"
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(16):
            file.write(rng.bytes(GIB // 16))
        os.fsync(file.fileno())
    return path


def anonymous_nbytes() -> int:
    """Anonymous memory of this process, from the kernel."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_register_and_unregister_1_gib(benchmark, path: Path) -> None:
    mapping = FileMapping.open(path)
    HostRegistration.of(mapping, [(0, 4096)]).close()  # the CUDA context is not what is measured
    before = anonymous_nbytes()
    grown = []

    kept: list[HostRegistration] = []

    def work() -> None:
        kept.append(HostRegistration.of(mapping, [(0, GIB)]))

    def setup() -> None:
        if kept:
            grown.append(anonymous_nbytes() - before)
            kept.pop().close()

    benchmark.pedantic(work, setup=setup, rounds=7)
    grown.append(anonymous_nbytes() - before)
    kept.pop().close()
    benchmark.extra_info["anonymous bytes grown, of 1 GiB"] = max(grown)
    benchmark.extra_info["ms a GiB, median"] = benchmark.stats.stats.median * 1e3
    mapping.close()
    assert max(grown) < GIB // 100


def test_engine_on_gemma(benchmark, gemma_path: Path) -> None:
    """From nothing to an engine that can multiply: index, mapping and registration of 247 MB of weights."""

    def work() -> None:
        with qmm.open(gemma_path) as model, qmm.Engine(model, "cuda", "mapped"):
            pass

    benchmark.pedantic(work, rounds=7, warmup_rounds=1)
