"""The operations that formats are written in, for every target: words, bytes, and runs of sixteen weights.

Those that read memory are in :mod:`qmm.kernels.lang.fields`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qmm.kernels.lang.operation import operation

__all__ = [
    "bfloat_floats",
    "float_floats",
    "half",
    "half_floats",
    "masked",
    "run_weights",
    "scale_floats",
    "signed_byte",
    "spread_bits",
    "subtract_bytes",
    "unsigned_byte",
    "word",
]

# ---------------------------------------------------------------------------------------------------------------------
# Words and bytes
# ---------------------------------------------------------------------------------------------------------------------


@operation("(Words, int64) -> Word")
def word(words, index):
    """Register ``index`` (a literal, 0 to 3) of sixteen bytes."""
    return words[index]


@word.llvm
def _(e, words, index):
    return e.extract_element(words, e.trunc(index, e.i32))


@operation("(Word) -> float32")
def half(bits):
    """The IEEE float16 in the low half of a word, as float32 (exact, subnormals included)."""
    return np.float32(np.uint16(int(bits) & 0xFFFF).view(np.float16))


@half.cuda
def _(e, bits):
    return e.fpext(e.bitcast(e.trunc(bits, e.i16), e.f16), e.f32)


@half.cpu
def _(e, bits):
    return e.from_half(e.bitcast(e.trunc(bits, e.i16), e.f16))


@operation("(Word) -> float32")
def signed_byte(value):
    """The low byte of a word read as a signed number, as float32."""
    return np.float32(np.uint8(int(value) & 0xFF).view(np.int8))


@signed_byte.cuda
def _(e, value):
    return e.sitofp(e.trunc(value, e.i8), e.f32)


@signed_byte.cpu
def _(e, value):
    return _looked_up(e, value, "qmm_signed_byte", [*range(128), *range(-128, 0)])


@operation("(Word) -> float32")
def unsigned_byte(value):
    """The low byte of a word as float32."""
    return np.float32(int(value) & 0xFF)


@unsigned_byte.cuda
def _(e, value):
    return e.uitofp(e.and_(value, e.constant(e.i32, 0xFF)), e.f32)


@unsigned_byte.cpu
def _(e, value):
    return _looked_up(e, value, "qmm_unsigned_byte", range(256))


def _looked_up(e: Any, value: Any, name: str, numbers: Sequence[int]) -> Any:
    """A byte as float32 by a table. The load is an operand of the multiplication by the block's ``d``, while a
    conversion first moves the byte to a vector register (saves 1/5 of the time of Q6_K and 1/8 of Q4_K, 14336x4096 on a
    Zen 4 core)."""
    table = e.table(name, e.f32, [float(number) for number in numbers])
    index = e.zext(e.trunc(value, e.i8), e.i64)
    return e.load(e.gep(table, [e.constant(e.i64, 0), index], inbounds=True))


@operation("(Words, int64) -> Words")
def subtract_bytes(words, value):
    """``value`` (a literal below 128) subtracted from each of sixteen bytes below 128; the bytes become signed."""
    return (words.view(np.int8) - np.int8(value)).view(np.uint32)


@subtract_bytes.cuda
def _(e, words, value):
    # The set top bit absorbs the borrow, which would otherwise reach the next byte.
    top = e.constant(words.type, [0x80808080] * 4)
    each = e.mul(e.trunc(value, e.i32), e.constant(e.i32, 0x01010101))
    return e.xor(e.sub(e.or_(words, top), e.splat(each, 4)), top)


@subtract_bytes.cpu
def _(e, words, value):
    parts = e.bitcast(words, e.vector_type(e.i8, 16))
    return e.bitcast(e.sub(parts, e.splat(e.trunc(value, e.i8), 16)), words.type)


@operation("(Word) -> Words")
def spread_bits(bits):
    """Bit ``i`` of the low half of a word as the lowest bit of byte ``i``, for the sixteen bytes."""
    return ((int(bits) >> np.arange(16)) & 1).astype(np.uint8).view(np.uint32)


@spread_bits.cuda
def _(e, bits):
    # 0x00204081 copies bit i of a nibble to bit 8 i, and others, which the mask clears.
    spread = []
    for i in range(4):
        nibble = e.and_(e.lshr(bits, e.constant(e.i32, 4 * i)), e.constant(e.i32, 15))
        copies = e.mul(nibble, e.constant(e.i32, 0x00204081))
        spread.append(e.and_(copies, e.constant(e.i32, 0x01010101)))
    return e.gathered(spread)


@spread_bits.cpu
def _(e, bits):
    # Byte i keeps bit i % 8 of its half of the 16 bits, and becomes 1 where that bit is set.
    each = e.bitcast(e.splat(e.trunc(bits, e.i16), 8), e.vector_type(e.i8, 16))
    spread = e.shuffled(each, each, [0] * 8 + [1] * 8)
    bit = e.constant(each.type, [1 << (i % 8) for i in range(16)])
    is_set = e.icmp_unsigned("!=", e.and_(spread, bit), e.constant(each.type, [0] * 16))
    return e.bitcast(e.zext(is_set, each.type), e.vector_type(e.i32, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Sixteen weights
# ---------------------------------------------------------------------------------------------------------------------


@operation("(Words | Floats, float32, float32) -> Floats")
def run_weights(q, scale, minimum):
    """The weights of a run, ``scale * q - minimum``, the product and the difference rounded to float32 each.

    A plain format passes its weights as Floats, which are returned unchanged.
    """
    if q.dtype == np.float32:
        return q
    return q.view(np.int8).astype(np.float32) * scale - minimum


@run_weights.cpu
def _(e, q, scale, minimum):
    return _weights(e, q, scale, minimum, e.fmul)  # without fast-math flags LLVM does not fuse them


@run_weights.cuda
def _(e, q, scale, minimum):
    def products(a: Any, b: Any) -> Any:
        # Explicit rounding of each: without it both compilers would fuse it with the subtraction.
        result = e.undefined(a.type)
        for i in range(16):
            product = e.ptx("mul.rn.f32 $0, $1, $2;", "=f,f,f", e.part(a, i), e.part(b, i))
            result = e.insert_element(result, product, e.constant(e.i32, i))
        return result

    return _weights(e, q, scale, minimum, products)


def _weights(e: Any, q: Any, scale: Any, minimum: Any, multiply: Callable[[Any, Any], Any]) -> Any:
    floats = e.vector_type(e.f32, 16)
    if q.type == floats:
        return q
    values = e.sitofp(e.bitcast(q, e.vector_type(e.i8, 16)), floats)
    return e.fsub(multiply(values, e.splat(scale, 16)), e.splat(minimum, 16))


@operation("(Words, Words) -> Floats")
def half_floats(low, high):
    """Sixteen float16 values, the first eight in ``low``."""
    return np.concatenate([low, high]).view(np.float16).astype(np.float32)


@half_floats.cuda
def _(e, low, high):
    return e.fpext(_halves(e, low, high), e.vector_type(e.f32, 16))


@half_floats.cpu
def _(e, low, high):
    return e.from_half(_halves(e, low, high))


def _halves(e: Any, low: Any, high: Any) -> Any:
    return e.joined(*[e.bitcast(part, e.vector_type(e.f16, 8)) for part in (low, high)])


@operation("(Words, Words) -> Floats")
def bfloat_floats(low, high):
    """Sixteen bfloat16 values, the first eight in ``low``."""
    return (np.concatenate([low, high]).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@bfloat_floats.llvm
def _(e, low, high):
    halves = e.joined(*[e.bitcast(part, e.vector_type(e.i16, 8)) for part in (low, high)])
    words = e.vector_type(e.i32, 16)
    return e.bitcast(e.shl(e.zext(halves, words), e.constant(words, [16] * 16)), e.vector_type(e.f32, 16))


@operation("(Words, Words, Words, Words) -> Floats")
def float_floats(a, b, c, d):
    """Sixteen float32 values."""
    return np.concatenate([a, b, c, d]).view(np.float32)


@float_floats.llvm
def _(e, a, b, c, d):
    return e.bitcast(e.joined(e.joined(a, b), e.joined(c, d)), e.vector_type(e.f32, 16))


@operation("(Floats, int64) -> Floats")
def masked(values, count):
    """The first ``count`` values; the others become zero, also NaN."""
    return np.where(np.arange(16) < count, values, np.float32(0))


@masked.llvm
def _(e, values, count):
    index = e.constant(e.vector_type(e.i32, 16), list(range(16)))
    keep = e.icmp_signed("<", index, e.splat(e.trunc(count, e.i32), 16))
    return e.select(keep, values, e.constant(values.type, [0.0] * 16))


@operation("(Floats, float32) -> Floats")
def scale_floats(values, scale):
    """Sixteen numbers times one."""
    return values * scale


@scale_floats.llvm
def _(e, values, scale):
    return e.fmul(values, e.splat(scale, 16))
