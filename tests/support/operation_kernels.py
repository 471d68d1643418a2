"""Small kernels of every operation of GPUs: what :mod:`operation_cases` runs.

A kernel reads its inputs at ``source``, applies operations in each lane, and stores what they gave at ``target``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.fields import load1, load2, load4, load16
from qmm.kernels.lang.primitives import (
    bfloat_floats,
    float_floats,
    half,
    half_floats,
    masked,
    run_weights,
    signed_byte,
    spread_bits,
    subtract_bytes,
    unsigned_byte,
    word,
)
from qmm.kernels.lang.ptx.arithmetic import (
    dot_floats,
    fma,
    max_magnitude_of_four,
    pack_halves,
    power_of_two_below,
    reciprocal,
    scale_floats,
    scaled_byte,
    scaled_bytes,
    zero_words,
)
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
    load_global_bfloat,
    load_global_byte,
    load_global_float,
    load_global_floats,
    load_global_floats_l2,
    load_global_half,
    store_global_bfloat,
    store_global_byte,
    store_global_float,
    store_global_half,
    store_global_run,
    store_global_run_part,
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
from qmm.kernels.lang.ptx.mma import mma_s8, mma_s8_more, mma_tf32
from qmm.kernels.lang.ptx.shared_memory import (
    load_shared16,
    load_shared_float,
    load_shared_floats,
    store_shared16,
    store_shared_float,
    store_shared_word,
)
from qmm.kernels.lang.ptx.warp import (
    max_magnitude_of_eight_lanes,
    max_magnitude_of_warp,
    shuffle_xor_add,
    sum_of_half_warp,
    sum_of_warp,
    sum_words_of_eight_lanes,
    sum_words_of_four_lanes,
)
from qmm.kernels.lang.specialize import unroll
from qmm.kernels.lang.tables import table

__all__ = [
    "ITEMS",
    "THREADS",
    "CaseConstants",
    "as_bfloats",
    "as_bytes",
    "as_halves",
    "copied",
    "copied_in_bulk",
    "counted",
    "dots_of_bytes",
    "dots_of_floats",
    "dots_of_short_floats",
    "fields",
    "fma_once",
    "global_fields",
    "largest",
    "looked_up",
    "met",
    "of_floats",
    "of_runs",
    "of_words",
    "places",
    "exchanged",
    "sums",
    "through_global",
    "through_shared",
    "widened",
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
SIGNED = np.random.default_rng(4).integers(-128, 128, 256).astype(np.int8)
"""What lookup tables are made of."""


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


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: arithmetic of one lane
# ---------------------------------------------------------------------------------------------------------------------


def of_words(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 288 * (first + thread_index())
        p = load_global16(at)
        q = load_global16(at + 16)
        a = word(p, 1)
        b = word(q, 2)
        store_words(to, spread_bits(a))
        store_words(to + 16, subtract_bytes(p & 0x7F7F7F7F, 1))
        store_words(to + 32, subtract_bytes(q & 0x7F7F7F7F, 32))
        store_words(to + 48, subtract_bytes(q & 0x7F7F7F7F, 127))
        store_words(to + 64, p & q)
        store_words(to + 80, p | b)
        store_words(to + 96, p ^ 0x80808080)
        store_words(to + 112, p << 3)
        store_words(to + 128, p >> 5)
        store_words(to + 144, p + q)
        store_words(to + 160, p - q)
        store_words(to + 176, p * q)
        store_words(to + 192, p * b)
        store_words(to + 208, p * 1001)
        store_words(to + 224, p - 16)
        store_global_word(to + 240, a & b)
        store_global_word(to + 244, a | 0x80808080)
        store_global_word(to + 248, a ^ b)
        store_global_word(to + 252, a << 31)
        store_global_word(to + 256, a >> (thread_index() & 31))
        store_global_word(to + 260, a + b)
        store_global_word(to + 264, a - b)
        store_global_word(to + 268, a * b)
        store_global_float(to + 272, signed_byte(a))
        store_global_float(to + 276, unsigned_byte(a))
        store_global_float(to + 280, signed_byte(b >> 24))
        store_global_float(to + 284, unsigned_byte(b >> 24))


SIXTEEN, FEW, MANY = table(SIGNED[:16]), table(SIGNED[:5]), table(SIGNED)
ROWS_OF_FOUR, ROWS_OF_EIGHT = table(SIGNED.reshape(64, 4)), table(SIGNED.reshape(32, 8))


def looked_up(source, target):
    for first in range(0, ITEMS, THREADS):
        words = load_global16(source + 16 * (first + thread_index()))
        to = target + 80 * (first + thread_index())
        store_words(to, SIXTEEN(words & 0x0F0F0F0F))
        store_words(to + 16, FEW(words & 0x03030303))
        store_words(to + 32, MANY(words))
        a = word(words, 0)
        b = word(words, 1)
        store_words(to + 48, ROWS_OF_FOUR(a & 63, b & 63, (a >> 8) & 63, b >> 26))
        store_words(to + 64, ROWS_OF_EIGHT(word(words, 2) & 31, word(words, 3) >> 27))


def widened(source, target):
    """All the 65,536 halves and bfloats, and some of them by themselves."""
    for first in range(0, ITEMS, THREADS):
        at = source + 256 * (first + thread_index())
        to = target + 1120 * (first + thread_index())
        for i in range(8):
            low = load_global16(at + 32 * i)
            high = load_global16(at + 32 * i + 16)
            store_global_run(to + 128 * i, half_floats(low, high))
            store_global_run(to + 128 * i + 64, bfloat_floats(low, high))
        for i in range(8):
            store_global_float(to + 1024 + 4 * i, load_global_half(at + 2 * i))
            store_global_float(to + 1056 + 4 * i, load_global_bfloat(at + 2 * i))
        words = load_global16(at)
        for i in unroll(4):
            store_global_float(to + 1088 + 8 * i, half(word(words, i)))
            store_global_float(to + 1092 + 8 * i, half(word(words, i) >> 16))


def as_bfloats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        for i in unroll(8):
            store_global_bfloat(target + 16 * item + 2 * i, load_global_float(source + 32 * item + 4 * i))


def as_halves(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        for i in unroll(4):
            a = load_global_float(source + 32 * item + 8 * i)
            b = load_global_float(source + 32 * item + 8 * i + 4)
            store_global_half(target + 32 * item + 8 * i, a)
            store_global_half(target + 32 * item + 8 * i + 2, b)
            store_global_word(target + 32 * item + 8 * i + 4, pack_halves(a, b))


def as_bytes(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 20 * (first + thread_index())
        to = target + 8 * (first + thread_index())
        factor = load_global_float(at + 16)
        a = load_global_float(at)
        b = load_global_float(at + 4)
        c = load_global_float(at + 8)
        d = load_global_float(at + 12)
        store_global_word(to, scaled_bytes(a, b, c, d, factor))
        store_global_byte(to + 4, scaled_byte(a, factor))
        store_global_byte(to + 5, scaled_byte(b, factor))
        store_global_byte(to + 6, scaled_byte(c, factor))
        store_global_byte(to + 7, scaled_byte(d, factor))


def of_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        store_global_float(target + 8 * item, reciprocal(load_global_float(source + 8 * item)))
        store_global_float(target + 8 * item + 4, power_of_two_below(load_global_float(source + 8 * item + 4)))


def of_runs(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 96 * item
        to = target + 320 * item
        values = load_run(at + 16)
        scale = load_global_float(at + 80)
        minimum = load_global_float(at + 84)
        store_global_run(to, run_weights(load_global16(at), scale, minimum))
        store_global_run(to + 64, run_weights(values, scale, minimum))
        store_global_run(to + 128, scale_floats(values, scale))
        store_global_run(to + 192, masked(values, (item & 63) - 20))
        store_global_run_part(to + 256, values, item % 17)


def fma_once(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 12 * item
        store_global_float(
            target + 4 * item, fma(load_global_float(at), load_global_float(at + 4), load_global_float(at + 8))
        )


def dots_of_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 128 * item
        store_global_float(target + 4 * item, dot_floats(load_run(at), load_run(at + 64)))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: arithmetic of a warp
# ---------------------------------------------------------------------------------------------------------------------


def store_whole(target, value):
    for i in unroll(4):
        store_global_byte(target + i, value >> (8 * i))


def sums(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 16 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        value = load_global_byte(at) + 256 * load_global_byte(at + 1) + 65536 * load_global_byte(at + 2) - 8388608
        store_whole(to, sum_of_warp(value))
        store_whole(to + 4, sum_of_half_warp(value))
        words = load_global16(at)
        store_global_float(to + 8, sum_words_of_four_lanes(word(words, 2)))
        store_global_float(to + 12, sum_words_of_eight_lanes(word(words, 3)))


def largest(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        store_global_float(to, max_magnitude_of_warp(load_global_float(at)))
        store_global_float(to + 4, max_magnitude_of_eight_lanes(load_global_float(at + 4)))
        _, _, c, d = load_global_floats_l2(at)
        e, f, g, h = load_global_floats_l2(at + 16)
        store_global_float(to + 8, max_magnitude_of_four(c, d, e, f))
        store_global_float(to + 12, max_magnitude_of_eight_lanes(max_magnitude_of_four(g, h, 0.0, -1.0)))


def exchanged(source, target):
    lane = lane_index()
    for first in range(0, ITEMS, THREADS):
        at = source + 8 * (first + thread_index())
        to = target + 40 * (first + thread_index())
        a = load_global_float(at)
        b = load_global_float(at + 4)
        for i in unroll(5):
            store_global_float(to + 8 * i, shuffle_xor_add(a, b, 1 << i, lane & (1 << i)))
            store_global_float(to + 8 * i + 4, shuffle_xor_add(b, b, 1 << i, 0))


def dots_of_bytes(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 96 * (first + thread_index())
        to = target + 32 * (first + thread_index())
        dots = mma_s8(load_global16(at), load_global16(at + 16), load_global16(at + 32))
        for i in unroll(4):
            store_global_float(to + 4 * i, dots[i])
        dots = mma_s8_more(load_global16(at + 48), load_global16(at + 64), load_global16(at + 80), dots)
        for i in unroll(4):
            store_global_float(to + 16 + 4 * i, dots[i])


def dots_of_short_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 208 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        totals = mma_tf32(load_run(at), load_run(at + 64), load_run(at + 128), load_global_floats_l2(at + 192))
        for i in unroll(4):
            store_global_float(to + 4 * i, totals[i])
