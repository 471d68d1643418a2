"""Q2_K: 256 weights in 84 bytes, ``w = d * scale * q - dmin * minimum`` with 4-bit scales and minima for each run.

::

    byte   0              16                           80       82         84
           | scales[16]   | qs[64]                     | d  f16 | dmin f16 |
             low nibble: scale, high nibble: minimum

The block has two halves of 128 weights with 32 bytes of ``qs`` each; the bits ``2j`` of those bytes are the half's
weights ``32 j`` to ``32 j + 31``. A lane takes 16 bytes of ``qs``, which are four runs. Layout: ``block_q2_K`` in
ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.primitives import half, load4, load16, unsigned_byte


def load(block, lane):
    scales = 8 * (lane >> 1)
    return load4(block, 80), load4(block, scales), load4(block, scales + 4), load16(block, 16 + 16 * lane)


def unpack(lane, dm, scales_low, scales_high, qs):
    d = half(dm)
    dmin = half(dm >> 16)
    shift = 8 * (lane & 1)
    low = scales_low >> shift
    high = scales_high >> shift
    # Two of the four runs stay where they are in their bytes, which makes them 4 and 16 times as large.
    return (
        (qs & 0x03030303, d * unsigned_byte(low & 15), dmin * unsigned_byte((low >> 4) & 15)),
        (qs & 0x0C0C0C0C, d * 0.25 * unsigned_byte((low >> 16) & 15), dmin * unsigned_byte((low >> 20) & 15)),
        (qs & 0x30303030, d * 0.0625 * unsigned_byte(high & 15), dmin * unsigned_byte((high >> 4) & 15)),
        ((qs >> 6) & 0x03030303, d * unsigned_byte((high >> 16) & 15), dmin * unsigned_byte((high >> 20) & 15)),
    )


def position(lane, i):
    return 8 * (lane >> 1) + (lane & 1) + 2 * i


FORMAT = Format(
    name="Q2_K",
    block_weights=256,
    block_nbytes=84,
    lanes=4,
    runs=4,
    has_minimum=True,
    load=load,
    unpack=unpack,
    position=position,
    alignment=4,
)
