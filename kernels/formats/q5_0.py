"""Q5_0: 32 weights in 22 bytes, ``w = d * (q - 16)``.

::

    byte   0        2            6                   22
           | d  f16 | qh  32 bit | qs[16]: low nibbles are weights 0-15, high nibbles 16-31 |

Bit ``i`` of ``qh`` is the fifth bit of weight ``i``. One lane takes a block. Layout: ``block_q5_0`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.primitives import half, load2, load4, load16, spread_bits, subtract_bytes


def load(block, lane):
    return load2(block, 0), load4(block, 2), load16(block, 6)


def unpack(lane, d, qh, qs):
    scale = half(d)
    low = (qs & 0x0F0F0F0F) | (spread_bits(qh) << 4)
    high = ((qs >> 4) & 0x0F0F0F0F) | (spread_bits(qh >> 16) << 4)
    return (subtract_bytes(low, 16), scale, 0.0), (subtract_bytes(high, 16), scale, 0.0)


def position(lane, i):
    return i


FORMAT = Format(
    name="Q5_0",
    block_weights=32,
    block_nbytes=22,
    lanes=1,
    runs=2,
    has_minimum=False,
    load=load,
    unpack=unpack,
    position=position,
    alignment=2,
)
