"""Q8_0: 32 weights in 34 bytes, ``w = d * q``.

::

    byte   0        2                                34
           | d  f16 | qs[0] … qs[31]   int8          |

One lane takes a block: two runs of 16, one after the other. Layout: ``block_q8_0`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load2, load16
from qmm.kernels.lang.primitives import half


def load(block, lane):
    return load2(block, 0), load16(block, 2), load16(block, 18)


def unpack(lane, d, first, second):
    scale = half(d)
    return (first, scale, 0.0), (second, scale, 0.0)


def position(lane, i):
    return i


FORMAT = Format(
    name="Q8_0",
    block_weights=32,
    block_nbytes=34,
    lanes=1,
    runs=2,
    has_minimum=False,
    load=load,
    unpack=unpack,
    position=position,
    alignment=2,
    pairs=True,
)
