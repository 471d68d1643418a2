"""Activations on the CPU: what they are quantized to, from any dtype, and that products share them."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_activations import quantized
from cpu_weights import Weights
from decoded_blocks import assert_same_bits

from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.cpu import products as cpu
from qmm.kernels.ops.cpu.quantize import CPUActivations, quantize


def fields(activations: CPUActivations) -> tuple[np.ndarray, ...]:
    """``q (n, k)``, scales ``(n, k / 32)``, sums ``(n, k / 16)`` and units ``(n,)``; or float32 values and units."""
    values, n = activations.values, activations.n
    if not activations.int8:
        return values, activations.units
    return values["q"].reshape(n, -1), values["scale"], values["sums"].reshape(n, -1), activations.units


def test_activations_are_quantized_as_numpy_does(rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 320)).astype(np.float32) * np.exp2(rng.integers(-60, 60, (5, 1))).astype(np.float32)
    x[0, 32:64] = 0
    x[1, 64:96] = np.tile(np.arange(-3.5, 4.5), 4)  # ties, with the largest value below
    x[1, 64] = 127
    x[2, :32] = np.linspace(-1, 1, 32, dtype=np.float32) * np.float32(127 * 2.0**-126)  # the smallest of a normal scale
    x[3, :32] = x[2, :32] * np.float32(1 - 2.0**-20)  # a subnormal one
    x[4, :32] = np.arange(-16, 16) * np.float32(2.0**-149)
    q, scales, sums, units = fields(quantize(x, int8=True))
    expected_q, expected_scales, expected_sums = quantized(x)
    np.testing.assert_array_equal(q.reshape(expected_q.shape), expected_q)
    assert_same_bits(scales, expected_scales)
    assert_same_bits(sums, expected_sums)
    assert np.abs(q).max() == 127
    assert scales[2, 0] >= np.float32(2.0**-126) > scales[3, 0]
    assert q[4, :32].tolist() == list(range(-16, 16))  # in units of the smallest number: exact
    assert units.tolist() == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("power", [96, 100, 127, -97, -110, -126, -140])
def test_activations_near_the_ends_of_float32_are_quantized_as_those_in_the_middle(
    power: int, rng: np.random.Generator
) -> None:
    """``q`` and scales are those of the same numbers times a power of two, where they all are normal numbers."""
    x = np.ldexp(rng.integers(-512, 513, (2, 96)).astype(np.float32), -9)
    x[:, 5] = 1
    q, scales, sums, _ = fields(quantize(x, int8=True))
    at_end = fields(quantize(np.ldexp(x, power), int8=True))
    unit = at_end[3]
    np.testing.assert_array_equal(unit, np.full(2, 2.0**32 if power > 0 else 2.0**-32, np.float32))
    np.testing.assert_array_equal(at_end[0], q)
    assert_same_bits(at_end[1], np.ldexp(scales, power - np.log2(unit[0]).astype(int)))
    assert_same_bits(at_end[2], np.ldexp(sums, power - np.log2(unit[0]).astype(int)))


@pytest.mark.parametrize("power", [0, 100, -100])
@pytest.mark.parametrize("k", [1, 16, 899])
def test_float_activations_are_in_units_and_padded_with_zeros(k: int, power: int, rng: np.random.Generator) -> None:
    x = np.ldexp(rng.uniform(1, 2, (3, k)).astype(np.float32), power)
    x[1] = 1
    made = quantize(x, int8=False)
    unit = np.float32(1 if power == 0 else 2.0**32 if power > 0 else 2.0**-32)
    np.testing.assert_array_equal(made.units, [unit, 1, unit])
    assert made.values.shape == (3, -(-k // 16) * 16)
    assert_same_bits(made.values[:, :k] * made.units[:, None], x)
    assert not made.values[:, k:].any()


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
def test_any_strides_and_dtypes_give_the_values_of_their_float32(int8: bool, rng: np.random.Generator) -> None:
    numbers = rng.standard_normal((4, 64)).astype(np.float16)
    bits = numbers.astype(np.float32).view(np.uint32) >> 16
    bfloats = (bits << 16).view(np.float32)
    wide = np.zeros((8, 192), np.float32)
    wide[::2, 64:128] = numbers
    odd = np.frombuffer(b"\0" + numbers.astype(np.float32).tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 64)
    for x, values in [
        (numbers, numbers),
        (np.asfortranarray(numbers), numbers),
        (bits.astype(np.uint16), bfloats),
        (wide[::2, 64:128], numbers),  # rows apart from each other: read as they lie
        (wide[6::-2, 64:128], numbers[::-1]),
        (np.repeat(wide[::2, 64:128], 2, axis=1)[:, ::2], numbers),
        (odd, numbers),
    ]:
        before = x.copy()
        actual, expected = quantize(x, int8), quantize(np.ascontiguousarray(values, np.float32), int8)
        for one, other in zip(fields(actual), fields(expected), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(x, before)


def test_other_dtypes_are_refused() -> None:
    for dtype in (np.float64, np.int32):
        with pytest.raises(TypeError, match=f"float16 or bfloat16, not {np.dtype(dtype)}"):
            quantize(np.ones((1, 32), dtype), int8=True)


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
def test_products_share_activations(int8: bool, rng: np.random.Generator) -> None:
    """Q, K and V: results are those of each by itself, though ``x`` is something else by then."""
    x = rng.standard_normal((5, 512)).astype(np.float32)
    tensors = [Weights.random(FORMATS[name], 7, 512, rng) for name in ("Q8_0", "Q8_0", "Q4_K")]
    alone = [tensor.matmul(x, "int8" if int8 else "f16") for tensor in tensors]
    shared = quantize(x, int8)
    x[:] = np.nan
    for tensor, expected in zip(tensors, alone, strict=True):
        out = np.empty_like(expected)
        cpu.matmul(tensor.block_format, tensor.data.ctypes.data, 7, 512, shared, out)
        assert_same_bits(out, expected)


def test_results_are_written_where_they_go(rng: np.random.Generator) -> None:
    """Into rows of a larger array, and over the activations."""
    tensor = Weights.random(FORMATS["Q8_0"], 32, 32, rng)
    x = rng.standard_normal((3, 32)).astype(np.float32)
    expected = tensor.matmul(x, "int8")
    larger = np.full((6, 100), np.nan, np.float32)
    for out in (larger[::2, 10:42], x):
        cpu.matmul(tensor.block_format, tensor.data.ctypes.data, 32, 32, x, out)
        assert_same_bits(out, expected)
    larger[::2, 10:42] = np.nan
    assert np.isnan(larger).all()


def test_what_cannot_be_multiplied_or_stored_is_refused(rng: np.random.Generator) -> None:
    q8_0, f16 = Weights.random(FORMATS["Q8_0"], 3, 64, rng), Weights.random(FORMATS["F16"], 3, 64, rng)
    x, out = np.ones((2, 64), np.float32), np.zeros((2, 3), np.float32)
    address = q8_0.data.ctypes.data
    with pytest.raises(ValueError, match="Q8_0 of k = 64 cannot be multiplied by int8 activations of k = 32"):
        cpu.matmul(q8_0.block_format, address, 3, 64, quantize(x[:, :32], int8=True), out)
    with pytest.raises(ValueError, match="F16 of k = 64 cannot be multiplied by int8"):
        cpu.matmul(f16.block_format, f16.data.ctypes.data, 3, 64, quantize(x, int8=True), out)
    for wrong in (out[:1], out.T, np.zeros((2, 3), np.float64), np.zeros((3, 2), np.float32).T):
        with pytest.raises(ValueError, match=r"results are \(2, 3\) float32"):
            cpu.matmul(q8_0.block_format, address, 3, 64, x, wrong)
    assert not out.any()
