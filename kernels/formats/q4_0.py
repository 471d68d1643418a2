"""Q4_0: 32 weights in 18 bytes, ``w = d * (q - 8)``.

::

    byte   0        2                                18
           | d  f16 | qs[16]: low nibbles are weights 0-15, high nibbles 16-31 |

One lane takes a block: the low nibbles are its first run, the high ones its second. Layout: ``block_q4_0`` in
ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load2, load16
from qmm.kernels.lang.primitives import half


def load(block, lane):
    return load2(block, 0), load16(block, 2)


def unpack(lane, d, qs):
    # Four bits at the top of a byte, the highest inverted, are 16 * (q - 8) as a signed byte.
    scale = half(d) * 0.0625
    low = ((qs << 4) & 0xF0F0F0F0) ^ 0x80808080
    high = (qs & 0xF0F0F0F0) ^ 0x80808080
    return (low, scale, 0.0), (high, scale, 0.0)


def position(lane, i):
    return i


FORMAT = Format(
    name="Q4_0",
    block_weights=32,
    block_nbytes=18,
    lanes=1,
    runs=2,
    has_minimum=False,
    load=load,
    unpack=unpack,
    position=position,
    alignment=2,
    pairs=True,
)
