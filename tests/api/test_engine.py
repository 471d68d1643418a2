"""The engine on the CPU: results against float64, arrays in and out, and every way to ask for the wrong thing."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
from gguf.quants import dequantize

import qmm
from qmm.errors import (
    ArrayError,
    ClosedError,
    DeviceError,
    MappingError,
    QmmError,
    TensorNotFoundError,
    UnsupportedTypeError,
)
from qmm.kernels.ops.cpu import products

SHAPES = {
    "first": ("Q8_0", (5, 96)),
    "legacy": ("Q4_1", (7, 96)),
    "super": ("Q4_K", (3, 512)),
    "experts": ("Q8_0", (2, 3, 64)),
    "norm": ("F32", (50,)),
    "half": ("F16", (4, 33)),
    "empty": ("Q8_0", (0, 64)),
    "hollow": ("Q8_0", (3, 0)),
    "last": ("Q8_0", (5, 96)),  # the same bytes as first, at the very end of the file
}
TOLERANCE = {"int8": 5e-4, "f16": 1e-6}  # qmm/verify/check.py derives them
IQ1_S = 19  # a type without a kernel

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(7)
    tensors: dict[str, tuple[str | int, tuple[int, ...], bytes]] = {"exotic": (IQ1_S, (1, 256), bytes(50))}
    for name, (kind, shape) in SHAPES.items():
        tensors[name] = (kind, shape, gguf_files.random_blocks(kind, shape, random))
    tensors["last"] = tensors["first"]
    file = tmp_path_factory.mktemp("engine") / "model.gguf"
    gguf_files.write_gguf(file, tensors)
    return file


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[qmm.Model]:
    with qmm.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def engine(model: qmm.Model) -> Iterator[qmm.Engine]:
    with qmm.Engine(model, "cpu") as made:
        yield made


def weights_of(tensor: qmm.Tensor) -> Floats:
    """Decode a tensor with gguf: ``(m, k)`` float32."""
    rows = tensor.data.reshape(tensor.m, -1)
    weights: Floats = dequantize(rows, gguf.GGMLQuantizationType[tensor.type]).reshape(tensor.m, tensor.k)
    return weights


def nmse(y: Floats, x: Floats, tensor: qmm.Tensor) -> float:
    reference = x.reshape(-1, tensor.k).astype(np.float64) @ weights_of(tensor).T.astype(np.float64)
    return float(np.sum((y.reshape(reference.shape) - reference) ** 2) / np.sum(reference**2))


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("activations", ["int8", "f16"])
@pytest.mark.parametrize("name", ["first", "legacy", "super", "experts"])
def test_products_are_within_tolerance(
    engine: qmm.Engine, model: qmm.Model, rng: np.random.Generator, name: str, activations: str
) -> None:
    x = normal(rng, 33, model[name].k)
    y = engine.matmul(name, x, activations=activations)
    assert y.shape == (33, *model[name].shape[:-1])
    assert nmse(y, x, model[name]) <= TOLERANCE[activations]


@pytest.mark.parametrize("name", ["norm", "half"])
def test_plain_tensors_are_multiplied_by_unquantized_activations(
    engine: qmm.Engine, model: qmm.Model, rng: np.random.Generator, name: str
) -> None:
    x = normal(rng, 70, model[name].k)
    assert nmse(engine.matmul(name, x, activations="int8"), x, model[name]) <= TOLERANCE["f16"]


def test_the_engines_activations_are_the_default_of_each_call(model: qmm.Model, rng: np.random.Generator) -> None:
    x = normal(rng, 2, 96)
    with qmm.Engine(model, "cpu", activations="f16") as floats, qmm.Engine(model, "cpu") as bytes_:
        np.testing.assert_array_equal(floats.matmul("first", x), bytes_.matmul("first", x, activations="f16"))
        assert not np.array_equal(floats.matmul("first", x), bytes_.matmul("first", x))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9])
def test_a_column_does_not_depend_on_the_others(engine: qmm.Engine, rng: np.random.Generator, n: int) -> None:
    x = normal(rng, n, 96)
    together = engine.matmul("first", x)
    for row in range(n):
        # Four columns at once add up in another order than one.
        np.testing.assert_allclose(engine.matmul("first", x[row]), together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 1, 3)])
def test_leading_dimensions_are_kept(engine: qmm.Engine, rng: np.random.Generator, leading: tuple[int, ...]) -> None:
    x = normal(rng, *leading, 64)
    y = engine.matmul("experts", x)
    assert y.shape == (*leading, 2, 3)
    flat = engine.matmul("experts", x.reshape(-1, 64))
    np.testing.assert_array_equal(y.reshape(flat.shape), flat)


@pytest.mark.parametrize("shape", [(0, 96), (3, 0, 96)])
def test_no_activations_give_no_results(engine: qmm.Engine, shape: tuple[int, ...]) -> None:
    assert engine.matmul("first", np.zeros(shape, np.float32)).shape == (*shape[:-1], 5)


def test_a_tensor_without_rows_gives_rows_without_values(engine: qmm.Engine) -> None:
    assert engine.matmul("empty", np.zeros((3, 64), np.float32)).shape == (3, 0)
    assert engine.dequantize("empty").shape == (0, 64)


@pytest.mark.parametrize("shape", [(0,), (1, 0), (2, 5, 0), (0, 0)])
def test_rows_without_weights_give_zeros(engine: qmm.Engine, shape: tuple[int, ...]) -> None:
    y = engine.matmul("hollow", np.empty(shape, np.float32), np.full((*shape[:-1], 3), np.nan, np.float32))
    np.testing.assert_array_equal(y, np.zeros((*shape[:-1], 3)))
    assert engine.dequantize("hollow").shape == (3, 0)


@pytest.mark.parametrize("name", ["first", "last"])
def test_the_same_bytes_give_the_same_bits_wherever_they_lie(
    engine: qmm.Engine, rng: np.random.Generator, name: str
) -> None:
    x = normal(rng, 3, 96)
    assert engine.matmul(name, x).tobytes() == engine.matmul("first", x).tobytes()


def test_strides_of_x_do_not_change_a_bit(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = normal(rng, 6, 96)
    expected = engine.matmul("first", x)
    wide = np.zeros((6, 200), np.float32)
    wide[:, 1:193:2] = x
    for same in (np.asfortranarray(x), wide[:, 1:193:2], x[::-1].copy()[::-1], x[:, ::-1].copy()[:, ::-1]):
        assert not same.flags.c_contiguous
        np.testing.assert_array_equal(engine.matmul("first", same), expected)
    repeated = engine.matmul("first", np.broadcast_to(x[0], (4, 96)))
    np.testing.assert_array_equal(repeated, engine.matmul("first", np.repeat(x[:1], 4, 0)))


def test_float16_comes_back_as_float16(engine: qmm.Engine, model: qmm.Model, rng: np.random.Generator) -> None:
    x = normal(rng, 3, 96).astype(np.float16)
    y = engine.matmul("first", x, activations="f16")
    assert y.dtype == np.float16
    expected = engine.matmul("first", x.astype(np.float32), activations="f16").astype(np.float16)
    np.testing.assert_array_equal(y, expected)


def test_x_is_only_read(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = normal(rng, 2, 96)
    before = x.tobytes()
    x.flags.writeable = False
    engine.matmul("first", x)
    assert x.tobytes() == before


def test_out_is_filled_and_returned(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = normal(rng, 4, 96)
    expected = engine.matmul("first", x)
    wide = np.full((4, 9), np.nan, np.float32)
    strided = wide[:, 2:7]
    for out in (np.empty((4, 5), np.float32), np.empty((4, 5), np.float32, "F"), strided):
        assert engine.matmul("first", x, out=out) is out
        np.testing.assert_array_equal(out, expected)
    assert np.isnan(wide[:, [0, 1, 7, 8]]).all()


def test_out_may_be_of_another_dtype_than_x(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = normal(rng, 4, 96)
    out = np.empty((4, 5), np.float16)
    engine.matmul("first", x, out=out)
    np.testing.assert_array_equal(out, engine.matmul("first", x).astype(np.float16))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_no_numbers_show_in_the_result(engine: qmm.Engine, bad: float) -> None:
    x = np.ones((2, 96), np.float32)
    x[0, 40] = bad
    for activations in ("int8", "f16"):
        y = engine.matmul("first", x, activations=activations)
        assert not np.isfinite(y[0]).any()
        assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("empty", "hollow")])
def test_dequantized_weights_are_ggufs_bit_for_bit(engine: qmm.Engine, model: qmm.Model, name: str) -> None:
    tensor = model[name]
    expected = weights_of(tensor)
    assert engine.dequantize(name).shape == tensor.shape
    assert engine.dequantize(tensor).tobytes() == expected.tobytes()
    for first, last in [(0, tensor.m), (tensor.m // 2, tensor.m), (tensor.m, tensor.m)]:
        rows = engine.dequantize(name, first, last)
        assert rows.shape == (last - first, tensor.k)
        assert rows.tobytes() == expected[first:last].tobytes()


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (0, 6), (3, 2), (6, None)])
def test_rows_that_the_tensor_has_not_are_refused(engine: qmm.Engine, first: int, last: int | None) -> None:
    with pytest.raises(ArrayError, match="has 5 rows, not rows"):
        engine.dequantize("first", first, last)


@pytest.mark.parametrize("shape", [(95,), (2, 97), (96, 2), ()])
def test_wrong_k_is_refused_with_both_numbers(engine: qmm.Engine, shape: tuple[int, ...]) -> None:
    with pytest.raises(ArrayError, match=r"model\.gguf: tensor 'first' has k = 96") as caught:
        engine.matmul("first", np.zeros(shape, np.float32))
    assert str(shape) in str(caught.value)


def test_wrong_dtype_is_refused(engine: qmm.Engine) -> None:
    with pytest.raises(ArrayError, match="float64"):
        engine.matmul("first", np.zeros(96))
    with pytest.raises(ArrayError, match="list"):
        engine.matmul("first", [0.0] * 96)


def test_wrong_out_is_refused_before_anything_is_stored(engine: qmm.Engine) -> None:
    x = np.ones((2, 96), np.float32)
    read_only = np.zeros((2, 5), np.float32)
    read_only.flags.writeable = False
    cases: list[tuple[Any, str]] = [
        (np.zeros((2, 4), np.float32), r"\(2, 4\).*\(2, 5\)"),
        (np.zeros((5, 2), np.float32), r"\(5, 2\)"),
        (np.zeros((2, 5)), "float64"),
        (read_only, "read-only"),
        (np.lib.stride_tricks.as_strided(np.zeros(5, np.float32), (2, 5), (0, 4)), "share memory"),
        ([[0.0] * 5] * 2, "list"),
    ]
    for out, message in cases:
        with pytest.raises(ArrayError, match=message):
            engine.matmul("first", x, out=out)


def test_a_masked_array_is_refused_for_its_mask_would_be_lost(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x, out = normal(rng, 2, 96), np.ma.zeros((2, 5), np.float32)
    masked = np.ma.masked_array(x, x > 0)
    for arrays in ({"x": masked}, {"x": x, "out": out}):
        with pytest.raises(ArrayError, match=r"masked.*x\.filled\(0\)"):
            engine.matmul("first", **arrays)
    zeroed = np.where(x > 0, np.float32(0), x)
    np.testing.assert_array_equal(engine.matmul("first", masked.filled(0)), engine.matmul("first", zeroed))


def test_other_arrays_of_numpys_are_used_for_their_values(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = normal(rng, 2, 96)
    expected = engine.matmul("first", x)
    odd = np.frombuffer(b"\0" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    assert not odd.flags.aligned
    for same in (odd, x.view(np.matrix), x.view(np.recarray)):
        np.testing.assert_array_equal(engine.matmul("first", same), expected)
    odd_out = np.frombuffer(bytearray(1 + expected.nbytes), np.float32, offset=1).reshape(expected.shape)
    np.testing.assert_array_equal(engine.matmul("first", x, out=odd_out), expected)


def test_out_may_share_memory_with_x(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = normal(rng, 5, 96)
    expected = engine.matmul("first", x)
    for part in (np.s_[:, :5], np.s_[:, 91:], np.s_[::-1, 40:45]):
        within = x.copy()
        np.testing.assert_array_equal(engine.matmul("first", within, out=within[part]), expected)


def test_a_stream_is_for_arrays_on_a_gpu(engine: qmm.Engine) -> None:
    with pytest.raises(ArrayError, match="stream="):
        engine.matmul("first", np.zeros(96, np.float32), stream=1)


def test_unknown_activations_are_refused_with_those_that_there_are(engine: qmm.Engine, model: qmm.Model) -> None:
    with pytest.raises(ArrayError, match="int8, f16"):
        engine.matmul("first", np.zeros(96, np.float32), activations="int4")
    with pytest.raises(ArrayError, match="int8, f16"):
        engine.matmul("first", np.zeros(96, np.float32), activations="")
    with pytest.raises(ArrayError, match="int8, f16"):
        qmm.Engine(model, "cpu", activations="q8")


@pytest.mark.parametrize("tensor", [3, None, ["first"], b"first"])
def test_what_is_no_name_and_no_tensor_is_refused(engine: qmm.Engine, tensor: Any) -> None:
    with pytest.raises(ArrayError, match=r"a tensor is its name or a qmm.Tensor, not "):
        engine.matmul(tensor, np.zeros(96, np.float32))


def test_unknown_tensor_suggests_a_near_name(engine: qmm.Engine) -> None:
    with pytest.raises(TensorNotFoundError, match=r"'frist'.*Did you mean.*'first'"):
        engine.matmul("frist", np.zeros(96, np.float32))


def test_a_type_without_a_kernel_is_refused_by_name(engine: qmm.Engine) -> None:
    with pytest.raises(UnsupportedTypeError, match="IQ1_S"):
        engine.matmul("exotic", np.zeros(256, np.float32))
    with pytest.raises(UnsupportedTypeError, match="IQ1_S"):
        engine.dequantize("exotic")


def test_a_tensor_of_another_model_is_refused(engine: qmm.Engine, path: Path) -> None:
    with qmm.open(path) as other, pytest.raises(ArrayError, match="this engine is for"):
        engine.matmul(other["first"], np.zeros(96, np.float32))


def test_an_engine_for_some_tensors_refuses_the_others(model: qmm.Model) -> None:
    with qmm.Engine(model, "cpu", tensors=["first"]) as engine:
        engine.matmul("first", np.zeros(96, np.float32))
        with pytest.raises(TensorNotFoundError, match=r"for 1 tensors.*'last'"):
            engine.matmul("last", np.zeros(96, np.float32))
    with pytest.raises(TensorNotFoundError, match="nonesuch"):
        qmm.Engine(model, "cpu", tensors=["nonesuch"])


@pytest.mark.parametrize("given", [None, 3])
def test_what_is_neither_a_model_nor_a_path_is_refused(given: Any) -> None:
    for opening in (qmm.open, qmm.Engine):
        with pytest.raises(qmm.errors.GGUFError, match=rf"opened by its path.*, not by {given}; qmm.Engine also takes"):
            opening(given)


def test_one_tensor_is_a_list_of_one(engine: qmm.Engine) -> None:
    x = np.ones(96, np.float32)
    expected = engine.matmul("first", x)
    for one in ("first", engine.model["first"]):
        (y,) = engine.matmul_each(one, x)
        np.testing.assert_array_equal(y, expected)


def test_a_closed_engine_says_so(model: qmm.Model) -> None:
    engine = qmm.Engine(model, "cpu")
    engine.close()
    engine.close()
    assert engine.closed
    assert "closed" in repr(engine)
    assert engine.weights_nbytes == 0
    for use in (lambda: engine.matmul("first", np.zeros(96, np.float32)), lambda: engine.dequantize("first")):
        with pytest.raises(ClosedError, match="Create another"):
            use()


def test_a_closed_model_makes_no_engine_but_engines_outlive_it(path: Path, rng: np.random.Generator) -> None:
    x = normal(rng, 96)
    with qmm.open(path) as model:
        engine = qmm.Engine(model, "cpu")
        expected = engine.matmul("first", x)
    np.testing.assert_array_equal(engine.matmul("first", x), expected)
    with pytest.raises(ClosedError):
        qmm.Engine(model, "cpu")
    engine.close()


def test_closing_everything_unmaps_the_file(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    with qmm.open(copy) as model, qmm.Engine(model, "cpu") as engine:
        engine.matmul("first", np.zeros(96, np.float32))
        assert str(copy) in Path("/proc/self/maps").read_text()
    assert str(copy) not in Path("/proc/self/maps").read_text()


WHOLE_NUMBERS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.array, bool]


@pytest.mark.parametrize("kind", WHOLE_NUMBERS, ids=lambda kind: kind.__name__)
def test_rows_may_be_whole_numbers_of_any_kind(engine: qmm.Engine, kind: Any) -> None:
    """A token's id is often NumPy's; added to an address a uint64 was a float64, and others overflowed."""
    right = engine.dequantize("legacy")
    np.testing.assert_array_equal(
        engine.dequantize("legacy", kind(1), kind(1) + kind(0) if kind is bool else 1), right[1:1]
    )
    np.testing.assert_array_equal(engine.dequantize("legacy", kind(1)), right[1:])
    np.testing.assert_array_equal(engine.dequantize("legacy", 0, kind(1)), right[:1])
    if kind is not bool:
        np.testing.assert_array_equal(engine.dequantize("legacy", kind(5), kind(7)), right[5:7])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ((np.int8(-1), 2), r"np.int8\(-1\) to 2"),
        ((0, np.uint64(8)), r"0 to np.uint64\(8\)"),
        ((1.0, 2), "1.0 to 2"),
    ],
)
def test_rows_that_there_are_not_are_refused_whatever_their_kind(
    engine: qmm.Engine, rows: tuple[Any, Any], says: str
) -> None:
    with pytest.raises(ArrayError, match=rf"tensor 'legacy' has 7 rows, not rows {says}"):
        engine.dequantize("legacy", *rows)


def test_an_engine_may_be_made_for_one_name(model: qmm.Model) -> None:
    for chosen in (model["legacy"], [model["legacy"]]):
        with qmm.Engine(model, "cpu", tensors=chosen) as engine:
            engine.matmul("legacy", np.ones(model["legacy"].k, np.float32))
    with qmm.Engine(model, "cpu", tensors="legacy") as engine:
        assert engine.matmul("legacy", np.zeros(96, np.float32)).shape == (7,)
        with pytest.raises(TensorNotFoundError, match="for 1 tensors, and 'first' is not among them"):
            engine.matmul("first", np.zeros(96, np.float32))


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_an_engine_may_be_made_of_a_path_and_closes_the_model_that_it_opened(
    path: Path, tmp_path: Path, kind: Any
) -> None:
    path = Path(shutil.copy(path, tmp_path))
    with qmm.Engine(kind(path), "cpu") as engine:
        assert engine.model.path == path
        assert engine.matmul(engine.model["legacy"], np.zeros(96, np.float32)).shape == (7,)
    assert engine.model.closed
    assert str(path) not in Path("/proc/self/maps").read_text()
    with pytest.raises(FileNotFoundError):
        qmm.Engine(f"{path}.missing", "cpu")


def test_a_device_may_be_a_whole_number_of_any_kind(model: qmm.Model) -> None:
    for number in (99, np.int64(99), np.uint8(99)):
        with pytest.raises(DeviceError, match=r"no CUDA device 99|CUDA cannot be used"):
            qmm.Engine(model, number)
    for wrong in (True, 0.0):
        with pytest.raises(DeviceError, match="there is no device"):
            qmm.Engine(model, wrong)  # type: ignore[arg-type]


def test_a_file_that_changed_is_not_read(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    with qmm.open(copy) as model, qmm.Engine(model, "cpu") as engine:
        engine.matmul("first", np.zeros(96, np.float32))
        with copy.open("r+b") as file:
            file.truncate(copy.stat().st_size // 2)  # reading the pages behind would end the process
        with pytest.raises(MappingError, match="changed since it was opened"):
            engine.matmul("last", np.zeros(96, np.float32))


def test_explanation_says_where_and_why(engine: qmm.Engine) -> None:
    assert (engine.device, engine.placement) == ("cpu", "host")
    assert engine.explanation.startswith("on the CPU")
    assert "\n" not in engine.explanation
    assert engine.explanation in repr(engine)


def test_contradictions_are_refused(model: qmm.Model) -> None:
    with pytest.raises(DeviceError, match="mapped"):
        qmm.Engine(model, "cpu", "mapped")
    with pytest.raises(DeviceError, match="tpu"):
        qmm.Engine(model, "tpu")


def test_threads_share_an_engine(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = normal(rng, 8, 512)
    expected = engine.matmul("super", x)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(20):
            y = engine.matmul("super", x)
            if not np.array_equal(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_multiplies_too(engine: qmm.Engine, rng: np.random.Generator) -> None:
    x = normal(rng, 96)
    expected = engine.matmul("first", x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking a process with threads
        child = os.fork()
    if child == 0:
        os._exit(0 if engine.forked and np.array_equal(engine.matmul("first", x), expected) else 1)
    assert not engine.forked
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_plan_is_for_the_gpu(engine: qmm.Engine) -> None:
    with pytest.raises(DeviceError, match="CUDA graph"):
        engine.plan([("first", np.zeros((1, 96), np.float32), np.zeros((1, 5), np.float32))])


def test_every_refusal_is_a_qmm_error() -> None:
    for error in (ArrayError, ClosedError, DeviceError, MappingError, TensorNotFoundError, UnsupportedTypeError):
        assert issubclass(error, QmmError)


def test_products_with_the_same_activations_quantize_them_once(
    engine: qmm.Engine, model: qmm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in SHAPES if model[name].k == model["first"].k]
    assert len(names) > 1
    x = np.random.default_rng(3).standard_normal((2, 3, model["first"].k), dtype=np.float32)
    expected = [engine.matmul(name, x) for name in names]
    kinds: list[bool] = []
    usual = products.quantize

    def counted(x: Floats, int8: bool) -> Any:
        kinds.append(int8)
        return usual(x, int8)

    monkeypatch.setattr(products, "quantize", counted)
    outs = [np.empty_like(y) for y in expected]
    assert all(one is other for one, other in zip(engine.matmul_each(names, x, outs), outs, strict=True))
    assert len(kinds) == len(set(kinds))  # once for each kind of activations
    for one, other, y in zip(engine.matmul_each(names, x), outs, expected, strict=True):
        np.testing.assert_array_equal(one, y)
        np.testing.assert_array_equal(other, y)
    with pytest.raises(qmm.ArrayError, match=f"{len(names)} products, but 1 outs"):
        engine.matmul_each(names, x, outs[:1])


def test_results_go_straight_to_where_they_are_wanted(engine: qmm.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[int] = []
    usual = products.matmul

    def noted(block_format: Any, address: int, m: int, k: int, x: Any, out: Floats, *rest: Any) -> None:
        targets.append(out.ctypes.data)
        usual(block_format, address, m, k, x, out, *rest)

    monkeypatch.setattr(products, "matmul", noted)
    tensor = engine.model["first"]
    x = np.random.default_rng(4).standard_normal((2, tensor.k), dtype=np.float32)
    y, out = engine.matmul("first", x), np.empty((2, tensor.m), np.float32)
    engine.matmul("first", x, out)
    assert targets == [y.ctypes.data, out.ctypes.data]
    # Where the results' memory is no such matrix, or is that of x, they come by way of another.
    halves, strided = np.empty((2, tensor.m), np.float16), np.empty((tensor.m, 2), np.float32).T
    for other in (halves, strided):
        engine.matmul("first", x, other)
        np.testing.assert_allclose(other, y, rtol=1e-3)
    assert not {halves.ctypes.data, strided.ctypes.data} & set(targets[2:])


@pytest.mark.parametrize("activations", ["int8", "f16"])
def test_results_may_take_the_place_of_the_activations(tmp_path: Path, activations: str) -> None:
    gguf_files.write_gguf(
        tmp_path / "square.gguf",
        {"w": ("Q8_0", (64, 64), gguf_files.random_blocks("Q8_0", (64, 64), np.random.default_rng(5)))},
    )
    with qmm.Engine(tmp_path / "square.gguf", "cpu", activations=activations) as engine:
        x = np.random.default_rng(6).standard_normal((3, 64), dtype=np.float32)
        expected = engine.matmul("w", x)
        engine.matmul("w", x, x)
        np.testing.assert_array_equal(x, expected)
