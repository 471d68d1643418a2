"""qmm's product on a GPU beside ggml's: the same bytes, shapes and columns, in one process, by turns.

    pytest benchmarks/bench_matvec.py --save-results          # everything
    pytest benchmarks/bench_matvec.py -k "Q4_K and n8"        # ids are like Q4_K-14336x4096-n8-device
    python -m benchmarks.support.report                       # README's table and the chart, from what was saved

**What is timed.** Each side has copies of the weight, 256 MiB or four times what L2 holds, whichever is more, and
multiplies by them in turn, so that no weight is found in a cache. The products, 8 or more, are captured into CUDA
graphs of at most GRAPH_PRODUCTS; what is timed is their replay, on both sides and by turns
(``benchmarks/support/rounds.py``), so launches cost Python nothing. The quantization of the activations is part of
every product, on both sides: ggml's log is read for whether it did replay. qmm's products stand in their graph as in a
plan's: while one ends, it brings some of the next one's weights into L2, at most a sixth of what that holds, so bytes
still come from memory once a product. ggml has nothing of the kind; products of the main part that were queued one by
one, without it, are timed by turns with the others too ("alone us" in the results). Nothing is timed before the results
of every product were compared, with each other, with ggml's, and with a float64 product of the weights as gguf
dequantizes them.

**What it is put in proportion to.** ggml's time, and the rate at which a kernel that only reads gets bytes over the
same link in the same run (``benchmarks/support/peaks.py``). For the placement ``mapped`` that is read by turns with the
product and so is the copy engine. ggml's CUDA backend does not multiply by weights in mapped memory, so it is no side
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf_files import FORMATS as FILE_FORMATS

from benchmarks.support import ggml_gpu, peaks
from benchmarks.support import gpu as machine
from benchmarks.support.compiled import compile_all
from benchmarks.support.load import Load
from benchmarks.support.placed import Placed, Weight, in_a_mapped_file, in_device_memory, links
from benchmarks.support.rounds import Quantiles, Side, take_turns

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from qmm.device import Device

pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=f"no GPU: {machine.missing()}")

ROUNDS = {"device": 20, "mapped": 10}
SAMPLED_ROWS = 256
TOLERANCE = 5e-4
"""Of the NMSE: kernels/ops/quantize.py derives it for int8 activations, and ggml's own tests have the same."""

SHOWN = ("id", "qmm us", "ggml us", "GB/s", "% of peak", "x ggml", "peak GB/s", "disturbed")


MAIN = ("Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
OTHER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16")
LARGE = ((4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
GEMMA = (("Q8_0", 256, 640), ("Q5_0", 2048, 640), ("Q4_K", 640, 1024), ("Q6_K", 640, 2048), ("Q8_0", 262144, 640))
QWEN = tuple(
    (name, m, k)
    for m, k in ((896, 4864), (4864, 896))
    for name in ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K")
    if k % FILE_FORMATS[name].values == 0
)
COLUMNS = {"main": (1, 2, 4, 8), "mapped": (1, 2, 4, 8), "small": (1, 8), "other": (1, 2, 4, 8)}


def weights() -> list[Weight]:
    return [
        *[Weight("main", name, m, k, "device") for name in MAIN for m, k in LARGE],
        *[Weight("small", name, m, k, "device") for name, m, k in (*GEMMA, *QWEN)],
        *[Weight("other", name, m, k, "device") for name in OTHER for m, k in ((4096, 4096), (14336, 4096))],
        *[Weight("mapped", name, 14336, 4096, "mapped") for name in MAIN],
    ]


CASES = [
    pytest.param(weight, n, id=weight.identity(n)) for weight in weights() for n in COLUMNS[weight.part]
]  # for n of one weight after the other: the fixture of the weight lives that long


@pytest.fixture(scope="module", autouse=True)
def compiled(request: pytest.FixtureRequest) -> None:
    """The kernels of all cases that were selected."""
    calls = [item.callspec.params for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]
    compile_all([(params["placed"], params["n"]) for params in calls])


@pytest.fixture(scope="module")
def gpu() -> Iterator[Device]:
    from qmm.device import Device

    made = Device(0)
    yield made
    made.drain()
    made.close()


@pytest.fixture(scope="module")
def backend() -> Iterator[ggml_gpu.Backend | None]:
    """ggml's CUDA backend, or None where there is no such library."""
    folder = ggml_gpu.find()
    if folder is None or ggml_gpu.missing():
        yield None
        return
    made = ggml_gpu.Backend(folder)
    yield made
    made.close()


@pytest.fixture(scope="module")
def device_peak(gpu: Device) -> peaks.Reading:
    return peaks.device_reading(gpu)


@pytest.fixture(scope="module")
def placed(
    request: pytest.FixtureRequest,
    gpu: Device,
    backend: ggml_gpu.Backend | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Placed]:
    weight: Weight = request.param
    if weight.placement == "device":
        with in_device_memory(weight, gpu, backend) as made:
            yield made
    else:
        with in_a_mapped_file(weight, gpu, tmp_path_factory.mktemp("matvec") / f"{weight.type}.gguf") as made:
            yield made


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    expected = expected.astype(np.float64)
    return float(np.sum((actual - expected) ** 2) / np.sum(expected**2))


def compared(
    placed: Placed, x: np.ndarray, results: np.ndarray, product: ggml_gpu.Product | None
) -> dict[str, float | None]:
    """NMSE of each side against float64, and of one against the other; asserts that they are what they must be."""
    rng = np.random.default_rng(2)
    rows = np.union1d(rng.integers(0, placed.weight.m, SAMPLED_ROWS), [0, placed.weight.m - 1])
    expected = x.astype(np.float64) @ placed.pattern.rows_as_float64(rows).T
    assert (results == results[0]).all(), "qmm's products of equal copies differ"
    found: dict[str, float | None] = {"qmm NMSE": nmse(results[0][:, rows], expected)}
    if product is not None:
        y = product.result(0)
        for i in range(1, placed.products):
            assert np.array_equal(product.result(i), y), f"ggml's product {i} of equal copies differs"
        found |= {"ggml NMSE": nmse(y[:, rows], expected), "NMSE between": nmse(results[0], y)}
    else:
        found |= {"ggml NMSE": None, "NMSE between": None}
    assert all(value is None or value <= TOLERANCE for value in found.values()), found
    return found


@pytest.mark.parametrize(("placed", "n"), CASES, indirect=["placed"])
def test_product(
    benchmark: BenchmarkFixture,
    placed: Placed,
    n: int,
    device_peak: peaks.Reading,
    backend: ggml_gpu.Backend | None,
    record: Callable[..., Any],
) -> None:
    weight = placed.weight
    benchmark.group = f"{weight.placement}, n = {n}"
    x = np.random.default_rng(1).standard_normal((n, weight.k), dtype=np.float32)
    with placed.qmm_sides(x) as (sides, results), placed.ggml_product(x) as product, links(placed) as link_sides:
        for side in reversed(sides):
            side.queue()
            side.wait()
            errors = compared(placed, x, results(), product)
        if product is not None:
            sides.append(Side("ggml", product.queue, product.wait, placed.products))
        with Load() as load:
            times = take_turns(benchmark, [*sides, *link_sides], ROUNDS[weight.placement])
        replayed = None if product is None else product.replayed()
    assert replayed is not False, f"ggml did not replay a CUDA graph: {backend.log[-5:] if backend else ''}"
    if benchmark.stats is None:  # --benchmark-disable
        return
    row = row_of(placed, n, times, device_peak, errors, replayed, load.disturbed)
    benchmark.extra_info.update(row)
    about = {"l2_nbytes": peaks.l2_nbytes(placed.gpu), "read_peak": device_peak.about(), **about_ggml(backend)}
    record(row, **machine.about(), **about)


def row_of(
    placed: Placed,
    n: int,
    times: dict[str, Quantiles],
    device_peak: peaks.Reading,
    errors: dict[str, float | None],
    replayed: bool | None,
    disturbed: str | None,
) -> dict[str, Any]:
    """One line of the results."""
    weight, qmm_time, ggml_time = placed.weight, times["qmm"], times.get("ggml")
    if placed.region is None:
        peak, dma = device_peak.gb_per_s, None
    else:
        peak, dma = (placed.region[1] / times[name].median / 1e9 for name in ("read", "dma"))
    rate = weight.nbytes / qmm_time.median / 1e9
    row: dict[str, Any] = {
        "id": weight.identity(n),
        "part": weight.part,
        "type": weight.type,
        "m": weight.m,
        "k": weight.k,
        "n": n,
        "placement": weight.placement,
        "bytes": weight.nbytes,
        "copies": len(placed.addresses),
        "products": placed.products,
    }
    for name, time in (("qmm", qmm_time), ("alone", times.get("alone")), ("ggml", ggml_time)):
        row[f"{name} us p10"] = None if time is None else time.p10 * 1e6
        row[f"{name} us"] = None if time is None else time.median * 1e6
        row[f"{name} us p90"] = None if time is None else time.p90 * 1e6
    return row | {
        "GB/s": rate,
        "ggml GB/s": None if ggml_time is None else weight.nbytes / ggml_time.median / 1e9,
        "peak GB/s": peak,
        "% of peak": None if disturbed else 100 * rate / peak,
        "copy engine GB/s": dma,
        "x ggml": None if disturbed or ggml_time is None else ggml_time.median / qmm_time.median,
        "disturbed": disturbed,
        "ggml replayed": replayed,
        **errors,
    }


def about_ggml(backend: ggml_gpu.Backend | None) -> dict[str, Any]:
    """ggml's part of the head of a results file."""
    if backend is None:
        return {"ggml": None, "ggml_commit": None, "ggml_features": {}, "ggml_missing": ggml_gpu.missing()}
    return {
        "ggml": backend.version,
        "ggml_commit": backend.commit,
        "ggml_features": backend.features,
        "ggml_missing": None,
    }
