"""The few operations that kernels are written in, as plain Python.

This module is the meaning of a kernel: run with these functions, a format or a schedule is ordinary Python over NumPy
values, and the tests do just that. For speed each target replaces them by intrinsics of the same name and effect
(:mod:`qmm.kernels.lang.targets.cpu`, :mod:`qmm.kernels.lang.targets.cuda`), and
:func:`qmm.kernels.lang.specialize.specialize` makes the exchange.

Three kinds of value pass between them:

========  ===================================  ==========================  =============================
value     what it is                           here                        compiled
========  ===================================  ==========================  =============================
Word      one 32-bit register                  ``np.uint32``               ``i32``
Words     sixteen bytes: four such registers   ``np.uint32`` array of 4    ``<4 x i32>``
Floats    the sixteen weights of a run         ``np.float32`` array of 16  ``<16 x float>``
========  ===================================  ==========================  =============================

Word and Words know ``& | ^ << >> + - *`` with each other and with whole numbers, always modulo 2**32 and with logical
shifts, four registers side by side for Words. Memory is little endian.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "bfloat_floats",
    "float_floats",
    "half",
    "half_floats",
    "load1",
    "load16",
    "load2",
    "load4",
    "masked",
    "run_weights",
    "signed_byte",
    "spread_bits",
    "subtract_bytes",
    "unsigned_byte",
    "word",
]

Word = np.uint32
Words = np.ndarray
Floats = np.ndarray


def load16(block: Any, offset: int) -> Words:
    """The 16 bytes at ``block + offset``, at any alignment."""
    return np.frombuffer(block, np.uint32, 4, offset).copy()


def load4(block: Any, offset: int) -> Word:
    """The 4 bytes at ``block + offset``, at any alignment."""
    return np.frombuffer(block, np.uint32, 1, offset)[0]


def load2(block: Any, offset: int) -> Word:
    """The 2 bytes at ``block + offset``, the upper half of the word zero."""
    return np.uint32(np.frombuffer(block, np.uint16, 1, offset)[0])


def load1(block: Any, offset: int) -> Word:
    """The byte at ``block + offset``, the rest of the word zero."""
    return np.uint32(np.frombuffer(block, np.uint8, 1, offset)[0])


def word(words: Words, index: int) -> Word:
    """Register ``index`` (a literal, 0 to 3) of sixteen bytes."""
    return words[index]


def half(bits: Word) -> np.float32:
    """The IEEE float16 in the low half of a word, as float32 (exact, subnormals included)."""
    return np.float32(np.uint16(int(bits) & 0xFFFF).view(np.float16))


def signed_byte(value: Word) -> np.float32:
    """The low byte of a word read as a signed number, as float32."""
    return np.float32(np.uint8(int(value) & 0xFF).view(np.int8))


def unsigned_byte(value: Word) -> np.float32:
    """The low byte of a word as float32."""
    return np.float32(int(value) & 0xFF)


def subtract_bytes(words: Words, value: int) -> Words:
    """``value`` (a literal below 128) taken from each of sixteen bytes below 128; the bytes become signed."""
    return (words.view(np.int8) - np.int8(value)).view(np.uint32)


def spread_bits(bits: Word) -> Words:
    """Bit ``i`` of the low half of a word as the lowest bit of byte ``i``, for the sixteen bytes."""
    return ((int(bits) >> np.arange(16)) & 1).astype(np.uint8).view(np.uint32)


def run_weights(q: Words | Floats, scale: np.float32, minimum: np.float32) -> Floats:
    """The weights of a run, ``scale * q - minimum``, the product and the difference rounded to float32 each.

    A plain format has its weights already and passes them as Floats: they come back as they are.
    """
    if q.dtype == np.float32:
        return q
    return q.view(np.int8).astype(np.float32) * scale - minimum


def half_floats(low: Words, high: Words) -> Floats:
    """Sixteen float16 values, the first eight in ``low``."""
    return np.concatenate([low, high]).view(np.float16).astype(np.float32)


def bfloat_floats(low: Words, high: Words) -> Floats:
    """Sixteen bfloat16 values, the first eight in ``low``."""
    return (np.concatenate([low, high]).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def float_floats(a: Words, b: Words, c: Words, d: Words) -> Floats:
    """Sixteen float32 values."""
    return np.concatenate([a, b, c, d]).view(np.float32)


def masked(values: Floats, count: int) -> Floats:
    """The first ``count`` values; the others become zero, whatever they were (a NaN too)."""
    return np.where(np.arange(16) < count, values, np.float32(0))
