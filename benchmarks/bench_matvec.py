"""qmm's product on a GPU: device time by format, placement and number of columns.

    pytest benchmarks/bench_matvec.py [--save-results]

Each case multiplies by several tensors in turn, 256 MiB of weights in all, so that none is found in the L2 cache. The
products are captured into a CUDA graph; what is timed is its replay, the quantization of the activations included, and
the wait for its end (about 10 us a replay, of 8 or more products).

``link`` in the closing table is what a plain copy of the same file's registered pages to the GPU reaches in the same
run: the DMA engine's rate, which is the measure for the placement ``mapped``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf_files import nbytes_of, random_blocks, write_gguf

import qmm
from benchmarks import gpu as machine
from qmm.kernels.formats import FORMATS

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

M, K = 14336, 4096
TOTAL_NBYTES = 1 << 28
COLUMNS = (1, 8)

pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=f"no GPU: {machine.missing()}")


@pytest.fixture(scope="module", params=FORMATS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[qmm.Model]:
    """A file of one format: the same random blocks under as many names as fill TOTAL_NBYTES."""
    name = request.param
    blocks = random_blocks(name, (M, K), np.random.default_rng(0))
    count = max(8, TOTAL_NBYTES // nbytes_of(name, (M, K)))
    path = tmp_path_factory.mktemp("matvec") / f"{name}.gguf"
    write_gguf(path, {f"{name}.{i}": (name, (M, K), blocks) for i in range(count)})
    with qmm.open(path) as model:
        yield model
    Path(path).unlink()


@pytest.mark.parametrize("placement", ["device", "mapped"])
@pytest.mark.parametrize("n", COLUMNS)
def test_product(
    benchmark: BenchmarkFixture, model: qmm.Model, placement: str, n: int, record: Callable[..., Any]
) -> None:
    from numba import cuda

    benchmark.group = f"{placement}, n = {n}"
    tensors = list(model.values())
    x = np.random.default_rng(1).standard_normal((n, K), dtype=np.float32)
    with qmm.Engine(model, "cuda", placement) as engine:
        gpu = engine.gpu
        assert gpu is not None
        x_device, out = cuda.to_device(x), cuda.device_array((n, M), np.float32)

        def products() -> None:
            for tensor in tensors:
                engine.matmul(tensor, x_device, out, gpu.stream)

        products()
        gpu.synchronize(gpu.stream)
        expected = x @ engine.dequantize(tensors[-1]).T
        error = out.copy_to_host() - expected
        assert (error**2).sum() <= 5e-4 * (expected**2).sum()
        with gpu.replay(products, gpu.stream) as replay:

            def replay_and_wait() -> None:
                replay()
                gpu.synchronize(gpu.stream)

            benchmark.pedantic(replay_and_wait, rounds=20 if placement == "device" else 8, warmup_rounds=2)
        link = link_gb_per_s(engine, tensors) if placement == "mapped" else None
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median / len(tensors)
    row = {
        "type": tensors[0].type,
        "m x k": f"{M}x{K}",
        "placement": placement,
        "n": n,
        "us": seconds * 1e6,
        "GB/s": tensors[0].nbytes / seconds / 1e9,
        "link GB/s": link,
    }
    record(row, **machine.about())


def link_gb_per_s(engine: qmm.Engine, tensors: list[qmm.Tensor]) -> float:
    """What the copy engine reads the same registered pages at."""
    gpu = engine.gpu
    assert gpu is not None
    target = gpu.allocate(tensors[0].nbytes, "a copy")
    sources = [engine.address(tensor) for tensor in tensors]
    try:
        copies = lambda: [gpu.copy(target, source, tensors[0].nbytes, gpu.stream) for source in sources]  # noqa: E731
        times = gpu.time(copies, gpu.stream, repeats=5, batch=1)
    finally:
        gpu.free(target)
    return tensors[0].nbytes * len(tensors) / min(times) / 1e6
