"""Q6_K: 256 weights in 210 bytes, ``w = d * scale * (q - 32)`` with an 8-bit scale for each run.

::

    byte   0                      128             192            208      210
           | ql[128]              | qh[64]        | scales[16]   | d  f16 |
                                                    int8

The block has two halves of 128 weights. In a half, weight ``32 s + l`` has its low four bits in byte ``32 (s % 2) + l``
of ``ql`` (low nibble for ``s < 2``, else high) and its upper two in byte ``l`` of ``qh`` at bit ``2 s``. A lane takes
16 bytes of ``ql``, which are two runs: ``s`` and ``s + 2``. Layout: ``block_q6_K`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load1, load2, load16
from qmm.kernels.lang.primitives import half, signed_byte


def load(block, lane):
    first = position(lane, 0)
    return (
        load2(block, 208),
        load1(block, 192 + first),
        load1(block, 196 + first),
        load16(block, 128 + 32 * (lane >> 2) + 16 * (lane & 1)),
        load16(block, 16 * lane),
    )


def unpack(lane, d_bits, low_scale, high_scale, qh, ql):
    d = half(d_bits) * 0.25
    # Six bits at the top of a byte, the highest inverted, are 4 * (q - 32) as a signed byte.
    low = ((qh << (6 - (lane & 2))) & 0xC0C0C0C0) ^ (((ql << 2) & 0x3C3C3C3C) | 0x80808080)
    high = ((qh << (2 - (lane & 2))) & 0xC0C0C0C0) ^ (((ql >> 2) & 0x3C3C3C3C) | 0x80808080)
    return (low, d * signed_byte(low_scale), 0.0), (high, d * signed_byte(high_scale), 0.0)


def position(lane, i):
    return 8 * (lane >> 2) + (lane & 3) + 4 * i


FORMAT = Format(
    name="Q6_K",
    block_weights=256,
    block_nbytes=210,
    lanes=8,
    runs=2,
    has_minimum=False,
    load=load,
    unpack=unpack,
    position=position,
    alignment=2,
)
