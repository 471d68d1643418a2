"""The operations of the CPU's kernels: numbers in memory of the process, and arithmetic of eight or sixteen at once.

Nothing here names an instruction set. The integer product is written so that LLVM recognises a multiply-add of
neighbouring pairs (``vpmaddwd`` on x86-64), and everything else is plain vector arithmetic that any back end lowers.
In Python too, addresses are those of this process, of any alignment.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from qmm.kernels.lang.operation import operation

__all__ = [
    "dot_run",
    "fetch_add",
    "float_of_bits",
    "load_float",
    "load_floats",
    "max_magnitude",
    "multiply_add",
    "store_byte",
    "store_float",
    "store_floats",
    "store_rounded",
    "sum_floats",
    "sum_partial",
    "zero_floats",
    "zero_partial",
]


@operation("(int64, int64) -> float32")
def load_float(address, offset):
    """The number at ``address + offset``."""
    return np.frombuffer(ctypes.string_at(address + offset, 4), np.float32)[0]


@load_float.cpu
def _(e, address, offset):
    return e.unaligned(address, offset, e.f32)


@operation("(int64, int64) -> Floats")
def load_floats(address, offset):
    """The sixteen numbers at ``address + offset``."""
    return np.frombuffer(ctypes.string_at(address + offset, 64), np.float32)


@load_floats.cpu
def _(e, address, offset):
    return e.unaligned(address, offset, e.vector_type(e.f32, 16))


@operation("(int64, int64, Word) -> None")
def store_byte(address, offset, value):
    """Stores the low byte of a word at ``address + offset``."""
    ctypes.memmove(address + offset, bytes([int(value) & 0xFF]), 1)


@store_byte.cpu
def _(e, address, offset, value):
    _store(e, address, offset, e.trunc(value, e.i8))


@operation("(int64, int64, float32) -> None")
def store_float(address, offset, value):
    """Stores a number at ``address + offset``."""
    ctypes.memmove(address + offset, np.float32(value).tobytes(), 4)


@store_float.cpu
def _(e, address, offset, value):
    _store(e, address, offset, value)


@operation("(int64, int64, Floats) -> None")
def store_floats(address, offset, values):
    """Stores sixteen numbers at ``address + offset``."""
    ctypes.memmove(address + offset, values.tobytes(), 64)


@store_floats.cpu
def _(e, address, offset, values):
    _store(e, address, offset, values)


def _store(e: Any, address: Any, offset: Any, value: Any) -> None:
    e.store(value, e.inttoptr(e.add(address, offset), value.type.as_pointer())).align = 1


@operation("(int64, int64) -> int64")
def fetch_add(address, value):
    """Atomically adds ``value`` to the int64 at ``address`` and returns its old value."""
    number = ctypes.c_int64.from_address(address)
    before = number.value
    number.value = before + value
    return before


@fetch_add.cpu
def _(e, address, value):
    return e.atomic_rmw("add", e.inttoptr(address, e.i64.as_pointer()), value, "monotonic")


@operation("() -> Partial")
def zero_partial():
    """Eight zeros: the running sums of an integer product, one for each pair of weights of a run."""
    return np.zeros(8, np.float32)


@zero_partial.cpu
def _(e):
    return e.constant(e.vector_type(e.f32, 8), [0.0] * 8)


@operation("() -> Floats")
def zero_floats():
    """Sixteen zeros."""
    return np.zeros(16, np.float32)


@zero_floats.cpu
def _(e):
    return e.constant(e.vector_type(e.f32, 16), [0.0] * 16)


@operation("(Partial, Words, int64, float32) -> Partial")
def dot_run(total, q, x, scale):
    """``total + scale * (q . x)`` in eight lanes: the 16 signed bytes of a run by the 16 int16 at address ``x``."""
    activations = np.frombuffer(ctypes.string_at(x, 32), np.int16)
    pairs = (q.view(np.int8).astype(np.int32) * activations).reshape(8, 2).sum(axis=1)
    return (pairs * np.float64(scale) + total).astype(np.float32)


@dot_run.cpu
def _(e, total, q, x, scale):
    wide, short = e.vector_type(e.i32, 16), e.vector_type(e.i16, 16)
    load = e.load(e.inttoptr(x, short.as_pointer()))
    load.align = 2
    # Through int16 to int32: LLVM turns this pattern into one multiply-add of pairs.
    weights = e.sext(e.sext(e.bitcast(q, e.vector_type(e.i8, 16)), short), wide)
    products = e.mul(weights, e.sext(load, wide))
    undefined = e.undefined(wide)
    pairs = e.add(*[e.shuffled(products, undefined, range(first, 16, 2)) for first in (0, 1)])
    return e.fmuladd(e.sitofp(pairs, e.vector_type(e.f32, 8)), e.splat(scale, 8), total)


@operation("(Floats, Floats, Floats) -> Floats")
def multiply_add(total, a, b):
    """``total + a * b`` in sixteen lanes; rounded once where the CPU has an instruction for it, as here, else twice."""
    return (total + a.astype(np.float64) * b).astype(np.float32)


@multiply_add.cpu
def _(e, total, a, b):
    return e.fmuladd(a, b, total)


@operation("(Partial) -> float32")
def sum_partial(values):
    """The sum of eight numbers, by halving: lower half plus upper half, three times."""
    return _sum(values)


@operation("(Floats) -> float32")
def sum_floats(values):
    """The sum of sixteen numbers, likewise."""
    return _sum(values)


def _sum(values: np.ndarray) -> np.float32:
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


@sum_partial.cpu
def _(e, values):
    return e.total(values)


@sum_floats.cpu
def _(e, values):
    return e.total(values)


@operation("(int64, Floats) -> int64")
def max_magnitude(most, values):
    """The larger of ``most`` and the largest magnitude among sixteen numbers, as the bits of a float32: so a NaN is
    larger than everything, and not lost."""
    return max(int(most), int((values.view(np.uint32) & 0x7FFFFFFF).max()))


@max_magnitude.cpu
def _(e, most, values):
    words = e.vector_type(e.i32, 16)
    bits = e.and_(e.bitcast(values, words), e.constant(words, [0x7FFFFFFF] * 16))
    largest = e.call(e.declared("llvm.vector.reduce.umax.v16i32", e.i32, [words]), [bits])
    return e.larger(most, e.zext(largest, e.i64))


@operation("(int64) -> float32")
def float_of_bits(bits):
    """The float32 of these bits."""
    return np.uint32(bits).view(np.float32)


@float_of_bits.cpu
def _(e, bits):
    return e.bitcast(e.trunc(bits, e.i32), e.f32)


@operation("(int64, int64, Floats) -> float32")
def store_rounded(address, offset, values):
    """Stores sixteen numbers within 2**15, rounded to int16 with ties to even; returns their sum."""
    rounded = np.rint(values)
    ctypes.memmove(address + offset, rounded.astype(np.int16).tobytes(), 32)
    return np.float32(rounded.sum())


@store_rounded.cpu
def _(e, address, offset, values):
    # Beside 1.5 * 2**23 a float32 has no fraction. Not every CPU has an instruction that rounds.
    large = e.splat(e.constant(e.f32, 1.5 * 2**23), 16)
    rounded = e.fsub(e.fadd(values, large), large)
    words = e.fptosi(rounded, e.vector_type(e.i32, 16))
    _store(e, address, offset, e.trunc(words, e.vector_type(e.i16, 16)))
    total = e.call(e.declared("llvm.vector.reduce.add.v16i32", e.i32, [words.type]), [words])
    return e.sitofp(total, e.f32)
