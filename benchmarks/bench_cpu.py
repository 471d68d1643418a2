"""qmm's product on the CPU beside ggml's, one column: the same bytes, shapes and threads.

    pytest benchmarks/bench_cpu.py [--save-results]

``qmm / ggml`` in the closing table is qmm's speed in parts of ggml's; the goal is 0.5 for Q8_0, Q4_K and Q6_K.

Each side walks through its own copies of the weights, 256 MiB in all, so that weights come from memory and not from a
cache, as they do in a model. The sides take turns: before each timed round of one, the other runs once and then it
does, untimed. So both meet the same noise of the machine and have their threads awake. ggml's sleep while qmm runs:
they would poll for work on its time, and to wake them can cost a time slice. Results are compared before any timing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from gguf_files import random_blocks

from benchmarks.support import ggml_cpu
from benchmarks.support.load import Load
from qmm import extras
from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.cpu import products as cpu
from qmm.kernels.ops.cpu.parallel import available_cpus, set_threads

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("libggml", reason=extras.command("bench"))

AIMED_AT = ("Q8_0", "Q4_K", "Q6_K")
SHAPES = [(14336, 4096), (4096, 4096), (4096, 14336), (2048, 640)]
CPUS = available_cpus()
THREADS = sorted({1, CPUS})
KEY = ("format", "shape", "threads")
COPIES_NBYTES = 1 << 28
ROUNDS = 40


def cases() -> list[Any]:
    made = [(name, *shape, threads) for name in AIMED_AT for shape in SHAPES for threads in THREADS]
    made += [(name, 4096, 4096, threads) for name in FORMATS if name not in AIMED_AT for threads in THREADS]
    # Gemma's 2048x640 has a k that K-quants cannot: there the model has 640x2048.
    made = [(name, *((k, m) if k % FORMATS[name].block_weights else (m, k)), threads) for name, m, k, threads in made]
    return [pytest.param(case, id="-".join(map(str, case))) for case in made]


class Pair:
    """Both sides of one case, compared."""

    def __init__(self, name: str, m: int, k: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.format, self.m, self.k, self.threads = FORMATS[name], m, k, threads
        self.weights = np.frombuffer(random_blocks(name, (m, k), rng), np.uint8)
        self.copies = max(2, COPIES_NBYTES // self.weights.nbytes)
        self.next_copy = itertools.cycle([self.weights.copy() for _ in range(self.copies)])
        self.x = rng.standard_normal((1, k), dtype=np.float32)
        self.y = np.zeros((1, m), np.float32)
        self.ggml = ggml_cpu.Product(gguf.GGMLQuantizationType[name], self.weights, m, self.x, threads, self.copies)
        self.medians: dict[str, float] = {}
        self.disturbed: str | None = None
        self.qmm_run()
        for _ in range(self.copies):
            self.ggml_run()
        weights = gguf.quants.dequantize(self.weights, gguf.GGMLQuantizationType[name]).reshape(m, k)
        expected = self.x.astype(np.float64) @ weights.astype(np.float64).T
        self.nmse = {side: nmse(y, expected) for side, y in (("qmm", self.y), ("ggml", self.ggml.y))}
        assert max(self.nmse.values()) < 5e-4, self.nmse  # int8 activations on both sides: kernels/ops/quantize.py

    def qmm_run(self) -> None:
        cpu.matmul(self.format, next(self.next_copy).ctypes.data, self.m, self.k, self.x, self.y)

    def ggml_run(self) -> None:
        self.ggml.run()

    def before(self, side: str) -> Callable[[], None]:
        """What runs, untimed, before each round of a side: the other side, and this one."""

        def before_qmm() -> None:
            self.ggml_run()
            self.ggml.rest()
            self.qmm_run()

        def before_ggml() -> None:
            self.qmm_run()
            self.ggml_run()

        return {"qmm": before_qmm, "ggml": before_ggml}[side]

    def close(self) -> None:
        self.ggml.close()


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((actual - expected) ** 2) / np.sum(expected**2))


@pytest.fixture(scope="module", params=cases())
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    name, m, k, threads = request.param
    set_threads(threads)
    made = Pair(name, m, k, threads)
    yield made
    made.close()
    set_threads(CPUS)


@pytest.mark.parametrize("side", ["ggml", "qmm"])
def test_product(pair: Pair, side: str, benchmark: BenchmarkFixture, record: Callable[..., None]) -> None:
    nbytes = pair.weights.nbytes
    threads = f"{pair.threads} thread" + "s" * (pair.threads > 1)
    benchmark.group = f"{pair.format.name} {pair.m}x{pair.k}, {threads}"
    run = {"qmm": pair.qmm_run, "ggml": pair.ggml_run}[side]
    with Load(pair.threads) as load:
        benchmark.pedantic(run, setup=load.without(pair.before(side)), rounds=ROUNDS, warmup_rounds=2)
    pair.disturbed = pair.disturbed or load.disturbed
    if benchmark.stats is None:  # --benchmark-disable
        return
    stats = benchmark.stats.stats
    benchmark.extra_info.update(gb_per_s=nbytes / stats.median / 1e9, nmse=pair.nmse[side])
    pair.medians[side] = stats.median
    pair.medians[f"{side} least"] = stats.min
    if {"qmm", "ggml"} <= set(pair.medians):
        record(
            {
                "format": pair.format.name,
                "shape": f"{pair.m}x{pair.k}",
                "threads": pair.threads,
                "qmm ms": pair.medians["qmm"] * 1e3,
                "ggml ms": pair.medians["ggml"] * 1e3,
                "qmm GB/s": nbytes / pair.medians["qmm"] / 1e9,
                "ggml GB/s": nbytes / pair.medians["ggml"] / 1e9,
                "qmm / ggml": None if pair.disturbed else pair.medians["ggml"] / pair.medians["qmm"],
                "by minima": None if pair.disturbed else pair.medians["ggml least"] / pair.medians["qmm least"],
                "disturbed": pair.disturbed,
                "qmm NMSE": pair.nmse["qmm"],
                "ggml NMSE": pair.nmse["ggml"],
            },
            ggml=ggml_cpu.version(),
            ggml_features=ggml_cpu.features(),
        )
