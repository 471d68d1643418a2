"""The smallest kernel there is: bytes read where they lie. ``qmm smoke`` shows with it that a GPU sees a mapped
file."""

from __future__ import annotations

from qmm.kernels.ptx import block_count, block_index, load_byte, store_byte, thread_index

__all__ = ["read"]


def read(source, nbytes, target):
    """Copies ``nbytes`` bytes to device memory, a byte a thread, reading none beyond."""
    item = block_index() * (WARPS * 32) + thread_index()
    while item < nbytes:
        store_byte(target + item, load_byte(source + item))
        item += block_count() * (WARPS * 32)
