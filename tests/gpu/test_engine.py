"""The engine on a GPU: placements, array libraries, streams, the ends of its life."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import shutil
from contextlib import nullcontext
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import random_blocks, write_gguf
from numba import cuda

import qmm
from qmm.arrays import kind_of
from qmm.graph import replay, time_ms
from qmm.kernels.formats import FORMATS

PLACEMENTS = ("mapped", "device")
N = 3
ROUNDING = {"float32": 0.0, "float16": 2.0**-22, "bfloat16": 2.0**-16}
"""What storing results in a dtype adds to the NMSE."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format once, at a width that is no multiple of 512 and with an odd number of rows."""
    rng = np.random.default_rng(11)
    tensors = {}
    for name, block_format in FORMATS.items():
        shape = (5, 37) if block_format.plain else (5, 3 * block_format.block_weights)
        tensors[name.lower()] = (name, shape, random_blocks(name, shape, rng))
    tensors["experts"] = ("Q8_0", (3, 4, 64), random_blocks("Q8_0", (3, 4, 64), rng))
    tensors["norm"] = ("F32", (640,), random_blocks("F32", (640,), rng))
    tensors["hollow"] = ("Q8_0", (5, 0), b"")
    path = tmp_path_factory.mktemp("engine") / "every format.gguf"
    write_gguf(path, tensors)
    return path


@pytest.fixture(scope="module", params=PLACEMENTS)
def engine(request: pytest.FixtureRequest, path: Path):
    with qmm.open(path) as model, qmm.Engine(model, device="cuda", placement=request.param) as engine:
        yield engine


def weights_of(engine: qmm.Engine, name: str) -> np.ndarray:
    tensor = engine.model[name]
    return gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.type]).reshape(tensor.shape)


def close_to(y: np.ndarray, x: np.ndarray, weights: np.ndarray, tolerance: float = 5e-4) -> bool:
    expected = np.tensordot(np.asarray(x, np.float64), weights.astype(np.float64), (-1, -1))
    assert y.shape == expected.shape
    # A handful of sums may cancel by chance: what the terms amount to is the measure, not what is left of them.
    terms = np.tensordot(np.asarray(x, np.float64) ** 2, weights.astype(np.float64) ** 2, (-1, -1))
    return bool(((y - expected) ** 2).sum() <= tolerance * max((expected**2).sum(), terms.sum()))


@pytest.mark.parametrize("name", [name.lower() for name in FORMATS])
def test_every_format_from_every_placement(engine: qmm.Engine, name: str, rng: np.random.Generator) -> None:
    weights = weights_of(engine, name)
    np.testing.assert_array_equal(engine.dequantize(name).view(np.uint32), weights.astype(np.float32).view(np.uint32))
    for n in (1, 2, 5, 9):
        x = rng.standard_normal((n, weights.shape[-1])).astype(np.float32)
        assert close_to(engine.matmul(name, x), x, weights)
        assert close_to(engine.matmul(name, x, activations="f16"), x, weights, 1e-6)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_products_with_the_same_activations_are_those_of_each(
    engine: qmm.Engine, n: int, rng: np.random.Generator
) -> None:
    names = [name.lower() for name, form in FORMATS.items() if form.block_weights == 256]
    x = rng.standard_normal((n, 768)).astype(np.float32)
    on_device = cuda.to_device(x)
    outs = [cuda.device_array((n, 5), np.float32) for _ in names]
    given = engine.matmul_each(names, on_device, outs)
    assert all(one is other for one, other in zip(given, outs, strict=True))
    made, on_host = engine.matmul_each(names, on_device), engine.matmul_each(names, x)
    for name, *found in zip(names, given, made, on_host, strict=True):
        expected = engine.matmul(name, on_device).copy_to_host()
        for y in found:
            np.testing.assert_array_equal(np.asarray(y), expected)


def test_placements_give_the_same_bits(path: Path, rng: np.random.Generator) -> None:
    with qmm.open(path) as model:
        for name in model:
            x = rng.standard_normal((N, model[name].k)).astype(np.float32)
            results = []
            for placement in PLACEMENTS:
                with qmm.Engine(model, "cuda", placement) as engine:
                    results.append(engine.matmul(name, x))
            np.testing.assert_array_equal(results[0], results[1])


def test_device_and_cpu_agree(path: Path, rng: np.random.Generator) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cuda") as gpu, qmm.Engine(model, "cpu") as cpu:
        for name in model:
            x = rng.standard_normal((N, model[name].k)).astype(np.float32)
            a, b = gpu.matmul(name, x), cpu.matmul(name, x)
            # The same int8 activations and weights on both; only the order of float32 sums differs. Plain formats
            # take float16 activations on the GPU and float32 ones on the CPU.
            tolerance = 1e-6 if model[name].format.plain else 1e-10
            assert ((a - b) ** 2).sum() <= tolerance * (b**2).sum(), name


def test_more_than_two_dimensions_and_fewer(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    assert close_to(engine.matmul("experts", x), x, weights_of(engine, "experts"))
    x = rng.standard_normal((2, 640)).astype(np.float32)
    assert close_to(engine.matmul("norm", x), x, weights_of(engine, "norm"))


class NumbaLibrary:
    """How a library makes an array on the GPU or in host memory, brings it back as float32, and has its streams."""

    dtypes: tuple[str, ...] = ("float32", "float16")
    host_dtype = "float16"

    def make(self, values: np.ndarray, dtype: str = "float32"):
        return cuda.to_device(values.astype(dtype))

    def host(self, values: np.ndarray):
        return values.astype(self.host_dtype)  # NumPy's, where a library has none of its own

    def bring(self, array) -> np.ndarray:
        return np.asarray(array.copy_to_host() if hasattr(array, "copy_to_host") else array).astype(np.float32)

    def stream(self):
        return cuda.stream()

    def current(self, stream):
        return nullcontext(stream)  # Numba has none


class CuPyLibrary(NumbaLibrary):
    def __init__(self) -> None:
        self.cupy = importlib.import_module("cupy")

    def make(self, values: np.ndarray, dtype: str = "float32"):
        return self.cupy.asarray(values).astype(dtype)

    def bring(self, array) -> np.ndarray:
        return self.cupy.asnumpy(array).astype(np.float32)

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)

    def current(self, stream):
        return stream


class TorchLibrary(NumbaLibrary):
    dtypes = ("float32", "float16", "bfloat16")
    host_dtype = "bfloat16"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")

    def make(self, values: np.ndarray, dtype: str = "float32"):
        return self.torch.from_numpy(values).to("cuda").to(getattr(self.torch, dtype))

    def host(self, values: np.ndarray):
        return self.torch.from_numpy(values).to(self.torch.bfloat16)

    def bring(self, array) -> np.ndarray:
        return array.float().cpu().numpy()

    def stream(self):
        return self.torch.cuda.Stream()

    def current(self, stream):
        return self.torch.cuda.stream(stream)


LIBRARIES = {"numba": NumbaLibrary, "cupy": CuPyLibrary, "torch": TorchLibrary}
"""Numba is always there. The other two are no dependency of qmm; where they are installed, they are tested."""


LIBRARIES_HERE = [name for name in LIBRARIES if name == "numba" or importlib.util.find_spec(name)]


@pytest.fixture(params=LIBRARIES_HERE)
def library(request: pytest.FixtureRequest) -> NumbaLibrary:
    return LIBRARIES[request.param]()


def test_kind_dtype_and_device_come_back(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    for name in ("q4_k", "f16"):
        weights = weights_of(engine, name)
        for dtype in library.dtypes:
            x = library.make(rng.standard_normal((2, N, weights.shape[-1])).astype(np.float32), dtype)
            y = engine.matmul(name, x)
            assert type(y) is type(x)
            assert y.dtype == x.dtype
            assert tuple(y.shape) == (2, N, 5)
            assert close_to(library.bring(y), library.bring(x), weights, 5e-4 + ROUNDING[dtype])


def test_host_arrays_come_back_to_the_host(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    x = library.host(rng.standard_normal((N, 768)).astype(np.float32))
    y = engine.matmul("q6_k", x)
    assert type(y) is type(x)
    assert y.dtype == x.dtype
    assert kind_of(y).view(y).device is None
    assert close_to(library.bring(y), library.bring(x), weights_of(engine, "q6_k"), 5e-4 + ROUNDING[library.host_dtype])


def test_strided_arrays_are_used_as_they_are(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    weights = weights_of(engine, "q8_0")
    k = weights.shape[-1]
    for index in (np.s_[:, 1::2, :k], np.s_[1:, ::3, k:], np.s_[:, :, ::2]):
        memory = rng.standard_normal((4, 6, 2 * k)).astype(np.float32)
        x = library.make(memory)[index]
        assert close_to(library.bring(engine.matmul("q8_0", x)), memory[index], weights)


def test_out_of_another_dtype_and_stride(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    x = rng.standard_normal((N, 768)).astype(np.float32)
    memory = library.make(np.full((N, 2, 10), np.nan, np.float32), "float16")
    out = memory[:, 1, ::2]
    assert engine.matmul("q5_k", library.make(x), out=out) is out
    after = library.bring(memory)
    assert close_to(after[:, 1, ::2], x, weights_of(engine, "q5_k"), 5e-4 + ROUNDING["float16"])
    assert np.isnan(after[:, 0]).all()
    assert np.isnan(after[:, 1, 1::2]).all()


def test_out_may_be_x(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    values = rng.standard_normal((N, 96)).astype(np.float32)
    expected = library.bring(engine.matmul("q8_0", library.make(values)))
    x = library.make(values)
    engine.matmul("q8_0", x, out=x[:, :5])
    after = library.bring(x)
    np.testing.assert_array_equal(after[:, :5], expected)
    np.testing.assert_array_equal(after[:, 5:], values[:, 5:])


def test_streams(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    x = library.make(rng.standard_normal((N, 96)).astype(np.float32))
    expected = library.bring(engine.matmul("q8_0", x))
    cuda.synchronize()
    for other in LIBRARIES_HERE:  # an array of one library, a stream of another
        stream = LIBRARIES[other]().stream()
        y = engine.matmul("q8_0", x, stream=stream)
        cuda.synchronize()
        np.testing.assert_array_equal(library.bring(y), expected)
    with library.current(library.stream()):
        y = engine.matmul("q8_0", x)
    cuda.synchronize()
    np.testing.assert_array_equal(library.bring(y), expected)


def test_an_empty_batch_is_an_empty_result(engine: qmm.Engine, library) -> None:
    assert engine.matmul("q8_0", np.empty((0, 96), np.float32)).shape == (0, 5)
    assert tuple(engine.matmul("q8_0", library.make(np.empty((2, 0, 96), np.float32))).shape) == (2, 0, 5)


def test_rows_without_weights_give_zeros(engine: qmm.Engine, library) -> None:
    for shape in ((0,), (3, 0), (2, 5, 0)):
        zeros = np.zeros((*shape[:-1], 5), np.float32)
        np.testing.assert_array_equal(engine.matmul("hollow", np.empty(shape, np.float32)), zeros)
        for dtype in library.dtypes:
            x = library.make(np.empty(shape, np.float32), dtype)
            out = library.make(np.full((*shape[:-1], 5), np.nan, np.float32), dtype)
            assert engine.matmul("hollow", x, out=out) is out
            np.testing.assert_array_equal(library.bring(out), zeros)
            with engine.plan([("hollow", x, out)]) as plan:
                plan()


def test_arrays_on_the_wrong_side_are_refused(path: Path, library) -> None:
    x = library.make(np.zeros((1, 96), np.float32))
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine, pytest.raises(qmm.ArrayError, match="device 0"):
        engine.matmul("q8_0", x)
    out = library.host(np.zeros((1, 5), np.float32))
    with qmm.open(path) as model, qmm.Engine(model, "cuda") as engine, pytest.raises(qmm.ArrayError, match="out"):
        engine.matmul("q8_0", x, out=out)


def test_copies_take_exactly_their_bytes_and_mapped_ones_none(path: Path, tmp_path: Path) -> None:
    alone = shutil.copy(path, tmp_path)  # of which no other engine has registered more
    with qmm.open(alone) as model:
        with qmm.Engine(model, "cuda", "device") as engine:
            assert engine.weights_nbytes == 0
            engine.matmul("q4_k", np.zeros((1, 768), np.float32))
            assert engine.weights_nbytes == model["q4_k"].nbytes
        with qmm.Engine(model, "cuda", "mapped", tensors=["q4_k"]) as engine:
            assert engine.weights_nbytes % 4096 == 0
            assert engine.weights_nbytes <= model["q4_k"].nbytes + 2 * 4096
            with pytest.raises(qmm.TensorNotFoundError, match="tensors="):
                engine.matmul("q8_0", np.zeros((1, 96), np.float32))


def test_two_engines_share_a_file_and_close_in_any_order(path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((1, 768)).astype(np.float32)
    with qmm.open(path) as model:
        first = qmm.Engine(model, "cuda", "mapped")
        second = qmm.Engine(model, "cuda", "mapped")
    expected = first.matmul("q4_k", x)
    first.close()
    first.close()
    np.testing.assert_array_equal(second.matmul("q4_k", x), expected)
    with pytest.raises(qmm.ClosedError):
        first.matmul("q4_k", x)
    second.close()


def test_auto_explains_itself(path: Path) -> None:
    with qmm.open(path) as model, qmm.Engine(model) as engine:
        assert engine.device == "cuda:0"
        assert engine.placement in PLACEMENTS
        assert engine.explanation.startswith("on ")
        assert "because" in engine.explanation


def test_a_gpu_that_is_not_there_is_named(path: Path) -> None:
    with qmm.open(path) as model, pytest.raises(qmm.DeviceError, match="device 99"):
        qmm.Engine(model, device=99)


def test_a_replay_repeats_the_product(engine: qmm.Engine, rng: np.random.Generator) -> None:
    gpu = engine.gpu
    assert gpu is not None
    x = cuda.to_device(rng.standard_normal((N, 768)).astype(np.float32))
    out = cuda.device_array((N, 5), np.float32)

    def work() -> None:
        engine.matmul("q4_k", x, out, gpu.stream)

    work()
    gpu.synchronize(gpu.stream)
    expected = out.copy_to_host()
    out.copy_to_device(np.full((N, 5), np.nan, np.float32))
    with replay(gpu, work, gpu.stream) as again:
        again()
        gpu.synchronize(gpu.stream)
    np.testing.assert_array_equal(out.copy_to_host(), expected)
    times = time_ms(gpu, work, gpu.stream, repeats=3)
    assert len(times) == 3
    assert all(0 < time < 1 for time in times)  # milliseconds: two launches of a few microseconds each


def test_out_may_lie_in_x_where_blocks_quantize_for_themselves(path: Path, library, rng: np.random.Generator) -> None:
    # One contiguous row: results go straight into the activations that other blocks may not have read yet.
    m, k = 2048, 4096
    file = path.with_name("in place.gguf")
    write_gguf(file, {"weight": ("Q8_0", (m, k), random_blocks("Q8_0", (m, k), rng))})
    values = rng.standard_normal((1, k)).astype(np.float32)
    with qmm.open(file) as model, qmm.Engine(model, "cuda", "device") as engine:
        expected = library.bring(engine.matmul("weight", library.make(values)))
        for _ in range(20):
            x = library.make(values)
            engine.matmul("weight", x, out=x[:, :m])
            np.testing.assert_array_equal(library.bring(x)[:, :m], expected)
    file.unlink()


def test_a_product_is_prepared_once_however_its_tensor_is_named(path: Path, library, rng: np.random.Generator) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cuda", "device") as engine:
        tensor = model["q4_k"]
        x = library.make(rng.standard_normal((2, tensor.k)).astype(np.float32))
        for named in ("q4_k", "q4_k", tensor, model["q4_k"]):
            engine.matmul(named, x)
        assert len(engine._calls._calls) == 1


def test_calls_with_other_arrays_of_the_same_kind(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    # The second call is not checked again: it must still use its own arrays.
    for n in (1, 3):
        values = [rng.standard_normal((n, 768)).astype(np.float32) for _ in range(3)]
        arrays = [library.make(value) for value in values]
        outputs = [library.make(np.full((n, 5), np.nan, np.float32)) for _ in values]
        for x, out in zip(arrays, outputs, strict=True):
            engine.matmul("q4_k", x, out=out)
        for value, out in zip(values, outputs, strict=True):
            assert close_to(library.bring(out), value, weights_of(engine, "q4_k"))
    with pytest.raises(qmm.ArrayError, match="768"):
        engine.matmul("q4_k", library.make(np.zeros((1, 767), np.float32)))
    with pytest.raises(qmm.ArrayError, match="no activations"):
        engine.matmul("q4_k", arrays[0], activations="int4")


class TestPlan:
    def test_gives_what_matmul_gives(self, engine: qmm.Engine, library, rng: np.random.Generator) -> None:
        steps = []
        for n in (1, 2, 5, 8, 19):
            for name in ("q8_0", "q4_k", "f16"):
                x = library.make(rng.standard_normal((n, engine.model[name].k)).astype(np.float32))
                steps.append((name, x, library.make(np.full((n, 5), np.nan, np.float32))))
        with engine.plan(steps) as plan:
            assert len(plan) == len(steps)
            assert np.isnan(library.bring(steps[0][2])).all()  # nothing is computed yet
            for _ in range(3):
                plan()
        for name, x, y in steps:
            np.testing.assert_array_equal(library.bring(y), library.bring(engine.matmul(name, x)))

    def test_arrays_are_used_in_place(self, engine: qmm.Engine, rng: np.random.Generator) -> None:
        x = cuda.to_device(np.zeros((1, 768), np.float32))
        y = cuda.device_array((1, 5), np.float32)
        plan = engine.plan([("q6_k", x, y)])
        for _ in range(3):
            values = rng.standard_normal((1, 768)).astype(np.float32)
            x.copy_to_device(values)
            plan()
            assert close_to(y.copy_to_host(), values, weights_of(engine, "q6_k"))
        plan.close()

    def test_a_product_reads_what_one_before_it_wrote(self, path: Path, rng: np.random.Generator) -> None:
        file = path.with_name("chain.gguf")
        shapes = {"up": (2048, 640), "down": (640, 2048)}
        write_gguf(file, {name: ("Q8_0", shape, random_blocks("Q8_0", shape, rng)) for name, shape in shapes.items()})
        with qmm.open(file) as model, qmm.Engine(model, "cuda", "device") as engine:
            x = [cuda.to_device(rng.standard_normal((1, 640)).astype(np.float32) * 1e-3)]
            middle, last = (cuda.device_array((1, m), np.float32) for m in (2048, 640))
            expected = engine.matmul("down", engine.matmul("up", x[0])).copy_to_host()
            plan = engine.plan([("up", x[0], middle), ("down", middle, last)] * 8)
            for _ in range(50):
                plan()
            cuda.synchronize()
            np.testing.assert_array_equal(last.copy_to_host(), expected)
        file.unlink()

    def test_keeps_alive_what_it_needs(self, engine: qmm.Engine, rng: np.random.Generator) -> None:
        values = rng.standard_normal((3, 768)).astype(np.float32)
        y = cuda.device_array((3, 5), np.float32)
        plan = engine.plan([("q4_k", cuda.to_device(values), y)])
        gc.collect()
        others = [cuda.to_device(np.full((3, 768), np.nan, np.float32)) for _ in range(20)]
        for n in (8, 64, 512):  # the engine's own scratch memory grows, and is not the plan's
            engine.matmul("q4_k", cuda.to_device(rng.standard_normal((n, 768)).astype(np.float32)), stream=0)
        plan(stream=0)
        cuda.synchronize()
        assert len(others) == 20
        assert close_to(y.copy_to_host(), values, weights_of(engine, "q4_k"))
        plan.close()

    def test_ends_with_its_engine_or_before(self, path: Path) -> None:
        x, y = cuda.to_device(np.zeros((1, 768), np.float32)), cuda.device_array((1, 5), np.float32)
        with qmm.open(path) as model, qmm.Engine(model, "cuda") as engine:
            first, second = (engine.plan([("q4_k", x, y)]) for _ in range(2))
            second.close()
            second.close()
            with pytest.raises(qmm.ClosedError, match="plan"):
                second()
            first()
        assert first.closed
        with pytest.raises(qmm.ClosedError, match="engine"):
            first()
        first.close()

    def test_refuses_what_matmul_would(self, engine: qmm.Engine) -> None:
        x, y = cuda.to_device(np.zeros((1, 768), np.float32)), cuda.device_array((1, 5), np.float32)
        with pytest.raises(qmm.ArrayError, match="host memory"):
            engine.plan([("q4_k", np.zeros((1, 768), np.float32), np.zeros((1, 5), np.float32))])
        with pytest.raises(qmm.ArrayError, match="shape"):
            engine.plan([("q4_k", x, y[:, :4])])
        with pytest.raises(qmm.TensorNotFoundError):
            engine.plan([("q4_K", x, y)])
        with pytest.raises(qmm.ArrayError, match="at least"):
            engine.plan([])

    def test_a_file_that_changed_is_not_read(self, path: Path, tmp_path: Path) -> None:
        file = tmp_path / "changing.gguf"
        file.write_bytes(path.read_bytes())
        x, y = cuda.to_device(np.zeros((1, 768), np.float32)), cuda.device_array((1, 5), np.float32)
        with qmm.open(file) as model, qmm.Engine(model, "cuda", "mapped") as engine:
            plan = engine.plan([("q4_k", x, y)])
            plan()
            file.touch()
            with pytest.raises(qmm.MappingError, match="changed"):
                plan()
