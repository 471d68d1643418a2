"""Q2_K: 256 weights in 84 bytes, ``w = d * scale * q - dmin * minimum`` with 4-bit scales and minima for each run.

::

    byte   0              16                           80       82         84
           | scales[16]   | qs[64]                     | d  f16 | dmin f16 |
             low nibble: scale, high nibble: minimum

The block has two halves of 128 weights with 32 bytes of ``qs`` each; the bits ``2j`` of those bytes are the half's
weights ``32 j`` to ``32 j + 31``. A lane takes a half, four pairs of runs. The product of a weight and its scale, 45 at
most, is a byte still, so that all runs have the block's ``d`` for their scale. Layout: ``block_q2_K`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load4, load16
from qmm.kernels.lang.primitives import half, unsigned_byte


def load(block, lane):
    return (
        load4(block, 80),
        load4(block, 8 * lane),
        load4(block, 8 * lane + 4),
        load16(block, 16 + 32 * lane),
        load16(block, 32 + 32 * lane),
    )


def unpack(lane, dm, low, high, first, second):
    d = half(dm)
    dmin = half(dm >> 16)
    return (
        ((first & 0x03030303) * (low & 15), d, dmin * unsigned_byte((low >> 4) & 15)),
        ((second & 0x03030303) * ((low >> 8) & 15), d, dmin * unsigned_byte((low >> 12) & 15)),
        (((first >> 2) & 0x03030303) * ((low >> 16) & 15), d, dmin * unsigned_byte((low >> 20) & 15)),
        (((second >> 2) & 0x03030303) * ((low >> 24) & 15), d, dmin * unsigned_byte(low >> 28)),
        (((first >> 4) & 0x03030303) * (high & 15), d, dmin * unsigned_byte((high >> 4) & 15)),
        (((second >> 4) & 0x03030303) * ((high >> 8) & 15), d, dmin * unsigned_byte((high >> 12) & 15)),
        (((first >> 6) & 0x03030303) * ((high >> 16) & 15), d, dmin * unsigned_byte((high >> 20) & 15)),
        (((second >> 6) & 0x03030303) * ((high >> 24) & 15), d, dmin * unsigned_byte(high >> 28)),
    )


def position(lane, i):
    return 8 * lane + i


FORMAT = Format(
    name="Q2_K",
    block_weights=256,
    block_nbytes=84,
    lanes=2,
    runs=8,
    has_minimum=True,
    load=load,
    unpack=unpack,
    position=position,
    alignment=4,
    pairs=True,
    run_minima=True,
)
