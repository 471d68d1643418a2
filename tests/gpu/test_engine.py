"""The engine on a GPU: placements, array libraries, streams, the ends of its life."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import random_blocks, write_gguf

import qmm
from qmm.kernels.formats import FORMATS

PLACEMENTS = ("mapped", "device")
N = 3


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


@pytest.fixture(params=["torch", "cupy", "numba"])
def library(request: pytest.FixtureRequest):
    """How each library makes an array of a dtype on the GPU, and brings one back as float32."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")

        def make(values: np.ndarray, dtype: str):
            return torch.from_numpy(values).to("cuda").to(getattr(torch, dtype))

        return make, lambda array: array.float().cpu().numpy(), ("float32", "float16", "bfloat16")
    if request.param == "cupy":
        cupy = pytest.importorskip("cupy")
        return (
            lambda values, dtype: cupy.asarray(values).astype(dtype),
            lambda array: cupy.asnumpy(array.astype("float32")),
            ("float32", "float16"),
        )
    from numba import cuda

    return (
        lambda values, dtype: cuda.to_device(values.astype(dtype)),
        lambda array: array.copy_to_host().astype(np.float32),
        ("float32", "float16"),
    )


def test_kind_dtype_and_device_come_back(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    make, bring, dtypes = library
    for name in ("q4_k", "f16"):
        weights = weights_of(engine, name)
        for dtype in dtypes:
            x = make(rng.standard_normal((2, N, weights.shape[-1])).astype(np.float32), dtype)
            y = engine.matmul(name, x)
            assert type(y) is type(x)
            assert y.dtype == x.dtype
            assert tuple(y.shape) == (2, N, 5)
            rounding = {"float32": 0, "float16": 2.0**-22, "bfloat16": 2.0**-16}[dtype]
            assert close_to(bring(y), bring(x), weights, 5e-4 + rounding)


def test_host_tensors_of_torch(engine: qmm.Engine, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rng.standard_normal((N, 768)).astype(np.float32)).to(torch.bfloat16)
    y = engine.matmul("q6_k", x)
    assert y.dtype is torch.bfloat16
    assert y.device.type == "cpu"
    assert close_to(y.float().numpy(), x.float().numpy(), weights_of(engine, "q6_k"), 6e-4)


def test_strided_arrays_are_used_as_they_are(engine: qmm.Engine, library, rng: np.random.Generator) -> None:
    make, bring, _ = library
    weights = weights_of(engine, "q8_0")
    k = weights.shape[-1]
    for index in (np.s_[:, 1::2, :k], np.s_[1:, ::3, k:], np.s_[:, :, ::2]):
        memory = rng.standard_normal((4, 6, 2 * k)).astype(np.float32)
        x = make(memory, "float32")[index]
        assert close_to(bring(engine.matmul("q8_0", x)), memory[index], weights)


def test_out_of_another_dtype_and_stride(engine: qmm.Engine, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    weights = weights_of(engine, "q5_k")
    x = torch.from_numpy(rng.standard_normal((N, 768)).astype(np.float32)).cuda()
    memory = torch.full((N, 2, 10), torch.nan, device="cuda", dtype=torch.float16)
    out = memory[:, 1, ::2]
    assert engine.matmul("q5_k", x, out=out) is out
    assert close_to(out.float().cpu().numpy(), x.cpu().numpy(), weights)
    assert torch.isnan(memory[:, 0]).all()
    assert torch.isnan(memory[:, 1, 1::2]).all()


def test_out_may_be_x(engine: qmm.Engine, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(rng.standard_normal((N, 96)).astype(np.float32)).cuda()
    expected = engine.matmul("q8_0", x)
    memory = x.clone()
    engine.matmul("q8_0", memory, out=memory[:, :5])
    assert torch.equal(memory[:, :5], expected)


def test_streams_of_every_library(engine: qmm.Engine, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    cupy = pytest.importorskip("cupy")
    from numba import cuda

    x = torch.from_numpy(rng.standard_normal((N, 96)).astype(np.float32)).cuda()
    expected = engine.matmul("q8_0", x)
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True), cuda.stream()):
        y = engine.matmul("q8_0", x, stream=stream)
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        y = engine.matmul("q8_0", x)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_an_empty_batch_is_an_empty_result(engine: qmm.Engine) -> None:
    assert engine.matmul("q8_0", np.empty((0, 96), np.float32)).shape == (0, 5)
    torch = pytest.importorskip("torch")
    assert engine.matmul("q8_0", torch.empty((2, 0, 96), device="cuda")).shape == (2, 0, 5)


def test_arrays_on_the_wrong_side_are_refused(path: Path) -> None:
    torch = pytest.importorskip("torch")
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine, pytest.raises(qmm.ArrayError, match="device 0"):
        engine.matmul("q8_0", torch.zeros((1, 96), device="cuda"))
    with qmm.open(path) as model, qmm.Engine(model, "cuda") as engine, pytest.raises(qmm.ArrayError, match="host"):
        engine.matmul("q8_0", torch.zeros((1, 96), device="cuda"), out=torch.zeros((1, 5)))


def test_copies_take_exactly_their_bytes_and_mapped_ones_none(path: Path) -> None:
    with qmm.open(path) as model:
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
    from numba import cuda

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
    with gpu.replay(work, gpu.stream) as replay:
        replay()
        gpu.synchronize(gpu.stream)
    np.testing.assert_array_equal(out.copy_to_host(), expected)
    times = gpu.time(work, gpu.stream, repeats=3)
    assert len(times) == 3
    assert all(0 < time < 1 for time in times)  # milliseconds: two launches of a few microseconds each
