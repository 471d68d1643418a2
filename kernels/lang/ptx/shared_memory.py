"""Loads and stores of the CTA's shared memory, at addresses of its window.

They are LLVM instructions, not inline PTX, so LLVM may merge and move them between barriers.
"""

from __future__ import annotations

import struct

import numpy as np

from qmm.kernels.lang.current import this_cta
from qmm.kernels.lang.operation import operation

__all__ = [
    "load_shared16",
    "load_shared_float",
    "load_shared_floats",
    "store_shared16",
    "store_shared_float",
    "store_shared_word",
]

_unpack_float = struct.Struct("<f").unpack_from
_pack_float = struct.Struct("<f").pack
_pack_word = struct.Struct("<I").pack


@operation("(int64) -> Words")
def load_shared16(address):
    """16 bytes, at a multiple of 16."""
    data, at = this_cta().shared.read(address, 16, 16)
    return np.frombuffer(data, np.uint32, 4, at).copy()


@load_shared16.cuda
def _(e, address):
    return e.load(e.shared_pointer(address, e.vector_type(e.i32, 4)), align=16)


@operation("(int64, literal) -> float32[count]")
def load_shared_floats(address, count):
    """``count`` numbers (1, 2, 4 or 8), at a multiple of their size up to 16."""
    shared, nbytes = this_cta().shared, 4 * min(4, count)
    values: list[np.float32] = []
    for start in range(0, 4 * count, nbytes):
        data, at = shared.read(address + start, nbytes, nbytes)
        values.extend(np.frombuffer(data, np.float32, nbytes // 4, at))
    return tuple(values)


@load_shared_floats.cuda
def _(e, address, count):
    return e.load_floats(address, count, e.shared_pointer)


@operation("(int64) -> float32")
def load_shared_float(address):
    """The number at a multiple of 4."""
    data, at = this_cta().shared.read(address, 4, 4)
    return np.float32(_unpack_float(data, at)[0])


@load_shared_float.cuda
def _(e, address):
    return e.load(e.shared_pointer(address, e.f32), align=4)


@operation("(int64, Words) -> None")
def store_shared16(address, words):
    """Stores 16 bytes at a multiple of 16."""
    this_cta().shared.write(address, words.tobytes(), 16)


@store_shared16.cuda
def _(e, address, words):
    e.store(words, e.shared_pointer(address, words.type), align=16)


@operation("(int64, float32) -> None")
def store_shared_float(address, value):
    """Stores a number at a multiple of 4."""
    this_cta().shared.write(address, _pack_float(value), 4)


@store_shared_float.cuda
def _(e, address, value):
    e.store(value, e.shared_pointer(address, e.f32), align=4)


@operation("(int64, Word) -> None")
def store_shared_word(address, word):
    """Stores four bytes at a multiple of 4."""
    this_cta().shared.write(address, _pack_word(int(word)), 4)


@store_shared_word.cuda
def _(e, address, word):
    e.store(word, e.shared_pointer(address, e.i32), align=4)
