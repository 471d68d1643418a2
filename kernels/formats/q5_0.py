"""Q5_0: 32 weights in 22 bytes, ``w = d * (q - 16)``.

::

    byte   0        2            6                   22
           | d  f16 | qh  32 bit | qs[16]: low nibbles are weights 0-15, high nibbles 16-31 |

Bit ``i`` of ``qh`` is the fifth bit of weight ``i``. One lane takes a block. Layout: ``block_q5_0`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load2, load4, load16
from qmm.kernels.lang.primitives import half, spread_bits


def load(block, lane):
    return load2(block, 0), load4(block, 2), load16(block, 6)


def unpack(lane, d, qh, qs):
    # Five bits at the top of a byte, the highest inverted, are 8 * (q - 16) as a signed byte.
    scale = half(d) * 0.125
    low = ((qs << 3) & 0x78787878) | ((spread_bits(qh) << 7) ^ 0x80808080)
    high = ((qs >> 1) & 0x78787878) | ((spread_bits(qh >> 16) << 7) ^ 0x80808080)
    return (low, scale, 0.0), (high, scale, 0.0)


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
    pairs=True,
)
