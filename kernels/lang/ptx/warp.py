"""Exchanges between the lanes of a warp: sums and largest magnitudes over all lanes or over neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qmm.kernels.lang.operation import operation

__all__ = [
    "max_magnitude_of_eight_lanes",
    "max_magnitude_of_warp",
    "shuffle_xor_add",
    "sum_of_half_warp",
    "sum_of_warp",
    "sum_words_of_eight_lanes",
    "sum_words_of_four_lanes",
]


def _shuffled(e: Any, value: Any, distance: int) -> Any:
    letter = "f" if value.type == e.f32 else "r"
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
    return e.ptx(text, f"={letter},{letter}", value, volatile=True)


@operation("(float32, float32, literal, int64) -> float32", of_warp=True)
def shuffle_xor_add(a, b, distance, upper):
    """Exchanges with the lane ``distance`` away: the lane with ``upper`` 0 gets the sum of both lanes' ``a``, the other
    the sum of both ``b``."""
    is_upper, first, second = np.array(upper) != 0, np.array(a, np.float32), np.array(b, np.float32)
    sent = np.where(is_upper, first, second)
    return np.where(is_upper, second, first) + sent[np.arange(32) ^ distance]


@shuffle_xor_add.cuda
def _(e, a, b, distance, upper):
    is_upper = e.icmp_signed("!=", upper, e.constant(e.i64, 0))
    kept = e.select(is_upper, b, a)
    sent = e.select(is_upper, a, b)
    return e.fadd(kept, _shuffled(e, sent, distance))


@operation("(int64) -> int64", of_warp=True)
def sum_of_warp(value):
    """The sum of integers over the 32 lanes, in every lane; modulo 2**32, as a signed number."""
    return [sum(value)] * 32


@operation("(int64) -> int64", of_warp=True)
def sum_of_half_warp(value):
    """The same over the 16 lanes of a half warp."""
    return [sum(value[:16])] * 16 + [sum(value[16:])] * 16


@sum_of_warp.cuda
def _(e, value):
    return _emit_sum(e, value, (16, 8, 4, 2, 1))


@sum_of_half_warp.cuda
def _(e, value):
    return _emit_sum(e, value, (8, 4, 2, 1))


def _emit_sum(e: Any, value: Any, distances: tuple[int, ...]) -> Any:
    value = e.trunc(value, e.i32)
    for distance in distances:
        value = e.add(value, _shuffled(e, value, distance))
    return e.sext(value, e.i64)


@operation("(Word) -> float32", of_warp=True)
def sum_words_of_four_lanes(word):
    """The sum of the signed bytes of four neighbouring lanes' words, in each of them, as float32."""
    return _sum_words(word, 4)


@operation("(Word) -> float32", of_warp=True)
def sum_words_of_eight_lanes(word):
    """The same of eight."""
    return _sum_words(word, 8)


def _sum_words(words: Sequence[np.uint32], lanes: int) -> np.ndarray:
    sums = np.array(words, np.uint32).view(np.int8).reshape(-1, 4 * lanes).sum(axis=1, dtype=np.int32)
    return sums.astype(np.float32).repeat(lanes)


@sum_words_of_four_lanes.cuda
def _(e, word):
    return _emit_sum_words(e, word, (2, 1))


@sum_words_of_eight_lanes.cuda
def _(e, word):
    return _emit_sum_words(e, word, (4, 2, 1))


def _emit_sum_words(e: Any, word: Any, distances: tuple[int, ...]) -> Any:
    ones, none = e.constant(e.i32, 0x01010101), e.constant(e.i32, 0)
    value = e.ptx("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", word, ones, none)
    for distance in distances:
        value = e.add(value, _shuffled(e, value, distance))
    return e.sitofp(value, e.f32)


@operation("(float32) -> float32", of_warp=True)
def max_magnitude_of_warp(value):
    """The largest magnitude over the 32 lanes, in every lane; a NaN counts as larger than everything.

    Magnitudes are compared as bit patterns, which order as the numbers do."""
    return _max_magnitude(value, 32)


@operation("(float32) -> float32", of_warp=True)
def max_magnitude_of_eight_lanes(value):
    """The same over eight neighbouring lanes."""
    return _max_magnitude(value, 8)


def _max_magnitude(values: Sequence[np.float32], lanes: int) -> np.ndarray:
    bits = np.array(values, np.float32).view(np.uint32) & 0x7FFFFFFF
    return bits.reshape(-1, lanes).max(axis=1).view(np.float32).repeat(lanes)


@max_magnitude_of_warp.cuda
def _(e, value):
    return _emit_max_magnitude(e, value, (16, 8, 4, 2, 1))


@max_magnitude_of_eight_lanes.cuda
def _(e, value):
    return _emit_max_magnitude(e, value, (4, 2, 1))


def _emit_max_magnitude(e: Any, value: Any, distances: tuple[int, ...]) -> Any:
    bits = e.and_(e.bitcast(value, e.i32), e.constant(e.i32, 0x7FFFFFFF))
    for distance in distances:
        bits = e.larger(bits, _shuffled(e, bits, distance))
    return e.bitcast(bits, e.f32)
