"""The CPU schedules: weights bit for bit, products within derived bounds, and not a byte read that is not theirs.

In bounds, ``u = 2**-24`` is the rounding of float32: a sum errs by at most about ``t u`` times the sum of its terms'
magnitudes, where t is the number of roundings on a term's way. Every result is held to its own bound.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import itertools
import mmap
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import gguf
import numpy as np
import pytest
from children import run_python
from gguf_files import random_blocks, small_blocks

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.ops.cpu import products as cpu

U = 2.0**-24
COLUMNS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33)
ROWS = (1, 3, 37)
TILED = (("Q8_0", "int8"), ("Q4_K", "int8"), ("Q6_K", "f16"), ("F16", "f16"))
"""Products whose kernels for COLUMN_TILE columns at once the usual run compiles; QMM_KERNELS=all compiles all."""

each_format = pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)
each_product = pytest.mark.parametrize(
    ("block_format", "activations"),
    [
        pytest.param(block_format, activations, id=f"{name}-{activations}")
        for name, block_format in FORMATS.items()
        for activations in (("f16",) if block_format.plain else ("int8", "f16"))
    ],
)


def widths_of(block_format: Format) -> tuple[int, ...]:
    """k: one block, a few (odd ones for plain formats), and about three thousand."""
    if block_format.plain:
        return (1, 16, 17, 899, 2880)
    return (block_format.block_weights, 896, 2880) if block_format.block_weights == 32 else (256, 768, 2816)


def columns_for(block_format: Format, activations: str, columns: Sequence[int] = COLUMNS) -> list[int]:
    """Numbers of columns; fewer than a tile's in place of more, where those kernels are not compiled in this run."""
    if os.environ.get("QMM_KERNELS") == "all" or (block_format.name, activations) in TILED:
        return list(columns)
    return list(dict.fromkeys(min(n, cpu.COLUMN_TILE - 1) for n in columns))


@functools.cache
def compile_product(block_format: Format, activations: str, tiled: bool) -> None:
    """Compiles the kernels of a product, in a thread.

    This deep in pytest's stack, CPython 3.11 maps and unmaps memory at every other call (a frame that just misses the
    end of a chunk of stack), and compiling takes twice as long.
    """
    n, k = cpu.COLUMN_TILE if tiled else 1, block_format.block_weights
    data, x, out = np.zeros(k * 4, np.uint8), np.zeros((n, k), np.float32), np.zeros((n, 1), np.float32)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(cpu.matmul, block_format, data.ctypes.data, 1, k, x, out, activations).result()


class Weights(NamedTuple):
    """A tensor: its bytes, and its values as gguf has them."""

    block_format: Format
    data: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, block_format: Format, data: bytes, m: int) -> Weights:
        raw = np.frombuffer(data, np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[block_format.name])
        return cls(block_format, raw, values.reshape(m, -1))

    @classmethod
    def random(cls, block_format: Format, m: int, k: int, rng: np.random.Generator, extreme: bool = False) -> Weights:
        return cls.of(block_format, random_blocks(block_format.name, (m, k), rng, extreme), m)

    def matmul(self, x: np.ndarray, activations: str) -> np.ndarray:
        compile_product(self.block_format, activations, len(x) >= cpu.COLUMN_TILE)
        m, k = self.values.shape
        out = np.full((len(x), m), np.nan, np.float32)
        cpu.matmul(self.block_format, self.data.ctypes.data, m, k, x, out, activations)
        return out

    def dequantize(self) -> np.ndarray:
        m, k = self.values.shape
        out = np.full((m, k), np.nan, np.float32)
        cpu.dequantize(self.block_format, self.data.ctypes.data, m, k, out)
        return out

    def activations(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Normal numbers plus a row of the weight, as large: no product is small by chance, even where m is 1."""
        m, k = self.values.shape
        rows = self.values[np.arange(n) % m].astype(np.float64)
        rows *= np.sqrt(k) / np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows + rng.standard_normal((n, k))).astype(np.float32)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit; a NaN is a NaN."""
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sum((actual - expected) ** 2) / np.sum(expected**2))


# ---------------------------------------------------------------------------------------------------------------------
# Dequantization
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------


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


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 activations by NumPy, in float32 as the kernel makes them: ``q (n, blocks, 32)``, scales and sums; of rows
    whose largest magnitude is between 2**-96 and 2**96."""
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(axis=2) / np.float32(127)
    subnormal = d < np.float32(2.0**-126)
    d = np.where(subnormal, d + np.float32(2.0**-149), d)
    lift = np.where(subnormal, np.float32(2.0**24), np.float32(1))
    q = np.rint(blocks * lift[:, :, None] * (np.float32(1) / (d * lift))[:, :, None])
    sums = d[:, :, None] * q.reshape(len(x), -1, 2, 16).sum(axis=3)
    return q, d, sums.reshape(len(x), -1)


def test_activations_are_quantized_as_numpy_does(rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 320)).astype(np.float32) * np.exp2(rng.integers(-60, 60, (5, 1))).astype(np.float32)
    x[0, 32:64] = 0
    x[1, 64:96] = np.tile(np.arange(-3.5, 4.5), 4)  # ties, with the largest value below
    x[1, 64] = 127
    x[2, :32] = np.linspace(-1, 1, 32, dtype=np.float32) * np.float32(127 * 2.0**-126)  # the smallest of a normal scale
    x[3, :32] = x[2, :32] * np.float32(1 - 2.0**-20)  # a subnormal one
    x[4, :32] = np.arange(-16, 16) * np.float32(2.0**-149)
    q, scales, sums, units = cpu.quantize_activations(x)
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
    q, scales, sums, _ = cpu.quantize_activations(x)
    at_end = cpu.quantize_activations(np.ldexp(x, power))
    unit = at_end[3]
    np.testing.assert_array_equal(unit, np.full(2, 2.0**32 if power > 0 else 2.0**-32, np.float32))
    np.testing.assert_array_equal(at_end[0], q)
    assert_same_bits(at_end[1], np.ldexp(scales, power - np.log2(unit[0]).astype(int)))
    assert_same_bits(at_end[2], np.ldexp(sums, power - np.log2(unit[0]).astype(int)))


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
    actual = weights.matmul(x, activations)
    np.testing.assert_array_equal(actual[0], 0)
    assert np.all(np.isnan(actual[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def restored_threads() -> Iterator[None]:
    before = cpu._Threads.helpers.most + 1
    try:
        yield
    finally:
        cpu.set_threads(before)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "BF16"])
@pytest.mark.parametrize("m", [2, 5, 997])
def test_threads_change_no_bit(name: str, m: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights.random(FORMATS[name], m, 256, rng)  # 997 rows: more than spans, and none of equal length
    x = weights.activations(3, rng)
    results = []
    monkeypatch.setattr(cpu, "HELPER_NBYTES", 1)
    with restored_threads():
        for threads in (1, 2, 3, 7):
            cpu.set_threads(threads)
            results.append((weights.matmul(x, "int8"), weights.matmul(x, "f16"), weights.dequantize()))
    for result in results[1:]:
        for one, many in zip(results[0], result, strict=True):
            assert_same_bits(many, one)


def test_ctrl_c_while_llvm_compiles_a_kernel_is_heard() -> None:
    """LLVM calls Python then, from where no exception gets out: what is raised there is printed and forgotten."""
    code = """
import signal
import numpy as np
from llvmlite.binding import ExecutionEngine

signal.signal(signal.SIGALRM, signal.default_int_handler)  # a timer can send an alarm, and nothing else
finalize = ExecutionEngine.finalize_object

def finalize_in_an_alarm(self):
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    finalize(self)
    signal.setitimer(signal.ITIMER_REAL, 0)

ExecutionEngine.finalize_object = finalize_in_an_alarm  # before Numba takes it over

from qmm.kernels.ops.cpu import products as cpu
from qmm.kernels.formats import FORMATS

form = FORMATS["Q4_K"]
row, x, out = np.zeros(form.row_nbytes(256), np.uint8), np.ones((1, 256), np.float32), np.ones((1, 1), np.float32)
try:
    cpu.matmul(form, row.ctypes.data, 1, 256, x, out, "f16")
except KeyboardInterrupt:
    print("heard")
cpu.matmul(form, row.ctypes.data, 1, 256, x, out, "f16")
print(out[0, 0])
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "heard\n0.0\n", "")


def test_the_number_of_threads_is_any_whole_number_above_zero() -> None:
    with restored_threads():
        cpu.set_threads(np.uint64(3))
        assert cpu._Threads.helpers.most == 2
        for count in (0, -1):
            with pytest.raises(ValueError, match=f"not {count}"):
                cpu.set_threads(count)
        for other in (2.0, "2", None):
            with pytest.raises(TypeError, match=f"whole number, not {other!r}"):
                cpu.set_threads(other)  # type: ignore[arg-type]
        assert cpu._Threads.helpers.most == 2


# ---------------------------------------------------------------------------------------------------------------------
# Masking: what lies beside the tensor, the activations and the results is neither read nor written
# ---------------------------------------------------------------------------------------------------------------------


@each_product
def test_neighbours_change_no_bit(block_format: Format, activations: str, rng: np.random.Generator) -> None:
    m, k = 3, widths_of(block_format)[-1]
    weights = Weights.random(block_format, m, k, rng)
    x = weights.activations(columns_for(block_format, activations, [5])[0], rng)
    results = []
    for filler in (0x00, 0xFF, 0x7C):  # 0xFF: every float a NaN; 0x7C7C: float16 NaN, and large numbers elsewhere
        buffer = np.full(weights.data.size + 512, filler, np.uint8)
        buffer[256:-256] = weights.data
        beside = weights._replace(data=buffer[256:-256])
        results.append((beside.matmul(x[:1], activations), beside.matmul(x, activations), beside.dequantize()))
        assert np.all(buffer[:256] == filler)
        assert np.all(buffer[-256:] == filler)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


class Guarded:
    """Memory between two pages that must not be touched, from the start of its first page or to the end of its last."""

    def __init__(self, nbytes: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        inner = -(-nbytes // page) * page
        self.map = mmap.mmap(-1, inner + 2 * page)
        self.all = np.frombuffer(self.map, np.uint8)
        start = page + (inner - nbytes if at_end else 0)
        self.bytes = self.all[start : start + nbytes]
        libc = ctypes.CDLL(None, use_errno=True)
        for offset in (0, page + inner):
            address = ctypes.c_void_p(self.all.ctypes.data + offset)
            assert libc.mprotect(address, ctypes.c_size_t(page), 0) == 0, os.strerror(ctypes.get_errno())  # PROT_NONE

    def holding(self, array: np.ndarray) -> np.ndarray:
        """A copy of ``array`` in this memory, which must have its size."""
        self.bytes[:] = array.reshape(-1).view(np.uint8)
        return self.bytes.view(array.dtype).reshape(array.shape)


def guarded(array: np.ndarray, at_end: bool) -> np.ndarray:
    return Guarded(array.nbytes, at_end).holding(array)


@each_format
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_no_byte_is_touched_across_the_page(block_format: Format, at_end: bool, rng: np.random.Generator) -> None:
    """The weights, x and the results each lie against a page that faults; a fault ends a child, not the tests."""
    cases = []
    modes = ("f16",) if block_format.plain else ("f16", "int8")
    for k, m, n in itertools.product(widths_of(block_format)[:3], (1, 3), (1, 5)):
        weights = Weights.random(block_format, m, k, rng)
        x = weights.activations(n, rng)
        # Also compiles the kernels, which the child inherits.
        products = {mode: weights.matmul(x[: columns_for(block_format, mode, [n])[0]], mode) for mode in modes}
        cases.append((weights, x, products, weights.dequantize()))

    def child(say: Callable[[str], None]) -> None:
        for weights, x, products, dequantized in cases:
            m, k = weights.values.shape
            data = guarded(weights.data, at_end)
            for mode, expected in products.items():
                n = len(expected)
                say(f"{block_format.name} matmul {mode}, m={m}, k={k}, n={n}")
                x_there, out = guarded(x[:n], at_end), guarded(np.full_like(expected, np.nan), at_end)
                cpu.matmul(block_format, data.ctypes.data, m, k, x_there, out, mode)
                assert_same_bits(out, expected)
            say(f"{block_format.name} dequantize, m={m}, k={k}")
            out = guarded(np.full_like(dequantized, np.nan), at_end)
            cpu.dequantize(block_format, data.ctypes.data, m, k, out)
            assert_same_bits(out, dequantized)

    status, notes = in_child(child)
    assert status == 0, f"{outcome(status)} at: {notes}"


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_a_byte_across_the_page_is_noticed(at_end: bool) -> None:
    """The test above can fail: a block that is said to begin one byte away from where it does."""
    data = np.zeros(34, np.uint8)
    out = np.zeros((1, 32), np.float32)
    cpu.dequantize(FORMATS["Q8_0"], data.ctypes.data, 1, 32, out)

    def child(say: Callable[[str], None]) -> None:
        say("the wrong byte")
        cpu.dequantize(FORMATS["Q8_0"], guarded(data, at_end).ctypes.data + (1 if at_end else -1), 1, 32, out)

    status, notes = in_child(child)
    assert (outcome(status), notes) == ("killed by SIGSEGV", "the wrong byte")


def in_child(work: Callable[[Callable[[str], None]], None]) -> tuple[int, str]:
    """Runs ``work`` in a fork of this process: its status, and what it said last or the exception that it raised."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: qmm's pool is made anew there
        process = os.fork()
    if process == 0:
        status = 1
        try:
            faulthandler.disable()  # pytest's: what a fault means is told by the parent
            work(lambda note: os.write(writer, f"\0{note}".encode()) and None)
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitpid(process, 0)[1], said.rpartition("\0")[2]


def outcome(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
