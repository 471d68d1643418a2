"""Small kernels of operations that compute: what :mod:`operation_cases` runs beside those that move data."""

from __future__ import annotations

import numpy as np
from operation_kernels import ITEMS, THREADS, load_run, store_words

from qmm.kernels.lang.primitives import (
    bfloat_floats,
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
from qmm.kernels.lang.ptx.arithmetic import (
    dot_floats,
    fma,
    max_magnitude_of_four,
    pack_halves,
    power_of_two_below,
    reciprocal,
    scaled_byte,
    scaled_bytes,
)
from qmm.kernels.lang.ptx.global_memory import (
    load_global16,
    load_global_bfloat,
    load_global_byte,
    load_global_float,
    load_global_floats_l2,
    load_global_half,
    load_global_run,
    store_global_bfloat,
    store_global_byte,
    store_global_float,
    store_global_half,
    store_global_run,
    store_global_run_part,
    store_global_word,
)
from qmm.kernels.lang.ptx.grid import lane_index, thread_index
from qmm.kernels.lang.ptx.mma import mma_s8, mma_s8_more, mma_tf32
from qmm.kernels.lang.ptx.warp import (
    max_magnitude_of_eight_lanes,
    max_magnitude_of_warp,
    shuffle_xor_add,
    sum_of_half_warp,
    sum_of_warp,
    sum_words_of_eight_lanes,
    sum_words_of_four_lanes,
)
from qmm.kernels.lang.specialize import unroll
from qmm.kernels.lang.tables import table

__all__ = [
    "FEW",
    "MANY",
    "ROWS_OF_EIGHT",
    "ROWS_OF_FOUR",
    "SIGNED",
    "SIXTEEN",
    "of_words",
    "looked_up",
    "widened",
    "as_bfloats",
    "as_halves",
    "as_bytes",
    "of_floats",
    "of_runs",
    "fma_once",
    "dots_of_floats",
    "sums",
    "largest",
    "exchanged",
    "dots_of_bytes",
    "dots_of_short_floats",
]

SIGNED = np.random.default_rng(4).integers(-128, 128, 256).astype(np.int8)
"""What lookup tables are made of."""

# ---------------------------------------------------------------------------------------------------------------------
# Kernels: arithmetic of one lane
# ---------------------------------------------------------------------------------------------------------------------


def of_words(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 288 * (first + thread_index())
        p = load_global16(at)
        q = load_global16(at + 16)
        a = word(p, 1)
        b = word(q, 2)
        store_words(to, spread_bits(a))
        store_words(to + 16, subtract_bytes(p & 0x7F7F7F7F, 1))
        store_words(to + 32, subtract_bytes(q & 0x7F7F7F7F, 32))
        store_words(to + 48, subtract_bytes(q & 0x7F7F7F7F, 127))
        store_words(to + 64, p & q)
        store_words(to + 80, p | b)
        store_words(to + 96, p ^ 0x80808080)
        store_words(to + 112, p << 3)
        store_words(to + 128, p >> 5)
        store_words(to + 144, p + q)
        store_words(to + 160, p - q)
        store_words(to + 176, p * q)
        store_words(to + 192, p * b)
        store_words(to + 208, p * 1001)
        store_words(to + 224, p - 16)
        store_global_word(to + 240, a & b)
        store_global_word(to + 244, a | 0x80808080)
        store_global_word(to + 248, a ^ b)
        store_global_word(to + 252, a << 31)
        store_global_word(to + 256, a >> (thread_index() & 31))
        store_global_word(to + 260, a + b)
        store_global_word(to + 264, a - b)
        store_global_word(to + 268, a * b)
        store_global_float(to + 272, signed_byte(a))
        store_global_float(to + 276, unsigned_byte(a))
        store_global_float(to + 280, signed_byte(b >> 24))
        store_global_float(to + 284, unsigned_byte(b >> 24))


SIXTEEN, FEW, MANY = table(SIGNED[:16]), table(SIGNED[:5]), table(SIGNED)
ROWS_OF_FOUR, ROWS_OF_EIGHT = table(SIGNED.reshape(64, 4)), table(SIGNED.reshape(32, 8))


def looked_up(source, target):
    for first in range(0, ITEMS, THREADS):
        words = load_global16(source + 16 * (first + thread_index()))
        to = target + 80 * (first + thread_index())
        store_words(to, SIXTEEN(words & 0x0F0F0F0F))
        store_words(to + 16, FEW(words & 0x03030303))
        store_words(to + 32, MANY(words))
        a = word(words, 0)
        b = word(words, 1)
        store_words(to + 48, ROWS_OF_FOUR(a & 63, b & 63, (a >> 8) & 63, b >> 26))
        store_words(to + 64, ROWS_OF_EIGHT(word(words, 2) & 31, word(words, 3) >> 27))


def widened(source, target):
    """All the 65,536 halves and bfloats, and some of them by themselves."""
    for first in range(0, ITEMS, THREADS):
        at = source + 256 * (first + thread_index())
        to = target + 1120 * (first + thread_index())
        for i in range(8):
            low = load_global16(at + 32 * i)
            high = load_global16(at + 32 * i + 16)
            store_global_run(to + 128 * i, half_floats(low, high))
            store_global_run(to + 128 * i + 64, bfloat_floats(low, high))
        for i in range(8):
            store_global_float(to + 1024 + 4 * i, load_global_half(at + 2 * i))
            store_global_float(to + 1056 + 4 * i, load_global_bfloat(at + 2 * i))
        words = load_global16(at)
        for i in unroll(4):
            store_global_float(to + 1088 + 8 * i, half(word(words, i)))
            store_global_float(to + 1092 + 8 * i, half(word(words, i) >> 16))


def as_bfloats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        for i in unroll(8):
            store_global_bfloat(target + 16 * item + 2 * i, load_global_float(source + 32 * item + 4 * i))


def as_halves(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        for i in unroll(4):
            a = load_global_float(source + 32 * item + 8 * i)
            b = load_global_float(source + 32 * item + 8 * i + 4)
            store_global_half(target + 32 * item + 8 * i, a)
            store_global_half(target + 32 * item + 8 * i + 2, b)
            store_global_word(target + 32 * item + 8 * i + 4, pack_halves(a, b))


def as_bytes(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 20 * (first + thread_index())
        to = target + 8 * (first + thread_index())
        factor = load_global_float(at + 16)
        a = load_global_float(at)
        b = load_global_float(at + 4)
        c = load_global_float(at + 8)
        d = load_global_float(at + 12)
        store_global_word(to, scaled_bytes(a, b, c, d, factor))
        store_global_byte(to + 4, scaled_byte(a, factor))
        store_global_byte(to + 5, scaled_byte(b, factor))
        store_global_byte(to + 6, scaled_byte(c, factor))
        store_global_byte(to + 7, scaled_byte(d, factor))


def of_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        store_global_float(target + 8 * item, reciprocal(load_global_float(source + 8 * item)))
        store_global_float(target + 8 * item + 4, power_of_two_below(load_global_float(source + 8 * item + 4)))


def of_runs(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 96 * item
        to = target + 320 * item
        values = load_run(at + 16)
        scale = load_global_float(at + 80)
        minimum = load_global_float(at + 84)
        store_global_run(to, run_weights(load_global16(at), scale, minimum))
        store_global_run(to + 64, run_weights(values, scale, minimum))
        store_global_run(to + 128, scale_floats(values, scale))
        store_global_run(to + 192, masked(values, (item & 63) - 20))
        store_global_run_part(to + 256, values, item % 17)


def fma_once(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 12 * item
        store_global_float(
            target + 4 * item, fma(load_global_float(at), load_global_float(at + 4), load_global_float(at + 8))
        )


def dots_of_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 128 * item
        store_global_float(target + 4 * item, dot_floats(load_run(at), load_global_run(at + 64)))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: arithmetic of a warp
# ---------------------------------------------------------------------------------------------------------------------


def store_whole(target, value):
    for i in unroll(4):
        store_global_byte(target + i, value >> (8 * i))


def sums(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 16 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        value = load_global_byte(at) + 256 * load_global_byte(at + 1) + 65536 * load_global_byte(at + 2) - 8388608
        store_whole(to, sum_of_warp(value))
        store_whole(to + 4, sum_of_half_warp(value))
        words = load_global16(at)
        store_global_float(to + 8, sum_words_of_four_lanes(word(words, 2)))
        store_global_float(to + 12, sum_words_of_eight_lanes(word(words, 3)))


def largest(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        store_global_float(to, max_magnitude_of_warp(load_global_float(at)))
        store_global_float(to + 4, max_magnitude_of_eight_lanes(load_global_float(at + 4)))
        _, _, c, d = load_global_floats_l2(at)
        e, f, g, h = load_global_floats_l2(at + 16)
        store_global_float(to + 8, max_magnitude_of_four(c, d, e, f))
        store_global_float(to + 12, max_magnitude_of_eight_lanes(max_magnitude_of_four(g, h, 0.0, -1.0)))


def exchanged(source, target):
    lane = lane_index()
    for first in range(0, ITEMS, THREADS):
        at = source + 8 * (first + thread_index())
        to = target + 40 * (first + thread_index())
        a = load_global_float(at)
        b = load_global_float(at + 4)
        for i in unroll(5):
            store_global_float(to + 8 * i, shuffle_xor_add(a, b, 1 << i, lane & (1 << i)))
            store_global_float(to + 8 * i + 4, shuffle_xor_add(b, b, 1 << i, 0))


def dots_of_bytes(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 96 * (first + thread_index())
        to = target + 32 * (first + thread_index())
        dots = mma_s8(load_global16(at), load_global16(at + 16), load_global16(at + 32))
        for i in unroll(4):
            store_global_float(to + 4 * i, dots[i])
        dots = mma_s8_more(load_global16(at + 48), load_global16(at + 64), load_global16(at + 80), dots)
        for i in unroll(4):
            store_global_float(to + 16 + 4 * i, dots[i])


def dots_of_short_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 208 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        totals = mma_tf32(load_run(at), load_run(at + 64), load_run(at + 128), load_global_floats_l2(at + 192))
        for i in unroll(4):
            store_global_float(to + 4 * i, totals[i])
