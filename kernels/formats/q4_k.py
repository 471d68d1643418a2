"""Q4_K: 256 weights in 144 bytes, ``w = d * scale * q - dmin * minimum`` with 6-bit scales and minima for each 32.

::

    byte   0        2           4              16                              144
           | d  f16 | dmin  f16 | scales[12]   | qs[128]                       |

Bytes ``32 j`` to ``32 j + 31`` of ``qs`` hold weights ``64 j`` to ``64 j + 31`` in their low nibbles and the next 32 in
the high ones. The twelve bytes pack eight scales and eight minima: see :func:`scales_and_minima`. A lane takes 32 bytes
of ``qs``, which are two pairs of runs. Layout: ``block_q4_K`` in ggml-common.h.
"""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load16
from qmm.kernels.lang.primitives import half, unsigned_byte, word


def load(block, lane):
    return load16(block, 0), load16(block, 16 + 32 * lane), load16(block, 32 + 32 * lane)


def unpack(lane, header, first, second):
    scales, minima = scales_and_minima(header, lane >> 1, 16 * (lane & 1))
    d = half(word(header, 0))
    dmin = half(word(header, 0) >> 16)
    low = d * unsigned_byte(scales & 63)
    high = d * unsigned_byte((scales >> 8) & 63)
    low_minimum = dmin * unsigned_byte(minima & 63)
    high_minimum = dmin * unsigned_byte((minima >> 8) & 63)
    return (
        (first & 0x0F0F0F0F, low, low_minimum),
        (second & 0x0F0F0F0F, low, low_minimum),
        ((first >> 4) & 0x0F0F0F0F, high, high_minimum),
        ((second >> 4) & 0x0F0F0F0F, high, high_minimum),
    )


def scales_and_minima(header, late, shift):
    """Two words whose two lowest bytes are the scales and the minima of 64 weights (Q4_K and Q5_K). ``late`` is 1 for
    the second 128 of the block, and ``shift`` 16 for the second 64 of these.

    Scales 0-3 are the low six bits of bytes 0-3, minima 0-3 those of bytes 4-7. Bytes 8-11 hold the low four bits of
    scales 4-7 (low nibble) and minima 4-7 (high nibble), whose upper two bits are the top bits of bytes 0-3 and 4-7.
    """
    nibbles = late * 0x0F0F0F0F
    rest = 0x3F3F3F3F - nibbles
    scales = (word(header, 3) & nibbles) | ((word(header, 1) >> (2 * late)) & rest)
    minima = ((word(header, 3) >> 4) & nibbles) | ((word(header, 2) >> (2 * late)) & rest)
    return scales >> shift, minima >> shift


def position(lane, i):
    return 4 * lane + i


FORMAT = Format(
    name="Q4_K",
    block_weights=256,
    block_nbytes=144,
    lanes=4,
    runs=4,
    has_minimum=True,
    load=load,
    unpack=unpack,
    position=position,
    alignment=16,
    pairs=True,
)
