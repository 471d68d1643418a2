"""What is right beside float64 where weights are infinite, NaN, huge, tiny or zero: real files on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import nbytes_of, random_blocks, write_gguf

import qmm
from qmm.verify.check import TOLERANCES, activations, check
from qmm.verify.oracle import Oracle

LOWEST = float(np.finfo(np.float32).min)
SPECIAL = {"-inf": -np.inf, "nan": np.nan, "lowest": LOWEST, "1e30": 1e30}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def q8_0(scale: float, values: np.ndarray) -> bytes:
    """One row a block of 32."""
    scales = np.full((len(values), 1), scale, np.float16).view(np.uint8)
    return np.hstack([scales, values.astype(np.int8).view(np.uint8)]).tobytes()


def weights() -> dict[str, np.ndarray]:
    made = {f"mask {name}": np.triu(np.full((20, 20), value, np.float32), 1) for name, value in SPECIAL.items()}
    for name, value in SPECIAL.items():
        one = made[f"one {name}"] = normal(20, 33)
        one[3, 5] = value
    both = made["both infinities"] = normal(6, 33)
    both[0, 1], both[1, 1], both[2, 1:3] = np.inf, -np.inf, (np.inf, -np.inf)
    made["negative zeros"] = np.full((5, 33), -0.0, np.float32)
    made["subnormal"] = normal(20, 33) * np.float32(1e-44)
    made["nearly subnormal"] = normal(20, 33) * np.float32(1e-36)
    made["cancel"] = np.tile(np.array([1e30, -1e30], np.float32), (70, 16))
    made["one column"] = np.zeros((70, 33), np.float32)
    made["one column"][:, 7] = 3
    made["one value"] = np.full((1, 1), LOWEST, np.float32)
    made["no rows"], made["no columns"] = np.zeros((0, 33), np.float32), np.zeros((3, 0), np.float32)
    return made


ALTERNATING = np.tile([1, 0], (70, 16))
BLOCKS = {
    "infinite scale": q8_0(np.inf, ALTERNATING),
    "NaN scale": q8_0(np.nan, ALTERNATING),
    "subnormal scale": q8_0(6e-8, np.tile(np.arange(-16, 16), (70, 1))),
    "zero scale": q8_0(0, ALTERNATING),
    "constant": q8_0(1, np.ones((70, 32))),
    "one of a block": q8_0(1, np.eye(32)[:1].repeat(70, 0)),
}
NAMES = (*weights(), *BLOCKS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qmm.Engine]:
    tensors: dict[str, Any] = {name: ("F32", w.shape, w.tobytes()) for name, w in weights().items()}
    tensors |= {name: ("Q8_0", (70, 32), data) for name, data in BLOCKS.items()}
    path = tmp_path_factory.mktemp("oracle") / "odd.gguf"
    write_gguf(path, tensors)
    with qmm.Engine(path, "cpu") as made:
        yield made


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_right_products_pass_whatever_the_weights_are(engine: qmm.Engine, name: str) -> None:
    found = check(engine, engine.model[name], (1, 3), tuple(TOLERANCES))
    assert found.ok, found
    assert found.bit_exact is True


def oracle(engine: qmm.Engine, name: str, n: int = 4) -> tuple[Oracle, np.ndarray]:
    """The oracle of a tensor, and the right products in float32."""
    made = Oracle(engine.model[name], activations(engine.model[name], n, 0))
    with np.errstate(over="ignore"):
        y = made.products.astype(np.float32)
    assert made.nmse(y) <= 1e-12
    return made, y


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mask -inf", np.nan),  # 0 in its last row: neither infinite nor NaN there
        ("mask -inf", np.inf),
        ("one nan", np.nan),
        ("one -inf", np.inf),
        ("one 1e30", np.inf),
        ("one 1e30", 5.0),
        ("subnormal", 1e-38),
        ("negative zeros", 1e-30),
        ("constant", np.nan),
        ("zero scale", 1.0),
    ],
)
def test_one_wrong_result_is_found(engine: qmm.Engine, name: str, wrong: float) -> None:
    """Also where another row is huge."""
    expected, y = oracle(engine, name)
    assert np.isfinite(expected.products[0, -1])
    y[0, -1] += wrong
    assert not expected.nmse(y) <= TOLERANCES["int8"]


@pytest.mark.parametrize("instead", [0.0, 1.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("name", "row"), [("one -inf", 3), ("one nan", 3), ("both infinities", 0)])
def test_what_is_not_finite_must_be_the_same(engine: qmm.Engine, name: str, row: int, instead: float) -> None:
    expected, y = oracle(engine, name)
    same = np.array_equal(y[0, row], np.float32(instead), equal_nan=True)
    y[0, row] = instead
    assert (expected.nmse(y) <= 1e-12) is bool(same)


def test_a_block_whose_scale_is_not_finite_gives_no_number(engine: qmm.Engine) -> None:
    expected, y = oracle(engine, "infinite scale")
    y[:] = np.inf
    assert expected.nmse(y) == 0
    y[1, 1] = 1
    assert expected.nmse(y) == np.inf


def test_sums_may_overflow_only_where_float32_ends(engine: qmm.Engine) -> None:
    expected, y = oracle(engine, "mask lowest")
    for value in (np.inf, -np.inf, np.nan):
        y[0, 0] = value  # of 19 weights
        assert expected.nmse(y) <= 1e-12
    y[0, 19] = -np.inf  # of zeros alone
    assert expected.nmse(y) == np.inf


def test_a_zero_has_no_sign(engine: qmm.Engine) -> None:
    expected, y = oracle(engine, "negative zeros")
    assert expected.nmse(np.zeros_like(y)) == expected.nmse(-np.zeros_like(y)) == 0


def test_quantization_alone_is_within_the_tolerance_of_int8_and_not_of_f16(tmp_path: Path) -> None:
    """For every type of sum: also of equal weights, and of one weight a row."""
    x = normal(64, 32)
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    rounded = np.rint(x / scale) * scale
    rows = {"any": random_blocks("Q8_0", (64, 32), np.random.default_rng(1)), **BLOCKS}
    names = ("any", "constant", "one of a block", "subnormal scale")
    write_gguf(
        tmp_path / "m.gguf", {n: ("Q8_0", (len(rows[n]) // nbytes_of("Q8_0", (1, 32)), 32), rows[n]) for n in names}
    )
    with qmm.Engine(tmp_path / "m.gguf", "cpu") as engine:
        for name in names:
            y = rounded @ engine.dequantize(name).T
            assert TOLERANCES["f16"] < Oracle(engine.model[name], x).nmse(y.astype(np.float32)) < TOLERANCES["int8"]
