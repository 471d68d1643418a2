"""What a product costs the host: a call from Python, a call of a plan, and the first call of a process.

    pytest benchmarks/bench_launch.py [--save-results]

``call`` and ``plan`` queue products that the GPU does in a few microseconds and do not wait for them; a round is few
enough calls for the queue not to fill up, and the wait is between rounds. ``node`` is what the device spends on a node
of a plan's graph: on one that returns at once, and on the smallest product there is. ``start`` is a new process, from
before ``import qmm`` to the end of the first product with a NumPy array: with an empty kernel cache, and with the one
that the run before filled (environment variable ``QMM_CACHE_DIR``). The file is in the page cache, as is Python's own
code.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf_files import random_blocks, write_gguf

import qmm
from benchmarks.support import gpu as machine
from benchmarks.support.rounds import Quantiles
from qmm import direct
from qmm.arrays import View
from qmm.graph import time_ms
from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.op import At, WeightLayout
from qmm.sequence import Step, queue_sequence

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from qmm.device import Device

pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=f"no GPU: {machine.missing()}")

M, K = 640, 1024
TENSORS = 16
CALLS = 64
ROUNDS = 100
WARM_UP = 50  # 30 ms: the first calls of a process take several times as long
NODES = 256
STARTS = 5
START = """
import sys, time
started = time.perf_counter()
import qmm
import numpy
with qmm.open(sys.argv[1]) as model, qmm.Engine(model, "cuda", sys.argv[2]) as engine:
    engine.matmul("weight.0", numpy.ones((1, int(sys.argv[3])), numpy.float32))
    print(time.perf_counter() - started)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_K tensors of one size, the smallest of Gemma's."""
    path = tmp_path_factory.mktemp("launch") / "small.gguf"
    blocks = random_blocks("Q4_K", (M, K), np.random.default_rng(0))
    write_gguf(path, {f"weight.{i}": ("Q4_K", (M, K), blocks) for i in range(TENSORS)})
    return path


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[qmm.Engine]:
    with qmm.open(path) as model, qmm.Engine(model, "cuda", "device") as made:
        yield made


def row_of(what: str, seconds: Sequence[float]) -> dict[str, Any]:
    times = Quantiles.of(seconds)
    return {"what": what, "us p10": times.p10 * 1e6, "us": times.median * 1e6, "us p90": times.p90 * 1e6}


@pytest.fixture
def timed(benchmark: BenchmarkFixture, engine: qmm.Engine, record: Callable[..., None]) -> Callable[..., None]:
    """Times calls that queue work, and records the host's time of one."""

    def run(what: str, calls: Callable[[], object], count: int) -> None:
        gpu = engine.gpu
        assert gpu is not None
        benchmark.group = "host"
        benchmark.pedantic(calls, setup=gpu.drain, rounds=ROUNDS, warmup_rounds=WARM_UP)
        gpu.drain()
        if benchmark.stats is None:  # --benchmark-disable
            return
        record(row_of(what, [seconds / count for seconds in benchmark.stats.stats.data]), **machine.about())

    return run


def arrays(n: int = 1) -> tuple[Any, Any]:
    from numba import cuda

    x = np.random.default_rng(1).standard_normal((n, K), dtype=np.float32)
    return cuda.to_device(x), cuda.device_array((n, M), np.float32)


@pytest.mark.parametrize(("what", "n"), [("tensor", 1), ("tensor", 8), ("name", 1)])
def test_call(engine: qmm.Engine, timed: Callable[..., None], what: str, n: int) -> None:
    gpu = engine.gpu
    assert gpu is not None
    tensors = list(engine.model if what == "name" else engine.model.values())
    x, y = arrays(n)

    def calls() -> None:
        for i in range(CALLS):
            engine.matmul(tensors[i % TENSORS], x, y, gpu.stream)

    timed(f"engine.matmul({what}, x, out, stream), n = {n}", calls, CALLS)


@pytest.mark.parametrize("out", ["out", "new"])
@pytest.mark.parametrize("on", ["current", "object", "handle"])
def test_call_of_torch(engine: qmm.Engine, timed: Callable[..., None], on: str, out: str) -> None:
    """On PyTorch's current stream; on another, given as its object or as a number, which the user may destroy."""
    torch = pytest.importorskip("torch")
    tensors = list(engine.model.values())
    x, y = torch.ones((8, K), dtype=torch.float16, device="cuda"), None
    if out == "out":
        y = torch.empty((8, M), dtype=torch.float16, device="cuda")
    other = torch.cuda.Stream()
    stream = {"current": None, "object": other, "handle": other.cuda_stream}[on]

    def calls() -> None:
        for i in range(CALLS):
            engine.matmul(tensors[i % TENSORS], x, y, stream)

    timed(f"engine.matmul, torch, n = 8, stream: {on}, result: {out}", calls, CALLS)


@pytest.mark.parametrize("products", [1, TENSORS])
def test_plan(engine: qmm.Engine, timed: Callable[..., None], products: int) -> None:
    tensors = list(engine.model.values())[:products]
    x, _ = arrays()
    results = [arrays()[1] for _ in tensors]
    plan = engine.plan([(tensor, x, y) for tensor, y in zip(tensors, results, strict=True)])
    plan()
    assert engine.gpu is not None
    engine.gpu.drain()
    for tensor, y in zip(tensors, results, strict=True):
        np.testing.assert_array_equal(y.copy_to_host(), engine.matmul(tensor, x).copy_to_host())
    count = CALLS // products

    def calls() -> None:
        for _ in range(count):
            plan()

    timed(f"plan() of {products} product{'s' * (products > 1)}", calls, count)
    plan.close()


def nodes_of_nothing(gpu: Device) -> Callable[[], None]:
    """NODES kernels, launched as products are, whose blocks have nothing to do."""
    from qmm.kernels.ops.layout import Activations
    from qmm.kernels.ops.op import Operand, Work
    from qmm.kernels.ops.quantize.plan import quantize_specs

    activations = Activations.of(FORMATS["Q8_0"], 32, 1, True)
    (launch,) = quantize_specs(Operand.contiguous(1, 32), activations, At("workspace"), 0, gpu.architecture)
    idle = dataclasses.replace(
        launch, ctas=gpu.architecture.sms, arguments={**launch.arguments, "n": 0, "padded": 0, "area": 0, "x": 0}
    )
    nothing = gpu.prepare(Work((idle,)), "nothing")

    def queue() -> None:
        for _ in range(NODES):
            gpu.queue(nothing, 0, 0, 0, gpu.stream)

    return queue


def nodes_of_products(gpu: Device) -> Callable[[], None]:
    """NODES products of 8 rows of 32 weights, as a plan has them."""
    area = gpu.allocate(1024, "the smallest product")
    x, y = (View((1, n), (4 * n, 4), "float32", area + at, gpu.number) for n, at in ((32, 0), (8, 256)))
    layout = WeightLayout.at(area + 512)
    step = Step(direct.prepare(gpu, FORMATS["Q8_0"], layout, 8, 32, x, y, True), area + 512, x.address, y.address)
    return lambda: queue_sequence(gpu, [step] * NODES, gpu.stream)


@pytest.mark.parametrize(
    ("what", "nodes"), [("a node that returns at once", nodes_of_nothing), ("the smallest product", nodes_of_products)]
)
def test_node(
    benchmark: BenchmarkFixture,
    engine: qmm.Engine,
    what: str,
    nodes: Callable[[Device], Callable[[], None]],
    record: Callable[..., None],
) -> None:
    gpu = engine.gpu
    assert gpu is not None
    work = nodes(gpu)
    work()  # compiles
    benchmark.group = "device"
    milliseconds = benchmark.pedantic(time_ms, (gpu, work, gpu.stream, ROUNDS, 1), rounds=1)
    record(row_of(f"device, {what}", [time / NODES / 1e3 for time in milliseconds]), **machine.about())


def seconds_to_first_product(path: Path, placement: str, cache: Path) -> float:
    command = [sys.executable, "-c", START, str(path), placement, str(K)]
    environment = {**os.environ, "QMM_CACHE_DIR": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("placement", ["device", "mapped"])
def test_start(
    benchmark: BenchmarkFixture, path: Path, placement: str, tmp_path: Path, record: Callable[..., None]
) -> None:
    benchmark.group = "start"
    cold, warm = [], []

    def start() -> None:
        cache = tmp_path / f"cache{len(cold)}"
        cache.mkdir()
        cold.append(seconds_to_first_product(path, placement, cache))
        warm.append(seconds_to_first_product(path, placement, cache))

    benchmark.pedantic(start, rounds=STARTS)
    if benchmark.stats is None:  # --benchmark-disable
        return
    for what, seconds in (("empty", cold), ("filled", warm)):
        record(row_of(f"start, {placement}, {what} kernel cache", seconds), **machine.about())
