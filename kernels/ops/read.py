"""The smallest kernels there are: bytes read where they lie.

``qmm smoke`` shows with :func:`read` that a GPU sees a mapped file. With :func:`checksum` the benchmarks measure how
fast a GPU can read at all, from its own memory or through a link: no product can be faster than that.
"""

from __future__ import annotations

from qmm.kernels.lang.primitives import word
from qmm.kernels.lang.ptx.arithmetic import zero_words
from qmm.kernels.lang.ptx.global_memory import (
    load_global16_no_allocate,
    load_global_byte,
    store_global_byte,
    store_global_word,
)
from qmm.kernels.lang.ptx.grid import cta_count, cta_index, thread_index
from qmm.kernels.lang.specialize import registers, unroll

__all__ = ["checksum", "read"]


def read(source, nbytes, target):
    """Copies ``nbytes`` bytes to device memory, a byte a thread, reading none beyond."""
    item = cta_index() * (WARPS * 32) + thread_index()
    while item < nbytes:
        store_global_byte(target + item, load_global_byte(source + item))
        item += cta_count() * (WARPS * 32)


def checksum(source, nbytes, target):
    """Reads 16-byte pieces at ``source``, a multiple of 16, and stores an exclusive or of 4 bytes for each thread.

    A block reads a tile, ``16 * 32 * WARPS * IN_FLIGHT`` bytes that lie together, with IN_FLIGHT loads a thread under
    way at once; the grid walks over the tiles. The last bytes that are no whole piece are left out; none beyond is
    read. All that is stored, taken together by exclusive or, is that of the 32-bit words of the pieces: so a test can
    tell that each was read.
    """
    pieces = nbytes >> 4
    thread = thread_index()
    item = cta_index() * (WARPS * 32 * IN_FLIGHT) + thread
    total = registers(1, zero_words())
    while item + WARPS * 32 * (IN_FLIGHT - 1) < pieces:
        piece = registers(IN_FLIGHT, zero_words())
        for i in unroll(IN_FLIGHT):
            piece[i] = load_global16_no_allocate(source + (item + WARPS * 32 * i) * 16)
        for i in unroll(IN_FLIGHT):
            total[0] = total[0] ^ piece[i]
        item += cta_count() * (WARPS * 32 * IN_FLIGHT)
    for i in unroll(IN_FLIGHT):  # of the last tile, what there is
        if item + WARPS * 32 * i < pieces:
            total[0] = total[0] ^ load_global16_no_allocate(source + (item + WARPS * 32 * i) * 16)
    place = target + (cta_index() * (WARPS * 32) + thread) * 4
    store_global_word(place, word(total[0], 0) ^ word(total[0], 1) ^ word(total[0], 2) ^ word(total[0], 3))
