"""Loads and stores of global memory.

Activations may be written by a predecessor that has not ended when this kernel starts. They are never loaded with
``.nc``, which may return the stale content of an L1 line.

``load_global_run``, ``load_global_float`` and ``store_global_float`` are the CPU's too: a helper can serve both.
There, and in Python outside of the emulator, addresses are those of this process, of any alignment.
"""

from __future__ import annotations

import ctypes
import struct

import numpy as np

from qmm.kernels.lang.current import cta_or_none, this_cta
from qmm.kernels.lang.operation import operation

__all__ = [
    "load_global16",
    "load_global16_l2",
    "load_global16_no_allocate",
    "load_global_bfloat",
    "load_global_byte",
    "load_global_float",
    "load_global_floats",
    "load_global_floats_l2",
    "load_global_half",
    "load_global_run",
    "store_global_bfloat",
    "store_global_byte",
    "store_global_float",
    "store_global_half",
    "store_global_run",
    "store_global_run_part",
    "store_global_word",
]

PAST_L1 = "ld.global.cg.v4.u32 {$0, $1, $2, $3}, [$4];"
NO_ALLOCATE = "ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4];"

_unpack_float = struct.Struct("<f").unpack_from
_pack_float = struct.Struct("<f").pack
_pack_word = struct.Struct("<I").pack


# ---------------------------------------------------------------------------------------------------------------------
# Global memory, sixteen bytes or several numbers at a time
# ---------------------------------------------------------------------------------------------------------------------


def _global_words(address: int) -> np.ndarray:
    data, at = this_cta().memory.read(address, 16, 16)
    return np.frombuffer(data, np.uint32, 4, at).copy()


@operation("(int64) -> Words")
def load_global16(address):
    """16 bytes, at a multiple of 16, through L1."""
    return _global_words(address)


@load_global16.cuda
def _(e, address):
    return e.load(e.global_pointer(address, e.vector_type(e.i32, 4)), align=16)


@operation("(int64) -> Words")
def load_global16_l2(address):
    """16 bytes, at a multiple of 16, past L1."""
    return _global_words(address)


@load_global16_l2.cuda
def _(e, address):
    return e.gathered(e.ptx(PAST_L1, "=r,=r,=r,=r,l", address, volatile=True))


@operation("(int64) -> Words")
def load_global16_no_allocate(address):
    """16 bytes, at a multiple of 16, without allocating in L1: for memory that is read once and that no kernel
    writes."""
    return _global_words(address)


@load_global16_no_allocate.cuda
def _(e, address):
    return e.gathered(e.ptx(NO_ALLOCATE, "=r,=r,=r,=r,l", address))


@operation("(int64, literal) -> float32[count]")
def load_global_floats(address, count):
    """``count`` numbers (1, 2, 4 or 8), at a multiple of their size up to 16, through L1."""
    memory, nbytes = this_cta().memory, 4 * min(4, count)
    values: list[np.float32] = []
    for start in range(0, 4 * count, nbytes):
        data, at = memory.read(address + start, nbytes, nbytes)
        values.extend(np.frombuffer(data, np.float32, nbytes // 4, at))
    return tuple(values)


@load_global_floats.cuda
def _(e, address, count):
    return e.load_floats(address, count, e.global_pointer)


@operation("(int64) -> float32[4]")
def load_global_floats_l2(address):
    """Four numbers, at a multiple of 16, past L1."""
    data, at = this_cta().memory.read(address, 16, 16)
    return tuple(np.frombuffer(data, np.float32, 4, at))


@load_global_floats_l2.cuda
def _(e, address):
    words = e.gathered(e.ptx(PAST_L1, "=r,=r,=r,=r,l", address, volatile=True))
    return e.parts(e.bitcast(words, e.vector_type(e.f32, 4)))


@operation("(int64) -> Floats")
def load_global_run(address):
    """Sixteen numbers at a multiple of 16 bytes, through L1."""
    cta = cta_or_none()
    if cta is None:
        return np.frombuffer(ctypes.string_at(address, 64), np.float32)
    pieces = [cta.memory.read(address + start, 16, 16) for start in range(0, 64, 16)]
    return np.concatenate([np.frombuffer(data, np.float32, 4, at) for data, at in pieces])


@load_global_run.cuda
def _(e, address):
    return e.gathered(e.load_floats(address, 16, e.global_pointer))


@load_global_run.cpu
def _(e, address):
    return e.unaligned(address, e.constant(e.i64, 0), e.vector_type(e.f32, 16))


@operation("(int64, Floats) -> None")
def store_global_run(address, values):
    """Stores the 16 weights of a run at a multiple of 16 bytes."""
    memory, content = this_cta().memory, values.tobytes()
    for start in range(0, 64, 16):
        memory.write(address + start, content[start : start + 16], 16)


@store_global_run.cuda
def _(e, address, values):
    for i in range(0, 16, 4):
        parts = [e.part(values, i + j) for j in range(4)]
        place = e.add(address, e.constant(e.i64, 4 * i))
        e.ptx("st.global.v4.f32 [$0], {$1, $2, $3, $4};", "l,f,f,f,f", place, *parts, volatile=True)


@operation("(int64, Floats, int64) -> None")
def store_global_run_part(address, values, count):
    """Stores the first ``count`` weights of a run, at a multiple of 4 bytes."""
    memory, content = this_cta().memory, values.tobytes()
    for start in range(0, 4 * max(0, min(16, count)), 4):
        memory.write(address + start, content[start : start + 4], 4)


@store_global_run_part.cuda
def _(e, address, values, count):
    for i in range(16):
        with e.if_then(e.icmp_signed("<", e.constant(e.i64, i), count)):
            place = e.add(address, e.constant(e.i64, 4 * i))
            e.ptx("st.global.f32 [$0], $1;", "l,f", place, e.part(values, i), volatile=True)


# ---------------------------------------------------------------------------------------------------------------------
# Global memory, one number at a time
# ---------------------------------------------------------------------------------------------------------------------


@operation("(int64) -> float32")
def load_global_float(address):
    """The number at a multiple of 4."""
    cta = cta_or_none()
    data, at = (ctypes.string_at(address, 4), 0) if cta is None else cta.memory.read(address, 4, 4)
    return np.float32(_unpack_float(data, at)[0])


@load_global_float.cuda
def _(e, address):
    return e.ptx("ld.global.f32 $0, [$1];", "=f,l", address, volatile=True)


@load_global_float.cpu
def _(e, address):
    return e.unaligned(address, e.constant(e.i64, 0), e.f32)


@operation("(int64) -> float32")
def load_global_half(address):
    """The IEEE float16 at a multiple of 2."""
    data, at = this_cta().memory.read(address, 2, 2)
    return np.float32(np.frombuffer(data, np.float16, 1, at)[0])


@load_global_half.cuda
def _(e, address):
    bits = e.ptx("ld.global.b16 $0, [$1];", "=h,l", address, volatile=True)
    return e.fpext(e.bitcast(bits, e.f16), e.f32)


@operation("(int64) -> float32")
def load_global_bfloat(address):
    """The bfloat16 at a multiple of 2."""
    data, at = this_cta().memory.read(address, 2, 2)
    return np.uint32(int.from_bytes(data[at : at + 2], "little") << 16).view(np.float32)


@load_global_bfloat.cuda
def _(e, address):
    bits = e.ptx("ld.global.b16 $0, [$1];", "=h,l", address, volatile=True)
    return e.bitcast(e.shl(e.zext(bits, e.i32), e.constant(e.i32, 16)), e.f32)


@operation("(int64) -> int64")
def load_global_byte(address):
    """The byte, 0 to 255."""
    data, at = this_cta().memory.read(address, 1, 1)
    return data[at]


@load_global_byte.cuda
def _(e, address):
    return e.zext(e.ptx("ld.global.u8 $0, [$1];", "=r,l", address, volatile=True), e.i64)


@operation("(int64, float32) -> None")
def store_global_float(address, value):
    """Stores a number at a multiple of 4."""
    cta = cta_or_none()
    if cta is None:
        ctypes.memmove(address, _pack_float(value), 4)
    else:
        cta.memory.write(address, _pack_float(value), 4)


@store_global_float.cuda
def _(e, address, value):
    e.ptx("st.global.f32 [$0], $1;", "l,f", address, value, volatile=True)


@store_global_float.cpu
def _(e, address, value):
    e.store(value, e.inttoptr(address, e.f32.as_pointer())).align = 1


@operation("(int64, float32) -> None")
def store_global_half(address, value):
    """Stores a number as IEEE float16, rounded to nearest, halves to even, at a multiple of 2."""
    this_cta().memory.write(address, np.float16(value).tobytes(), 2)


@store_global_half.cuda
def _(e, address, value):
    bits = e.ptx("cvt.rn.f16.f32 $0, $1;", "=h,f", value)
    e.ptx("st.global.b16 [$0], $1;", "l,h", address, bits, volatile=True)


@operation("(int64, float32) -> None")
def store_global_bfloat(address, value):
    """Stores a number as bfloat16, rounded to nearest, halves to even, at a multiple of 2."""
    bits = int(np.float32(value).view(np.uint32))
    nan = bits & 0x7FFFFFFF > 0x7F800000
    rounded = 0x7FFF if nan else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF
    this_cta().memory.write(address, rounded.to_bytes(2, "little"), 2)


@store_global_bfloat.cuda
def _(e, address, value):
    bits = e.ptx("cvt.rn.bf16.f32 $0, $1;", "=h,f", value)
    e.ptx("st.global.b16 [$0], $1;", "l,h", address, bits, volatile=True)


@operation("(int64, int64) -> None")
def store_global_byte(address, value):
    """Stores the low byte of an integer."""
    this_cta().memory.write(address, bytes([value & 0xFF]), 1)


@store_global_byte.cuda
def _(e, address, value):
    e.ptx("st.global.b8 [$0], $1;", "l,h", address, e.trunc(value, e.i16), volatile=True)


@operation("(int64, Word) -> None")
def store_global_word(address, word):
    """Stores four bytes at a multiple of 4."""
    this_cta().memory.write(address, _pack_word(int(word)), 4)


@store_global_word.cuda
def _(e, address, word):
    e.ptx("st.global.b32 [$0], $1;", "l,r", address, word, volatile=True)
