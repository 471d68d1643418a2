"""Small kernels of operations that move data and wait: what :mod:`operation_cases` runs.

A kernel reads its inputs at ``source``, applies operations in each lane, and stores what they gave at ``target``.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.fields import load1, load2, load4, load16
from qmm.kernels.lang.primitives import float_floats, word
from qmm.kernels.lang.ptx.arithmetic import zero_words
from qmm.kernels.lang.ptx.barrier import (
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_arrive_after_copies,
    mbarrier_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier_arrive,
    named_barrier_wait,
    sync_cta,
    sync_warp,
)
from qmm.kernels.lang.ptx.copy import bulk_copy, copy16, copy_edge, prefetch_l2
from qmm.kernels.lang.ptx.global_memory import (
    load_global16,
    load_global16_l2,
    load_global16_no_allocate,
    load_global_byte,
    load_global_float,
    load_global_floats,
    load_global_floats_l2,
    store_global_byte,
    store_global_float,
    store_global_word,
)
from qmm.kernels.lang.ptx.grid import (
    cta_count,
    cta_index,
    lane_index,
    launch_dependents,
    shared_memory,
    thread_index,
    wait_for_predecessors,
)
from qmm.kernels.lang.ptx.shared_memory import (
    load_shared16,
    load_shared_float,
    load_shared_floats,
    store_shared16,
    store_shared_float,
    store_shared_word,
)
from qmm.kernels.lang.specialize import unroll

__all__ = [
    "ITEMS",
    "THREADS",
    "CaseConstants",
    "store_words",
    "load_run",
    "places",
    "through_global",
    "through_shared",
    "fields",
    "global_fields",
    "copied",
    "copied_in_bulk",
    "met",
    "counted",
]

THREADS = 128
ITEMS = 512
"""What most kernels have inputs for, each for one thread."""


@dataclass(frozen=True)
class CaseConstants(Constants):
    """What the kernels of cases may name."""

    ALIGNMENT: int = 16
    """What the addresses of block fields divide by."""
    BULK: bool = False
    """Whether barriers are for bulk copies."""


c = CaseConstants.placeholder()


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: where a thread is, and memory
# ---------------------------------------------------------------------------------------------------------------------


def store_words(target, words):
    for i in unroll(4):
        store_global_word(target + 4 * i, word(words, i))


def load_run(source):
    return float_floats(
        load_global16(source), load_global16(source + 16), load_global16(source + 32), load_global16(source + 48)
    )


def places(source, target):
    """Of the window's address only what it divides by is promised."""
    thread = thread_index()
    to = target + 32 * (cta_index() * THREADS + thread)
    store_words(to, zero_words())
    store_global_byte(to + 16, thread)
    store_global_byte(to + 17, lane_index())
    store_global_byte(to + 18, cta_index())
    store_global_byte(to + 19, cta_count())
    store_global_byte(to + 20, shared_memory() & 127)


def through_global(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 144 * (first + thread_index())
        store_words(to, load_global16(at))
        store_words(to + 16, load_global16_l2(at + 16))
        store_words(to + 32, load_global16_no_allocate(at))
        floats = load_global_floats_l2(at + 16)
        four = load_global_floats(at, 4)
        for i in unroll(4):
            store_global_float(to + 48 + 4 * i, floats[i])
            store_global_float(to + 64 + 4 * i, four[i])
        eight = load_global_floats(at, 8)
        for i in unroll(8):
            store_global_float(to + 80 + 4 * i, eight[i])
        (one,) = load_global_floats(at + 4, 1)
        store_global_float(to + 112, one)
        two = load_global_floats(at + 24, 2)
        store_global_float(to + 116, two[0])
        store_global_float(to + 120, two[1])
        store_global_float(to + 124, load_global_float(at + 12))
        for i in unroll(8):
            store_global_byte(to + 128 + i, load_global_byte(at + 3 * i))
            store_global_byte(to + 136 + i, load_global_byte(at + 31 - i) - 128)


def through_shared(source, target):
    """Each thread reads what its neighbour wrote."""
    mine = shared_memory() + 32 * thread_index()
    other = shared_memory() + 32 * (thread_index() ^ 1)
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 96 * (first + thread_index())
        store_shared16(mine, load_global16(at))
        store_shared_float(mine + 16, load_global_float(at + 16))
        store_shared_float(mine + 20, load_global_float(at + 20))
        store_shared_word(mine + 24, word(load_global16(at + 16), 2))
        store_shared_word(mine + 28, word(load_global16(at + 16), 3))
        sync_warp()
        store_words(to, load_shared16(other + 16))
        four = load_shared_floats(other, 4)
        for i in unroll(4):
            store_global_float(to + 16 + 4 * i, load_shared_float(other + 4 * i))
            store_global_float(to + 32 + 4 * i, four[i])
        eight = load_shared_floats(other, 8)
        for i in unroll(8):
            store_global_float(to + 48 + 4 * i, eight[i])
        (one,) = load_shared_floats(other + 28, 1)
        store_global_float(to + 80, one)
        two = load_shared_floats(other + 24, 2)
        store_global_float(to + 84, two[0])
        store_global_float(to + 88, two[1])
        store_global_word(to + 92, word(load_shared16(other), 1))
        sync_warp()


def fields(source, target):
    """Loads at all places that the alignment allows."""
    thread = thread_index()
    memory = shared_memory()
    for i in unroll(2):
        store_shared16(memory + 16 * (thread + THREADS * i), load_global16(source + 16 * (thread + THREADS * i)))
    sync_cta()
    store_fields(memory + 16 * thread, thread, target + 32 * thread)


def global_fields(source, target):
    """The same of global memory."""
    thread = thread_index()
    store_fields(source + 16 * thread, thread, target + 32 * thread)


def store_fields(at, thread, target):
    store_words(target, load16(at + (thread * c.ALIGNMENT & 15), 32))
    store_global_word(target + 16, load4(at + (thread * min(4, c.ALIGNMENT) & 15), 0))
    store_global_word(target + 20, load4(at + (thread * min(4, c.ALIGNMENT) & 15), 20))
    store_global_word(target + 24, load2(at + (thread * min(2, c.ALIGNMENT) & 15), 10))
    store_global_word(target + 28, load1(at + (thread & 15), 3))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: copies, barriers, launches
# ---------------------------------------------------------------------------------------------------------------------


def copied(source, target):
    """Two rounds of copies through the same place, then a third in pieces."""
    thread = thread_index()
    full = shared_memory()
    empty = full + 8
    mine = full + 16 + 32 * thread
    other = full + 16 + 32 * (THREADS - 1 - thread)
    if thread == 0:
        mbarrier_init(full, THREADS)
        mbarrier_init(empty, THREADS // 32)
    fence_mbarrier_init(c.BULK)
    sync_cta()
    for i in unroll(2):
        at = source + 32 * (thread + THREADS * i)
        copy16(mine, at)
        copy16(mine + 16, at + 16)
        mbarrier_arrive_after_copies(full)
        mbarrier_wait(full, i, c.BULK)
        to = target + 32 * (thread + THREADS * i)
        store_words(to, load_shared16(other))
        store_words(to + 16, load_shared16(other + 16))
        sync_warp()
        if lane_index() == 0:
            mbarrier_arrive(empty)
        mbarrier_wait(empty, i, c.BULK)
    at = source + 32 * (thread + THREADS * 2)
    for i in range(0, 16, 4):
        copy_edge(mine + i, at + i, 4)
    for i in range(16, 24, 2):
        copy_edge(mine + i, at + i, 2)
    for i in range(24, 32):
        copy_edge(mine + i, at + i, 1)
    sync_cta()
    to = target + 32 * (thread + THREADS * 2)
    store_words(to, load_shared16(other))
    store_words(to + 16, load_shared16(other + 16))


def copied_in_bulk(source, target):
    """16 to 64 bytes a thread, in two phases of the barrier."""
    thread = thread_index()
    full = shared_memory()
    memory = full + 128
    nbytes = 16 + 16 * (thread & 3)
    if thread == 0:
        mbarrier_init(full, THREADS)
    fence_mbarrier_init(c.BULK)
    sync_cta()
    for i in unroll(2):
        mine = 64 * (thread + THREADS * i)
        prefetch_l2(source + mine, 64)
        mbarrier_expect_tx(full, nbytes)
        bulk_copy(memory + mine, source + mine, nbytes, full)
        mbarrier_arrive(full)
        mbarrier_wait(full, i, c.BULK)
        other = 64 * ((thread ^ 96) + THREADS * i)
        for piece in range(0, nbytes, 16):
            store_words(target + other + piece, load_shared16(memory + other + piece))


def met(source, target):
    """Three warps bring numbers for the last warp, and for one another."""
    thread = thread_index()
    memory = shared_memory()
    if thread < 96:
        store_shared16(memory + 16 * thread, load_global16(source + 16 * thread))
        named_barrier_arrive(1, THREADS)
        named_barrier_wait(2, 96)
        store_words(target + 16 * thread, load_shared16(memory + 16 * ((thread + 32) % 96)))
    else:
        named_barrier_wait(1, THREADS)
        for i in unroll(3):
            store_words(target + 16 * (thread + 32 * i), load_shared16(memory + 16 * (thread - 96 + 32 * i)))


def counted(source, target):
    """Adds one to what the launch before left, which this one starts before the end of; and takes its time for it:
    each of the loads of ``source``, all zeros, waits for the one before."""
    launch_dependents()
    wait_for_predecessors()
    mine = target + 16 * thread_index()
    before = load_global16_l2(mine)
    if thread_index() == 0:
        at = source
        for _ in range(2000):
            at = source + load_global_byte(at)
    sync_cta()
    store_words(mine, before + 1)
