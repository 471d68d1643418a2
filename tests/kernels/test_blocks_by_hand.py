"""A block of every format written by hand: fields as ggml-common.h has them, and the weights that they mean.

It is the one thing to write for a new format; the other tests walk the table FORMATS.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
from decoded_blocks import decode, oracle

from qmm.kernels.formats import FORMATS, Format

# One bit pattern each of: zero, minus zero, one, a fraction, the largest, the smallest normal and subnormal, infinity.
HALVES = [0x0000, 0x8000, 0x3C00, 0xB555, 0x7BFF, 0x0400, 0x0001, 0x7C00] * 2
HALF_VALUES = [0.0, -0.0, 1.0, -1365 / 4096, 65504.0, 2.0**-14, 2.0**-24, float("inf")] * 2
BFLOATS = [0x0000, 0x8000, 0x3F80, 0xBEAB, 0x7F7F, 0x0080, 0x0001, 0xFF80] * 2
BFLOAT_VALUES = [0.0, -0.0, 1.0, -171 / 512, 255 * 2.0**120, 2.0**-126, 2.0**-133, -float("inf")] * 2


def q8_0() -> tuple[bytes, list[float]]:
    d = struct.pack("<e", -0.25)
    qs = bytes([0x80, 0x81, 0xFF, 0x00, 0x01, 0x7F]) + bytes(range(10, 36))
    return d + qs, [-0.25 * q for q in (-128, -127, -1, 0, 1, 127, *range(10, 36))]


def q4_0() -> tuple[bytes, list[float]]:
    d = struct.pack("<e", 0.5)
    qs = bytes([0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F])
    return d + qs, [0.5 * (q - 8) for q in (*range(16), *reversed(range(16)))]


def q4_1() -> tuple[bytes, list[float]]:
    d, m = struct.pack("<e", 1.5), struct.pack("<e", -3.0)
    qs = bytes([0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F])
    return d + m + qs, [1.5 * q - 3.0 for q in (*range(16), *reversed(range(16)))]


# The fifth bit is set for weights 0, 9, 15, 16, 30: 0x40018201.
FIFTH = struct.pack("<I", 0x40018201)
FIVE_BITS = [19, 3, 3, 3, 3, 3, 3, 3, 3, 19, 3, 3, 3, 3, 3, 19, 28, *[12] * 13, 28, 12]


def q5_0() -> tuple[bytes, list[float]]:
    return struct.pack("<e", 0.125) + FIFTH + bytes([0xC3] * 16), [0.125 * (q - 16) for q in FIVE_BITS]


def q5_1() -> tuple[bytes, list[float]]:
    block = struct.pack("<ee", -2.0, 7.0) + FIFTH + bytes([0xC3] * 16)
    return block, [-2.0 * q + 7.0 for q in FIVE_BITS]


def q2_k() -> tuple[bytes, list[float]]:
    # Run i has the scale i (low nibble) and the minimum 15 - i (high nibble).
    scales = bytes([0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F])
    # First half: 0b11100100 holds 0 for weights 0-31, 1 for 32-63, 2 for 64-95, 3 for 96-127. Second: the reverse, but
    # its last byte 0b01010101.
    qs = bytes([0xE4] * 32 + [0x1B] * 31 + [0x55])
    q = [n // 32 for n in range(128)] + [3 - n // 32 for n in range(128)]
    for n in (159, 191, 223, 255):
        q[n] = 1
    block = scales + qs + struct.pack("<ee", 1.5, 0.5)
    return block, [1.5 * (n // 16) * q[n] - 0.5 * (15 - n // 16) for n in range(256)]


def q3_k() -> tuple[bytes, list[float]]:
    # Bit j of a byte of hmask is weight 32 j + byte's third bit: set for 64-95 and 224-255 (0x84), for byte 0 for none.
    hmask = bytes([0x00] + [0x84] * 31)
    qs = bytes([0xE4] * 32 + [0x1B] * 32)  # as in q2_k
    low = [n // 32 for n in range(128)] + [3 - n // 32 for n in range(128)]
    q = [low[n] - (0 if n // 32 in (2, 7) and n % 32 != 0 else 4) for n in range(256)]
    six_bits = [11, 48, 21, 58, 31, 4, 41, 14, 51, 24, 61, 34, 7, 44, 17, 54]
    # In hexadecimal 0B 30 15 3A 1F 04 29 0E, 33 18 3D 22 07 2C 11 36: eight bytes of low digits, the first eight
    # scales' in the low nibbles; then four of high digits, two bits each, those of scales 0, 4, 8, 12 in the first.
    scales = bytes([0x3B, 0x80, 0xD5, 0x2A, 0x7F, 0xC4, 0x19, 0x6E, 0b00110100, 0b10010011, 0b01111001, 0b11100011])
    block = hmask + qs + scales + struct.pack("<e", -0.5)
    return block, [-0.5 * (six_bits[n // 16] - 32) * q[n] for n in range(256)]


# Scales 0-3 and minima 0-3 are whole in the low six bits of bytes 0-7. Of 4-7, in hexadecimal 09 1A 2B 3C and
# 37 26 15 04, the low digits share bytes 8-11 and the high ones are the top two bits of bytes 0-7.
SCALES = [0x01, 0x12, 0x23, 0x34, 0x09, 0x1A, 0x2B, 0x3C]
MINIMA = [0x3F, 0x2E, 0x1D, 0x0C, 0x37, 0x26, 0x15, 0x04]
PACKED_SCALES = bytes([0x01, 0x52, 0xA3, 0xF4, 0xFF, 0xAE, 0x5D, 0x0C, 0x79, 0x6A, 0x5B, 0x4C])
# 32 bytes hold 32 weights in their low nibbles and the next 32 in their high ones.
NIBBLES = bytes([0x10] * 32 + [0x32] * 32 + [0x54] * 32 + [0x76] * 16 + [0xFE] * 16)
FOUR_BITS = [n // 32 for n in range(192)] + [6] * 16 + [14] * 16 + [7] * 16 + [15] * 16


def q4_k() -> tuple[bytes, list[float]]:
    block = struct.pack("<ee", 0.5, -0.25) + PACKED_SCALES + NIBBLES
    return block, [0.5 * SCALES[n // 32] * FOUR_BITS[n] + 0.25 * MINIMA[n // 32] for n in range(256)]


def q5_k() -> tuple[bytes, list[float]]:
    # Byte l of qh holds the fifth bit of weights l, 32 + l, ..., 224 + l: 0x81 for the first and the last 32; byte 5
    # for weights 37 and 197 instead.
    qh = bytes([0x81] * 5 + [0x42] + [0x81] * 26)
    fifth = [n // 32 in ((1, 6) if n % 32 == 5 else (0, 7)) for n in range(256)]
    block = struct.pack("<ee", 0.5, -0.25) + PACKED_SCALES + qh + NIBBLES
    return block, [0.5 * SCALES[n // 32] * (FOUR_BITS[n] + 16 * fifth[n]) + 0.25 * MINIMA[n // 32] for n in range(256)]


def q6_k() -> tuple[bytes, list[float]]:
    # A half of the block has 64 bytes of ql, its weights 0-63 in their low nibbles and 64-127 in the high ones; and 32
    # of qh, with two bits for each of the weights l, 32 + l, 64 + l, 96 + l.
    ql = bytes([0x21] * 32 + [0x43] * 32 + [0x65] * 32 + [0x87] * 32)
    low = [1] * 32 + [3] * 32 + [2] * 32 + [4] * 32 + [5] * 32 + [7] * 32 + [6] * 32 + [8] * 32
    qh = bytes([0b11100100] * 32 + [0b00011011] * 31 + [0b10101010])
    high = [n // 32 for n in range(128)] + [3 - n // 32 for n in range(128)]
    for n in (159, 191, 223, 255):
        high[n] = 2
    scales = [-128, 127, -1, 0, 1, 2, 3, 5, -7, 11, -13, 17, -19, 23, -29, 31]
    block = ql + qh + struct.pack("<16b", *scales) + struct.pack("<e", 0.25)
    return block, [0.25 * scales[n // 16] * (low[n] + 16 * high[n] - 32) for n in range(256)]


HAND_MADE: dict[str, Callable[[], tuple[bytes, list[float]]]] = {
    "F32": lambda: (struct.pack("<16f", *range(-8, 8)), [float(value) for value in range(-8, 8)]),
    "F16": lambda: (struct.pack("<16H", *HALVES), HALF_VALUES),
    "BF16": lambda: (struct.pack("<16H", *BFLOATS), BFLOAT_VALUES),
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


def test_every_format_has_a_block_by_hand() -> None:
    assert set(HAND_MADE) == set(FORMATS)


@pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)
def test_a_block_by_hand_means_what_it_says(block_format: Format) -> None:
    block, expected = HAND_MADE[block_format.name]()
    assert len(block) == block_format.block_nbytes
    assert len(expected) == block_format.block_weights
    weights = np.array(expected, np.float32)
    np.testing.assert_array_equal(weights, np.array(expected))  # float32 holds what was computed by hand
    np.testing.assert_array_equal(decode(block_format, block), weights)
    np.testing.assert_array_equal(oracle(block_format, block), weights)
