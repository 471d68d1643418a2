"""Arithmetic of one lane with exact rounding, which the language's operators do not have."""

from __future__ import annotations

from typing import Any

import numpy as np

from qmm.kernels.lang.operation import operation

__all__ = [
    "MAGIC",
    "dot_floats",
    "fma",
    "max_magnitude_of_four",
    "pack_halves",
    "power_of_two_below",
    "reciprocal",
    "scaled_byte",
    "scaled_bytes",
    "zero_words",
]

MAGIC = 0x4B400000
"""12,582,912.0 = 3 * 2**22 as a float; an integer up to 2**22 that is added to it appears in its last bits."""


@operation("() -> Words")
def zero_words():
    """Sixteen bytes of zeros."""
    return np.zeros(4, np.uint32)


@zero_words.cuda
def _(e):
    return e.constant(e.vector_type(e.i32, 4), [0] * 4)


@operation("(float32, float32, float32) -> float32")
def fma(a, b, c):
    """``a * b + c``, rounded once. In Python the sum is rounded to 53 bits first, so a tie may fall the other way."""
    return np.float32(float(a) * float(b) + float(c))


@fma.cuda
def _(e, a, b, c):
    return _fma(e, a, b, c)


def _fma(e: Any, a: Any, b: Any, c: Any) -> Any:
    return e.ptx("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)


@operation("(Floats, Floats) -> float32")
def dot_floats(a, b):
    """The product of 16 numbers by 16 numbers: on a GPU fused, in two chains; on the CPU products, added up by halves.
    In Python they are summed in another order."""
    return np.dot(a, b)


@dot_floats.cuda
def _(e, a, b):
    chains = [e.constant(e.f32, 0.0)] * 2
    for i in range(16):
        chains[i % 2] = _fma(e, e.part(a, i), e.part(b, i), chains[i % 2])
    return e.fadd(*chains)


@dot_floats.cpu
def _(e, a, b):
    return e.total(e.fmul(a, b))


@operation("(float32) -> float32")
def reciprocal(value):
    """``1 / value``, correctly rounded."""
    return np.float32(1) / value


@reciprocal.cuda
def _(e, value):
    return e.ptx("rcp.rn.f32 $0, $1;", "=f,f", value)


@operation("(float32) -> float32")
def power_of_two_below(value):
    """The largest power of two up to a normal positive number, at most 2**126 so that its reciprocal is normal too."""
    return np.uint32(min(int(value.view(np.uint32)) & 0x7F800000, 253 << 23)).view(np.float32)


@power_of_two_below.cuda
def _(e, value):
    exponent = e.and_(e.bitcast(value, e.i32), e.constant(e.i32, 0x7F800000))
    largest = e.constant(e.i32, 253 << 23)
    return e.bitcast(e.select(e.icmp_unsigned(">", exponent, largest), largest, exponent), e.f32)


@operation("(float32, float32, float32, float32) -> float32")
def max_magnitude_of_four(a, b, c, d):
    """The largest magnitude of four numbers; a NaN counts as larger than everything.

    Magnitudes are compared as bit patterns, which order as the numbers do."""
    bits = np.array([a, b, c, d], np.float32).view(np.uint32) & 0x7FFFFFFF
    return bits.max().view(np.float32)


@max_magnitude_of_four.cuda
def _(e, *values):
    bits = [e.and_(e.bitcast(value, e.i32), e.constant(e.i32, 0x7FFFFFFF)) for value in values]
    return e.bitcast(e.larger(e.larger(*bits[:2]), e.larger(*bits[2:])), e.f32)


@operation("(float32, float32) -> Word")
def pack_halves(a, b):
    """Two numbers as IEEE float16, rounded to nearest, halves to even; the first in the lower half of a word."""
    return np.uint32(int.from_bytes(np.array([a, b], np.float16).tobytes(), "little"))


@pack_halves.cuda
def _(e, a, b):
    return e.ptx("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", a, b)


@operation("(float32, float32) -> int64")
def scaled_byte(value, factor):
    """``round(value * factor)``, halves to even, which must fit a signed byte (undefined for NaN)."""
    return ((_rounded(value, factor) + 128) & 0xFF) - 128


@scaled_byte.cuda
def _(e, value, factor):
    return e.sext(e.trunc(_emit_rounded(e, value, factor), e.i8), e.i64)


@operation("(float32, float32, float32, float32, float32) -> Word")
def scaled_bytes(a, b, c, d, factor):
    """The same for four values, packed into a word with the first lowest."""
    low = [_rounded(value, factor) & 0xFF for value in (a, b, c, d)]
    return np.uint32(int.from_bytes(bytes(low), "little"))


@scaled_bytes.cuda
def _(e, a, b, c, d, factor):
    parts = [_emit_rounded(e, value, factor) for value in (a, b, c, d)]
    low, high = (_permuted(e, "0x0040", parts[i], parts[i + 1]) for i in (0, 2))
    return _permuted(e, "0x5410", low, high)


def _rounded(value: np.float32, factor: np.float32) -> int:
    """The product, exact in float64, as an integer, halves to even; undefined for NaN."""
    product = float(value) * float(factor)
    return round(product) if abs(product) < 1 << 22 else 0x55


def _emit_rounded(e: Any, value: Any, factor: Any) -> Any:
    """The same as the low byte of a word: the bits of the sum with 3 * 2**22."""
    return e.bitcast(e.ptx(f"fma.rn.f32 $0, $1, $2, 0f{MAGIC:08X};", "=f,f,f", value, factor), e.i32)


def _permuted(e: Any, selector: str, low: Any, high: Any) -> Any:
    """The bytes of two words that the selector names, as a word, lowest first."""
    return e.ptx(f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", low, high)
