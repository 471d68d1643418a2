"""The CPU's products and dequantization: weights bit for bit, products within derived bounds.

In bounds, ``u = 2**-24`` is the rounding of float32: a sum errs by at most about ``t u`` times the sum of its terms'
magnitudes, where t is the number of roundings on a term's way. Every result is held to its own bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from cpu_activations import quantized
from cpu_weights import COLUMNS, Weights, columns_for, each_format, each_product, widths_of
from decoded_blocks import assert_same_bits
from gguf_files import small_blocks

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.ops.cpu import parallel, products

U = 2.0**-24
ROWS = (1, 3, 37)


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((actual - expected) ** 2) / np.sum(expected**2))


# Dequantization -------------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("extreme", [False, True], ids=["ordinary", "extreme"])
def test_dequantized_weights_are_gguf_s_bit_for_bit(
    block_format: Format, extreme: bool, rng: np.random.Generator
) -> None:
    for m, k in itertools.product((1, 5, 37), widths_of(block_format)):
        weights = Weights.random(block_format, m, k, rng, extreme)
        assert_same_bits(weights.dequantize(), weights.values)


@each_format
def test_any_bytes_are_dequantized_as_gguf_does(block_format: Format, rng: np.random.Generator) -> None:
    weights = Weights.of(block_format, rng.bytes(512 * block_format.block_nbytes), 8)  # NaN and infinite scales, too
    assert_same_bits(weights.dequantize(), weights.values)


# Products -------------------------------------------------------------------------------------------------------------


@each_product
def test_products_are_those_of_the_dequantized_weights(
    block_format: Format, activations: str, rng: np.random.Generator
) -> None:
    # An int8 activation is off by at most d / 2 = max|x| / 254, so a block of 32 by at most 32 / 254**2 = 4.96e-4 of
    # its energy, and so is a product whose errors add up no better than its terms. Rounded float16 activations would
    # be off by 2**-11 each, 2.4e-7 of the energy; the CPU keeps float32 and only its sums round (next test).
    limit = 5e-4 if activations == "int8" else 1e-6
    for k, m in itertools.product(widths_of(block_format), ROWS):
        weights = Weights.random(block_format, m, k, rng)
        x = weights.activations(max(COLUMNS), rng)
        expected = x.astype(np.float64) @ weights.values.astype(np.float64).T
        for n in columns_for(block_format, activations):
            actual = weights.matmul(x[:n], activations)
            assert nmse(actual, expected[:n]) <= limit, (m, k, n)


@each_format
def test_float_products_err_by_the_rounding_of_their_sum_only(block_format: Format, rng: np.random.Generator) -> None:
    # Weights are gguf's float32 to the bit. 16 lanes each add k / 16 products (rounded too, where no fused
    # multiply-add is to be had), and a tree of 4 additions follows: k / 16 + 5 roundings at most on a term's way.
    for k, m in itertools.product(widths_of(block_format), ROWS):
        weights = Weights.random(block_format, m, k, rng)
        x = weights.activations(max(COLUMNS), rng)
        expected = x.astype(np.float64) @ weights.values.astype(np.float64).T
        magnitude = np.abs(x).astype(np.float64) @ np.abs(weights.values).astype(np.float64).T
        bound = 1.001 * (-(-k // 16) + 5) * U * magnitude
        for n in columns_for(block_format, "f16"):
            error = np.abs(weights.matmul(x[:n], "f16") - expected[:n])
            assert np.all(error <= bound[:n]), (m, k, n, np.max(error / bound[:n]))


@pytest.mark.parametrize(
    "block_format", [f for f in FORMATS.values() if not f.plain], ids=[f.name for f in FORMATS.values() if not f.plain]
)
def test_int8_products_are_those_of_the_quantized_activations(block_format: Format, rng: np.random.Generator) -> None:
    # The products of bytes are exact. On the way of a term into the sum: the product of the two scales is rounded, one
    # of 8 lanes adds k / 16 of them (2 more roundings where nothing is fused), then come 3 additions for the lanes, up
    # to 3 for the chains of a block, and the difference: k / 16 + 10. A minimum's way is shorter. The expected value
    # is made of weights that gguf rounded twice.
    for k, m in itertools.product(widths_of(block_format), ROWS):
        weights = Weights.random(block_format, m, k, rng)
        x = weights.activations(max(COLUMNS), rng)
        q, d, _ = quantized(x)
        seen = (q * d.astype(np.float64)[:, :, None]).reshape(len(x), k)
        expected = seen @ weights.values.astype(np.float64).T
        bound = (k // 16 + 12) * 1.001 * U * np.abs(seen) @ magnitudes(block_format, weights).T
        for n in columns_for(block_format, "int8"):
            error = np.abs(weights.matmul(x[:n], "int8") - expected[:n])
            assert np.all(error <= bound[:n]), (m, k, n, np.max(error / bound[:n]))


def magnitudes(block_format: Format, weights: Weights) -> np.ndarray:
    """``|scale q| + |minimum|`` for each weight: what the rounding of a weight or of its product goes by."""
    made = np.zeros((weights.data.size // block_format.block_nbytes, block_format.block_weights // 16, 16))
    for index, block in enumerate(weights.data.reshape(-1, block_format.block_nbytes)):
        for lane in range(block_format.lanes):
            for i, (q, scale, minimum) in enumerate(block_format.unpack(lane, *block_format.load(block, lane))):
                made[index, block_format.position(lane, i)] = abs(float(scale) * q.view(np.int8)) + abs(minimum)
    return made.reshape(weights.values.shape)


@each_product
def test_activations_may_be_of_any_size(block_format: Format, activations: str, rng: np.random.Generator) -> None:
    """From the largest float32, where sums of a block overflow, to subnormal numbers; other columns do not change."""
    m, k = 3, widths_of(block_format)[-1]
    data = small_blocks(block_format.name, (m, k), rng)
    weights = Weights.of(block_format, data, m)
    sizes = np.array([[1], [3.4e38], [1], [1e37], [1e30], [1e-30], [1e-36], [1e-38], [1e-41], [1]], np.float32)
    x = rng.uniform(-1, 1, (len(sizes), k)).astype(np.float32) * sizes
    (n,) = columns_for(block_format, activations, [len(sizes)])
    usual = (sizes == 1)[:, 0]
    actual, beside_ones = (
        np.concatenate([weights.matmul(values[first : first + n], activations) for first in range(0, len(x), n)])
        for values in (x, np.where(usual[:, None], x, np.float32(1)))
    )
    assert_same_bits(actual[usual], beside_ones[usual])
    error = np.abs(actual - x.astype(np.float64) @ weights.values.astype(np.float64).T)
    terms = np.sqrt((x.astype(np.float64) ** 2) @ (weights.values.astype(np.float64) ** 2).T)
    tolerance = np.sqrt(5e-4) if activations == "int8" and not block_format.plain else (k / 16 + 16) * U
    # A result below the normal numbers rounds to a multiple of 2**-149.
    assert np.all(error <= tolerance * terms + 2.0**-149), (error, terms)


def test_float_sums_near_the_ends_of_float32() -> None:
    """Terms that are nothing by themselves, and sums that overflow before others take from them."""
    weights = Weights.of(FORMATS["F32"], np.full((1, 4096), 0.004, np.float32).tobytes(), 1)
    small = weights.matmul(np.full((1, 4096), 1e-43, np.float32), "f16")
    np.testing.assert_allclose(small, 4096 * np.float64(np.float32(0.004)) * np.float32(1e-43), rtol=0, atol=2.0**-149)
    weights = Weights.of(FORMATS["F32"], np.full((1, 32), 2, np.float32).tobytes(), 1)
    x = np.zeros((1, 32), np.float32)
    x[0, [0, 1, 16, 17]] = 3e38, 3e38, -3e38, -2e38
    np.testing.assert_allclose(weights.matmul(x, "f16"), 2e38, rtol=1e-6)


@pytest.mark.parametrize("block_format", [FORMATS["Q4_1"], FORMATS["Q4_K"]], ids=["Q4_1", "Q4_K"])
def test_what_minima_cancel_does_not_overflow(block_format: Format) -> None:
    """``d * sum(q x)`` and ``m * sum(x)`` are beyond float32 each, and their difference is not."""
    m, k = 4, 512
    block = np.zeros(block_format.block_nbytes, np.uint8)
    if block_format.name == "Q4_1":  # d = 1, m = -8, and q from 7 to 9
        block[:4] = np.array([1, -8], np.float16).view(np.uint8)
        block[4:] = np.tile([0x97, 0x79], 8)
    else:  # d * 1, dmin * 8, likewise
        block[:4] = np.array([1, 1], np.float16).view(np.uint8)
        block[4:16] = [1, 1, 1, 1, 8, 8, 8, 8, 0x81, 0x81, 0x81, 0x81]
        block[16:] = np.tile([0x97, 0x79], 64)
    weights = Weights.of(block_format, np.tile(block, m * k // block_format.block_weights).tobytes(), m)
    assert set(np.unique(weights.values)) == {-1, 1}
    x = np.full((2, k), 6e37, np.float32)
    x[:, 1::2] = 3e37
    x[1, 16:] = 0
    exact = x.astype(np.float64) @ weights.values.astype(np.float64).T
    np.testing.assert_allclose(weights.matmul(x, "int8"), exact, rtol=1e-2, atol=1e36)


@each_product
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 6])
def test_a_nan_or_infinity_is_seen_in_its_own_column_only(
    block_format: Format, activations: str, poison: float, n: int, rng: np.random.Generator
) -> None:
    (n,) = columns_for(block_format, activations, [n])
    m, k = 5, widths_of(block_format)[-1]
    weights = Weights.random(block_format, m, k, rng)
    x = weights.activations(n, rng)
    clean = weights.matmul(x, activations)
    for column, place in itertools.product({0, n - 1}, (0, k // 2, k - 1)):
        poisoned = x.copy()
        poisoned[column, place] = poison
        actual = weights.matmul(poisoned, activations)
        assert not np.any(np.isfinite(actual[column])), (column, place)
        others = np.arange(n) != column
        assert_same_bits(actual[others], clean[others])


@each_product
def test_a_nan_is_not_lost_in_zero_weights(block_format: Format, activations: str) -> None:
    k = widths_of(block_format)[-1]
    weights = Weights.of(block_format, bytes(3 * block_format.row_nbytes(k)), 3)
    np.testing.assert_array_equal(weights.values, 0)
    x = np.ones((2, k), np.float32)
    x[1, 7] = np.nan
    np.testing.assert_array_equal(weights.matmul(x[:1], activations), 0)
    assert np.all(np.isnan(weights.matmul(x[1:], activations)))


# Threads --------------------------------------------------------------------------------------------------------------


@contextmanager
def restored_threads() -> Iterator[None]:
    before = parallel.Threads.helpers.now.most + 1
    try:
        yield
    finally:
        parallel.set_threads(before)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "BF16"])
@pytest.mark.parametrize("m", [2, 5, 997])
def test_threads_change_no_bit(name: str, m: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights.random(FORMATS[name], m, 256, rng)  # 997 rows: more than spans, and none of equal length
    x = weights.activations(3, rng)
    results = []
    monkeypatch.setattr(parallel, "HELPER_NBYTES", 1)
    with restored_threads():
        for threads in (1, 2, 3, 7):
            parallel.set_threads(threads)
            results.append((weights.matmul(x, "int8"), weights.matmul(x, "f16"), weights.dequantize()))
    for result in results[1:]:
        for one, many in zip(results[0], result, strict=True):
            assert_same_bits(many, one)


def test_activations_are_int8_or_f16() -> None:
    row, y = np.zeros(34, np.uint8), np.empty((1, 1), np.float32)
    with pytest.raises(ValueError, match='"int8" or "f16", not \'int4\''):
        products.matmul(FORMATS["Q8_0"], row.ctypes.data, 1, 32, np.zeros((1, 32), np.float32), y, "int4")


def test_the_number_of_threads_is_any_whole_number_above_zero() -> None:
    with restored_threads():
        parallel.set_threads(np.uint64(3))
        assert parallel.Threads.helpers.now.most == 2
        for count in (0, -1):
            with pytest.raises(ValueError, match=f"not {count}"):
                parallel.set_threads(count)
        for other in (2.0, "2", None):
            with pytest.raises(TypeError, match=f"an integer, not {other!r}"):
                parallel.set_threads(other)  # type: ignore[arg-type]
        assert parallel.Threads.helpers.now.most == 2
