"""Q3_K: 256 weights in 110 bytes, ``w = d * (scale - 32) * (q - 4)`` with a 6-bit scale for each run.

::

    byte   0              32                           96           108      110
           | hmask[32]    | qs[64]                     | scales[12] | d  f16 |

The block has two halves of 128 weights with 32 bytes of ``qs`` each; the bits ``2j`` of those bytes are the low bits of
the half's weights ``32 j`` to ``32 j + 31``, and bit ``4 half + j`` of ``hmask`` their third bit. Scale ``i`` has its
low four bits in byte ``i % 8`` (low nibble for ``i < 8``, else high) and its upper two in byte ``8 + i % 4`` at bit ``2
(i / 4)``. A lane takes 16 bytes of ``qs``, which are four runs. Layout: ``block_q3_K`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.primitives import half, load2, load4, load16, unsigned_byte


def load(block, lane):
    return (
        load2(block, 108),
        load4(block, 96),
        load4(block, 100),
        load4(block, 104),
        load16(block, 16 * (lane & 1)),
        load16(block, 32 + 16 * lane),
    )


def unpack(lane, d_bits, scales_low, scales_high, scales_top, hmask, qs):
    d = half(d_bits) * 0.03125
    upper = 4 * (lane >> 1)
    shift = 8 * (lane & 1)
    top = scales_top >> upper
    low = (((scales_low >> upper) & 0x0F0F0F0F) | ((top & 0x03030303) << 4)) >> shift
    high = (((scales_high >> upper) & 0x0F0F0F0F) | (((top >> 2) & 0x03030303) << 4)) >> shift
    third = hmask >> upper
    return (
        (quants(qs << 5, third << 7), d * (unsigned_byte(low & 63) - 32.0), 0.0),
        (quants(qs << 3, third << 6), d * (unsigned_byte((low >> 16) & 63) - 32.0), 0.0),
        (quants(qs << 1, third << 5), d * (unsigned_byte(high & 63) - 32.0), 0.0),
        (quants(qs >> 1, third << 4), d * (unsigned_byte((high >> 16) & 63) - 32.0), 0.0),
    )


def quants(low_bits, third_bit):
    """32 times the signed weights, from their two low bits and their third: these at the top of a byte, the highest
    inverted, are ``32 * (q - 4)``."""
    return ((low_bits & 0x60606060) | (third_bit & 0x80808080)) ^ 0x80808080


def position(lane, i):
    return 8 * (lane >> 1) + (lane & 1) + 2 * i


FORMAT = Format(
    name="Q3_K",
    block_weights=256,
    block_nbytes=110,
    lanes=4,
    runs=4,
    has_minimum=False,
    load=load,
    unpack=unpack,
    position=position,
    alignment=2,
)
