"""Small kernels of every operation of the CPU, with inputs: run as plain Python and compiled, they make the same bytes.

A kernel gets the addresses of its inputs and of its results, both in memory of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from arithmetic_kernels import FEW, MANY, ROWS_OF_EIGHT, ROWS_OF_FOUR, SIXTEEN

from qmm.kernels.lang.fields import load1, load2, load4, load16
from qmm.kernels.lang.primitives import (
    bfloat_floats,
    float_floats,
    half,
    half_floats,
    masked,
    run_weights,
    scale_floats,
    signed_byte,
    spread_bits,
    subtract_bytes,
    unsigned_byte,
    word,
)
from qmm.kernels.lang.ptx.arithmetic import dot_floats
from qmm.kernels.lang.ptx.global_memory import load_global_float, load_global_run, store_global_float
from qmm.kernels.lang.simd import (
    dot_run,
    fetch_add,
    float_of_bits,
    load_float,
    load_floats,
    max_magnitude,
    multiply_add,
    store_byte,
    store_float,
    store_floats,
    store_rounded,
    sum_floats,
    sum_partial,
    zero_floats,
    zero_partial,
)
from qmm.kernels.lang.specialize import unroll

__all__ = ["CPU_CASES", "CPUCase"]

ITEMS = 64
SOURCE_NBYTES = 160
"""Of an item."""


def store_word(address, offset, value):
    for i in unroll(4):
        store_byte(address, offset + i, value >> (8 * i))


def store_words(address, offset, words):
    for i in unroll(4):
        store_word(address, offset + 4 * i, word(words, i))


def fields_and_words(source, target):
    for item in range(ITEMS):
        at = source + SOURCE_NBYTES * item + item % 16
        to = target + 128 * item
        words = load16(at, 3)
        store_words(to, 0, words)
        store_word(to, 16, load4(at, 1))
        store_word(to, 20, load2(at, 7))
        store_word(to, 24, load1(at, 31))
        store_words(to, 32, subtract_bytes(words & 0x7F7F7F7F, 32))
        store_words(to, 48, spread_bits(load2(at, 20)))
        store_float(to, 64, signed_byte(load4(at, 40)))
        store_float(to, 68, unsigned_byte(load4(at, 40) >> 8))
        store_words(to, 80, (words + load16(at, 50)) * 3)
        store_words(to, 96, (words << 3) ^ (words >> 5))
        store_words(to, 112, (words - 77) | load4(at, 60))


def halves(source, target):
    """Every float16 and every bfloat16."""
    for item in range(4096):
        at = source + 32 * item
        to = target + 132 * item
        store_floats(to, 0, half_floats(load16(at, 0), load16(at, 16)))
        store_floats(to, 64, bfloat_floats(load16(at, 0), load16(at, 16)))
        store_float(to, 128, half(load2(at, 2 * (item % 16))))


def runs(source, target):
    for item in range(ITEMS):
        at = source + SOURCE_NBYTES * item
        to = target + 192 * item
        values = load_floats(at, 16)
        scale = load_float(at, 80)
        minimum = load_float(at, 84)
        store_floats(to, 0, run_weights(load16(at, 0), scale, minimum))
        store_floats(to, 64, masked(run_weights(values, scale, minimum), item % 20 - 2))
        store_floats(to, 128, float_floats(load16(at, 64), load16(at, 48), load16(at, 32), load16(at, 16)))


def products(source, target):
    """Of whole numbers, which all orders of summing make alike."""
    for item in range(ITEMS):
        at = source + SOURCE_NBYTES * item
        q = load16(at, 0)
        total = dot_run(dot_run(zero_partial(), q, at + 16, 1.0), q, at + 48, 0.5)
        store_float(target, 12 * item, sum_partial(total))
        floats = multiply_add(zero_floats(), run_weights(q, 1.0, 0.0), run_weights(load16(at, 16), 2.0, 1.0))
        store_float(target, 12 * item + 4, sum_floats(multiply_add(floats, floats, floats)))
        dot = dot_floats(run_weights(q, 1.0, 0.0), run_weights(load16(at, 16), 2.0, 1.0))
        store_float(target, 12 * item + 8, dot)


def as_global_memory(source, target):
    """At any alignment."""
    for item in range(ITEMS):
        at = source + SOURCE_NBYTES * item + item % 16
        to = target + 76 * item
        store_floats(to, 0, load_global_run(at))
        store_global_float(to + 64, load_global_float(at + 19))
        store_global_float(to + 68 + item % 4, load_global_float(at + 32))


def magnitudes(source, target):
    for item in range(ITEMS):
        at = source + SOURCE_NBYTES * item
        values = load_floats(at, 16)
        most = max_magnitude(max_magnitude(0, values), load_floats(at, 80))
        largest = float_of_bits(most)
        store_float(target, 40 * item, largest)
        store_float(target, 40 * item + 4, store_rounded(target, 40 * item + 8, scale_floats(values, 1000.0)))


def looked_up(source, target):
    for item in range(ITEMS):
        words = load16(source + 16 * item, 0)
        to = target + 80 * item
        store_words(to, 0, SIXTEEN(words & 0x0F0F0F0F))
        store_words(to, 16, FEW(words & 0x03030303))
        store_words(to, 32, MANY(words))
        a = word(words, 0)
        b = word(words, 1)
        store_words(to, 48, ROWS_OF_FOUR(a & 63, b & 63, (a >> 8) & 63, b >> 26))
        store_words(to, 64, ROWS_OF_EIGHT(word(words, 2) & 31, word(words, 3) >> 27))


def counted(source, target):
    for item in range(ITEMS):
        store_byte(target, 8 + item, load1(source, 0) + load1(target, 0) + load1(target, 3))
        store_byte(target, 8 + fetch_add(target, 2), load1(target, 1))


@dataclass(frozen=True, eq=False)
class CPUCase:
    """A kernel, its inputs, and how many bytes it writes into zeros; what these are, of which any NaN is any other."""

    function: Callable[..., None]
    source: np.ndarray
    target_nbytes: int
    dtype: type = np.uint8


def small_numbers() -> np.ndarray:
    """16 signed bytes, and 16 int16 of the same size twice, for each item."""
    rng = np.random.default_rng(2)
    made = np.zeros((ITEMS, SOURCE_NBYTES), np.uint8)
    made[:, :16] = rng.integers(-128, 128, (ITEMS, 16)).astype(np.int8).view(np.uint8)
    made[:, 16:80] = rng.integers(-127, 128, (ITEMS, 32)).astype(np.int16).view(np.uint8).reshape(ITEMS, 64)
    return made


def some_bytes() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, ITEMS * SOURCE_NBYTES, np.uint8)


def numbers() -> np.ndarray:
    """Bytes, and float32 from the 16th on."""
    rng = np.random.default_rng(3)
    made = rng.integers(0, 256, (ITEMS, SOURCE_NBYTES), np.uint8)
    made[:, 16:] = rng.standard_normal((ITEMS, (SOURCE_NBYTES - 16) // 4), np.float32).view(np.uint8)
    return made


def without_a_nan() -> np.ndarray:
    """Bytes that are no NaN wherever they are read: signalling ones do not pass through Python's floats unchanged."""
    return some_bytes() & 0x7F


def with_not_a_number() -> np.ndarray:
    """The same with a NaN or an infinity, or a number half way between two whole ones, here and there."""
    values = numbers()
    values[3, 80:84] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    values[4, 84:88] = np.frombuffer(np.float32(-np.inf).tobytes(), np.uint8)
    values[5, 16:24] = np.frombuffer(np.array([0.0025, 0.0035], np.float32).tobytes(), np.uint8)
    return values


CPU_CASES = {
    "fields and words": CPUCase(fields_and_words, some_bytes(), 128 * ITEMS),
    "halves": CPUCase(halves, np.arange(65536, dtype=np.uint16), 132 * 4096, np.float32),
    "runs": CPUCase(runs, numbers(), 192 * ITEMS, np.float32),
    "products": CPUCase(products, small_numbers(), 12 * ITEMS, np.float32),
    "as global memory": CPUCase(as_global_memory, without_a_nan(), 76 * ITEMS),
    "looked up": CPUCase(looked_up, some_bytes(), 80 * ITEMS),
    "magnitudes": CPUCase(magnitudes, with_not_a_number(), 40 * ITEMS),
    "counted": CPUCase(counted, np.full(1, 7, np.uint8), 8 + 2 * ITEMS),
}
