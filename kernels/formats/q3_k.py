"""Q3_K: 256 weights in 110 bytes, ``w = d * (scale - 32) * (q - 4)`` with a 6-bit scale for each run.

::

    byte   0              32                           96           108      110
           | hmask[32]    | qs[64]                     | scales[12] | d  f16 |

The block has two halves of 128 weights with 32 bytes of ``qs`` each; the bits ``2j`` of those bytes are the low bits of
the half's weights ``32 j`` to ``32 j + 31``, and bit ``4 half + j`` of ``hmask`` their third bit. Scale ``i`` has its
low four bits in byte ``i % 8`` (low nibble for ``i < 8``, else high) and its upper two in byte ``8 + i % 4`` at bit ``2
(i / 4)``. A lane takes a half, four pairs of runs. The product of a weight and its scale is -124 to 128, so
negated it is a signed byte, and all runs have the block's ``-d`` for their scale. Layout: ``block_q3_K`` in
ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load2, load4, load16
from qmm.kernels.lang.primitives import half, unsigned_byte


def load(block, lane):
    return (
        load2(block, 108),
        load4(block, 96),
        load4(block, 100),
        load4(block, 104),
        load16(block, 0),
        load16(block, 16),
        load16(block, 32 + 32 * lane),
        load16(block, 48 + 32 * lane),
    )


def unpack(lane, d_bits, scales_low, scales_high, scales_top, first_third, second_third, first, second):
    d = half(d_bits) * 0.03125
    low, high = scales(lane, scales_low, scales_high, scales_top)
    first_third, second_third = first_third >> (4 * lane), second_third >> (4 * lane)
    return (
        (quants(first << 5, first_third << 7), d * (unsigned_byte(low & 63) - 32.0), 0.0),
        (quants(second << 5, second_third << 7), d * (unsigned_byte((low >> 8) & 63) - 32.0), 0.0),
        (quants(first << 3, first_third << 6), d * (unsigned_byte((low >> 16) & 63) - 32.0), 0.0),
        (quants(second << 3, second_third << 6), d * (unsigned_byte((low >> 24) & 63) - 32.0), 0.0),
        (quants(first << 1, first_third << 5), d * (unsigned_byte(high & 63) - 32.0), 0.0),
        (quants(second << 1, second_third << 5), d * (unsigned_byte((high >> 8) & 63) - 32.0), 0.0),
        (quants(first >> 1, first_third << 4), d * (unsigned_byte((high >> 16) & 63) - 32.0), 0.0),
        (quants(second >> 1, second_third << 4), d * (unsigned_byte((high >> 24) & 63) - 32.0), 0.0),
    )


def unpack_product(lane, d_bits, scales_low, scales_high, scales_top, first_third, second_third, first, second):
    d = -half(d_bits)
    low, high = scales(lane, scales_low, scales_high, scales_top)
    first_third, second_third = first_third >> (4 * lane), second_third >> (4 * lane)
    return (
        (scaled_quants(first, first_third << 2, low & 63), d, 0.0),
        (scaled_quants(second, second_third << 2, (low >> 8) & 63), d, 0.0),
        (scaled_quants(first >> 2, first_third << 1, (low >> 16) & 63), d, 0.0),
        (scaled_quants(second >> 2, second_third << 1, (low >> 24) & 63), d, 0.0),
        (scaled_quants(first >> 4, first_third, high & 63), d, 0.0),
        (scaled_quants(second >> 4, second_third, (high >> 8) & 63), d, 0.0),
        (scaled_quants(first >> 6, first_third >> 1, (high >> 16) & 63), d, 0.0),
        (scaled_quants(second >> 6, second_third >> 1, (high >> 24) & 63), d, 0.0),
    )


def scales(lane, scales_low, scales_high, scales_top):
    """The scales of the lane's runs, a byte each, 32 larger."""
    top = scales_top >> (4 * lane)
    return (
        ((scales_low >> (4 * lane)) & 0x0F0F0F0F) | ((top & 0x03030303) << 4),
        ((scales_high >> (4 * lane)) & 0x0F0F0F0F) | (((top >> 2) & 0x03030303) << 4),
    )


def quants(low_bits, third_bit):
    """32 times the signed weights, from their two low bits and their third: these at the top of a byte, the highest
    inverted, are ``32 * (q - 4)``."""
    return ((low_bits & 0x60606060) | (third_bit & 0x80808080)) ^ 0x80808080


def scaled_quants(low_bits, third_bit, scale):
    """``(4 - q) * (scale - 32)`` of sixteen weights, from the lowest two bits of ``low_bits`` and bit 2 of
    ``third_bit``. With 128 added, which gives ``32 * q - q * scale + 4 * scale``, no byte is negative or above 255."""
    q = (low_bits & 0x03030303) | (third_bit & 0x04040404)
    return (q * 32 - q * scale + scale * 0x04040404) ^ 0x80808080


def position(lane, i):
    return 8 * lane + i


FORMAT = Format(
    name="Q3_K",
    block_weights=256,
    block_nbytes=110,
    lanes=2,
    runs=8,
    has_minimum=False,
    load=load,
    unpack=unpack,
    position=position,
    alignment=2,
    pairs=True,
    unpack_product=unpack_product,
)
