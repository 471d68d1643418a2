"""Q4_1: 32 weights in 20 bytes, ``w = d * q + m``.

::

    byte   0        2        4                       20
           | d  f16 | m  f16 | qs[16]: low nibbles are weights 0-15, high nibbles 16-31 |

One lane takes a block. ``m`` is added, so the run's minimum is ``-m``. Layout: ``block_q4_1`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load4, load16
from qmm.kernels.lang.primitives import half


def load(block, lane):
    return load4(block, 0), load16(block, 4)


def unpack(lane, dm, qs):
    scale = half(dm)
    minimum = -half(dm >> 16)
    return (qs & 0x0F0F0F0F, scale, minimum), ((qs >> 4) & 0x0F0F0F0F, scale, minimum)


def position(lane, i):
    return i


FORMAT = Format(
    name="Q4_1",
    block_weights=32,
    block_nbytes=20,
    lanes=1,
    runs=2,
    has_minimum=True,
    load=load,
    unpack=unpack,
    position=position,
    alignment=4,
    pairs=True,
)
