"""The smallest kernels there are: bytes read where they lie.

``qmm smoke`` shows with :func:`read` that a GPU sees a mapped file. With :func:`checksum` the benchmarks measure how
fast a GPU can read at all, from its own memory or through a link: no product can be faster than that.
"""

from __future__ import annotations

from qmm.kernels.lang.primitives import word
from qmm.kernels.lang.ptx import (
    block_count,
    block_index,
    load_byte,
    load_past_l1,
    store_byte,
    store_word,
    thread_index,
    zero_words,
)
from qmm.kernels.lang.specialize import registers, unroll

__all__ = ["checksum", "read"]


def read(source, nbytes, target):
    """Copies ``nbytes`` bytes to device memory, a byte a thread, reading none beyond."""
    item = block_index() * (WARPS * 32) + thread_index()
    while item < nbytes:
        store_byte(target + item, load_byte(source + item))
        item += block_count() * (WARPS * 32)


def checksum(source, nbytes, target):
    """Reads 16-byte pieces at ``source``, a multiple of 16, and stores an exclusive or of 4 bytes for each thread.

    A block reads a tile, ``16 * 32 * WARPS * IN_FLIGHT`` bytes that lie together, with IN_FLIGHT loads a thread under
    way at once; the grid walks over the tiles. The last bytes that are no whole piece are left out; none beyond is
    read. All that is stored, taken together by exclusive or, is that of the 32-bit words of the pieces: so a test can
    tell that each was read.
    """
    pieces = nbytes >> 4
    thread = thread_index()
    item = block_index() * (WARPS * 32 * IN_FLIGHT) + thread
    total = registers(1, zero_words())
    while item + WARPS * 32 * (IN_FLIGHT - 1) < pieces:
        piece = registers(IN_FLIGHT, zero_words())
        for i in unroll(IN_FLIGHT):
            piece[i] = load_past_l1(source + (item + WARPS * 32 * i) * 16)
        for i in unroll(IN_FLIGHT):
            total[0] = total[0] ^ piece[i]
        item += block_count() * (WARPS * 32 * IN_FLIGHT)
    for i in unroll(IN_FLIGHT):  # of the last tile, what there is
        if item + WARPS * 32 * i < pieces:
            total[0] = total[0] ^ load_past_l1(source + (item + WARPS * 32 * i) * 16)
    place = target + (block_index() * (WARPS * 32) + thread) * 4
    store_word(place, word(total[0], 0) ^ word(total[0], 1) ^ word(total[0], 2) ^ word(total[0], 3))
