"""Q5_1: 32 weights in 24 bytes, ``w = d * q + m``.

::

    byte   0        2        4            8                   24
           | d  f16 | m  f16 | qh  32 bit | qs[16]: low nibbles are weights 0-15, high nibbles 16-31 |

Bit ``i`` of ``qh`` is the fifth bit of weight ``i``. One lane takes a block. ``m`` is added, so the run's minimum is
``-m``. Layout: ``block_q5_1`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load4, load16
from qmm.kernels.lang.primitives import half, spread_bits


def load(block, lane):
    return load4(block, 0), load4(block, 4), load16(block, 8)


def unpack(lane, dm, qh, qs):
    scale = half(dm)
    minimum = -half(dm >> 16)
    low = (qs & 0x0F0F0F0F) | (spread_bits(qh) << 4)
    high = ((qs >> 4) & 0x0F0F0F0F) | (spread_bits(qh >> 16) << 4)
    return (low, scale, minimum), (high, scale, minimum)


def position(lane, i):
    return i


FORMAT = Format(
    name="Q5_1",
    block_weights=32,
    block_nbytes=24,
    lanes=1,
    runs=2,
    has_minimum=True,
    load=load,
    unpack=unpack,
    position=position,
    alignment=8,
    pairs=True,
)
