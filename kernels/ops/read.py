"""Kernels that only read bytes.

``qmm smoke`` shows with :func:`read` that a GPU can read a mapped file. With :func:`checksum` the benchmarks measure
the bandwidth of reading, from the GPU's memory or over a link: no product can be faster.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qmm.kernels.lang.constants import Constants
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
from qmm.kernels.ops.layout import WARPS
from qmm.kernels.ops.op import Architecture, At, LaunchSpec, Work
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["checksum", "checksum_kernel", "plan", "plan_checksum", "read", "read_kernel"]


@dataclass(frozen=True)
class ReadConstants(Constants):
    """The compile-time constants of these kernels."""

    WARPS: int
    """Warps of a CTA."""
    IN_FLIGHT: int
    """Loads of a thread in flight."""


c = ReadConstants.placeholder()


def read(source, nbytes, target):
    """Copies ``nbytes`` bytes to device memory, a byte a thread."""
    item = cta_index() * (c.WARPS * 32) + thread_index()
    while item < nbytes:
        store_global_byte(target + item, load_global_byte(source + item))
        item += cta_count() * (c.WARPS * 32)


def checksum(source, nbytes, target):
    """Reads 16-byte pieces at ``source``, a multiple of 16, and stores an exclusive or of 4 bytes for each thread.

    A CTA reads a tile of ``16 * 32 * WARPS * IN_FLIGHT`` contiguous bytes with IN_FLIGHT loads a thread in flight; the
    grid strides over the tiles. Last bytes that do not fill a piece are not read. The exclusive or of all stored words
    is that of the pieces' 32-bit words, so a test can tell that each piece was read.
    """
    pieces = nbytes >> 4
    thread = thread_index()
    item = cta_index() * (c.WARPS * 32 * c.IN_FLIGHT) + thread
    total = registers(1, zero_words())
    while item + c.WARPS * 32 * (c.IN_FLIGHT - 1) < pieces:
        piece = registers(c.IN_FLIGHT, zero_words())
        for i in unroll(c.IN_FLIGHT):
            piece[i] = load_global16_no_allocate(source + (item + c.WARPS * 32 * i) * 16)
        for i in unroll(c.IN_FLIGHT):
            total[0] = total[0] ^ piece[i]
        item += cta_count() * (c.WARPS * 32 * c.IN_FLIGHT)
    for i in unroll(c.IN_FLIGHT):  # what there is of the last tile
        if item + c.WARPS * 32 * i < pieces:
            total[0] = total[0] ^ load_global16_no_allocate(source + (item + c.WARPS * 32 * i) * 16)
    place = target + (cta_index() * (c.WARPS * 32) + thread) * 4
    store_global_word(place, word(total[0], 0) ^ word(total[0], 1) ^ word(total[0], 2) ^ word(total[0], 3))


@functools.cache
def read_kernel() -> Kernel:
    """The kernel that copies bytes to device memory."""
    return Kernel("read", read, ReadConstants(WARPS=WARPS, IN_FLIGHT=1), 32 * WARPS)


@functools.cache
def checksum_kernel(in_flight: int) -> Kernel:
    """The kernel that only reads, with ``in_flight`` loads of 16 bytes a thread in flight."""
    return Kernel(f"checksum_{in_flight}", checksum, ReadConstants(WARPS=WARPS, IN_FLIGHT=in_flight), 32 * WARPS)


def plan(nbytes: int, architecture: Architecture) -> Work:
    """The work of copying bytes at "weights" to "y"."""
    ctas = architecture.ctas_for(-(-nbytes // (32 * WARPS)))
    return Work((LaunchSpec.of(read_kernel(), ctas, source=At("weights"), nbytes=nbytes, target=At("y")),))


def plan_checksum(nbytes: int, ctas: int, in_flight: int) -> Work:
    """The work of reading bytes at "weights", a multiple of 16; 4 bytes for each thread are stored at "y"."""
    kernel = checksum_kernel(in_flight)
    return Work((LaunchSpec.of(kernel, ctas, source=At("weights"), nbytes=nbytes, target=At("y")),))
