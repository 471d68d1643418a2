"""Q5_K: 256 weights in 176 bytes, ``w = d * scale * q - dmin * minimum`` with 6-bit scales and minima for each 32.

::

    byte   0        2           4              16         48                              176
           | d  f16 | dmin  f16 | scales[12]   | qh[32]   | qs[128]                       |

``qs`` and ``scales`` are laid out as in Q4_K; bit ``i`` of byte ``l`` of ``qh`` is the fifth bit of weight ``32 i +
l``. A lane takes 16 bytes of ``qs``, which are two runs of different scales; twice that, as in Q4_K, would be more than
ptxas has registers for. Layout: ``block_q5_K`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.formats.q4_k import scales_and_minima
from qmm.kernels.lang.fields import load16
from qmm.kernels.lang.primitives import half, unsigned_byte, word


def load(block, lane):
    return load16(block, 0), load16(block, 16 + 16 * (lane & 1)), load16(block, 48 + 16 * lane)


def unpack(lane, header, qh, qs):
    scales, minima = scales_and_minima(header, lane >> 2, 8 * (lane & 2))
    d = half(word(header, 0))
    dmin = half(word(header, 0) >> 16)
    fifth = qh >> (lane & 6)
    low = (qs & 0x0F0F0F0F) | ((fifth & 0x01010101) << 4)
    high = ((qs >> 4) & 0x0F0F0F0F) | (((fifth >> 1) & 0x01010101) << 4)
    return (
        (low, d * unsigned_byte(scales & 63), dmin * unsigned_byte(minima & 63)),
        (high, d * unsigned_byte((scales >> 8) & 63), dmin * unsigned_byte((minima >> 8) & 63)),
    )


def position(lane, i):
    return 4 * (lane >> 1) + (lane & 1) + 2 * i


FORMAT = Format(
    name="Q5_K",
    block_weights=256,
    block_nbytes=176,
    lanes=8,
    runs=2,
    has_minimum=True,
    load=load,
    unpack=unpack,
    position=position,
    alignment=16,
)
