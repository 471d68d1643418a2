"""Small kernels of every operation that has a twin in ``lanes_twins.py``: what :mod:`twin_cases` runs.

A kernel reads its inputs at ``source``, applies operations in each lane, and stores what they gave at ``target``.
"""

from __future__ import annotations

from qmm.kernels.lang.primitives import (
    bfloat_floats,
    float_floats,
    half,
    half_floats,
    load1,
    load2,
    load4,
    load16,
    masked,
    run_weights,
    signed_byte,
    spread_bits,
    subtract_bytes,
    unsigned_byte,
    word,
)
from qmm.kernels.lang.ptx import (
    arrive,
    arrive_after_copies,
    block_count,
    block_index,
    bulk_copy,
    copy16,
    copy_edge1,
    copy_edge2,
    copy_edge4,
    dot_floats,
    dot_pair,
    dot_pair_more,
    dot_short,
    expect,
    fused,
    initialize_barrier,
    lane_index,
    largest_of_eight,
    largest_of_values,
    largest_of_warp,
    launch_dependents,
    load_bfloat,
    load_byte,
    load_cached16,
    load_float,
    load_half,
    load_past16,
    load_past_floats,
    load_past_l1,
    load_shared16,
    load_shared_float,
    power_of_two_below,
    prefetch,
    reciprocal,
    scaled,
    scaled_byte,
    scaled_bytes,
    share,
    shared_memory,
    store_bfloat,
    store_byte,
    store_float,
    store_half,
    store_part,
    store_run,
    store_shared16,
    store_shared_float,
    store_shared_word,
    store_word,
    sum_of_eight_words,
    sum_of_four_words,
    sum_of_half_warp,
    sum_of_warp,
    synchronize_block,
    synchronize_warp,
    thread_index,
    two_halves,
    wait_for_predecessors,
    zero_words,
)
from qmm.kernels.lang.specialize import unroll

__all__ = [
    "ITEMS",
    "THREADS",
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
    "fused_once",
    "largest",
    "met",
    "of_floats",
    "of_runs",
    "of_words",
    "places",
    "shared_out",
    "sums",
    "through_global",
    "through_shared",
    "widened",
]

THREADS = 128
ITEMS = 512
"""What most kernels have inputs for, each for one thread."""

# ---------------------------------------------------------------------------------------------------------------------
# Kernels: where a thread is, and memory
# ---------------------------------------------------------------------------------------------------------------------


def store_words(target, words):
    for i in unroll(4):
        store_word(target + 4 * i, word(words, i))


def load_run(source):
    return float_floats(
        load_cached16(source), load_cached16(source + 16), load_cached16(source + 32), load_cached16(source + 48)
    )


def places(source, target):
    """Of the window's address only what it divides by is promised."""
    thread = thread_index()
    to = target + 32 * (block_index() * THREADS + thread)
    store_words(to, zero_words())
    store_byte(to + 16, thread)
    store_byte(to + 17, lane_index())
    store_byte(to + 18, block_index())
    store_byte(to + 19, block_count())
    store_byte(to + 20, shared_memory() & 127)


def through_global(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 144 * (first + thread_index())
        store_words(to, load_cached16(at))
        store_words(to + 16, load_past16(at + 16))
        store_words(to + 32, load_past_l1(at))
        floats = load_past_floats(at + 16)
        four = load_four(at)  # noqa: F821
        for i in unroll(4):
            store_float(to + 48 + 4 * i, floats[i])
            store_float(to + 64 + 4 * i, four[i])
        eight = load_eight(at)  # noqa: F821
        for i in unroll(8):
            store_float(to + 80 + 4 * i, eight[i])
        (one,) = load_one(at + 4)  # noqa: F821
        store_float(to + 112, one)
        two = load_two(at + 24)  # noqa: F821
        store_float(to + 116, two[0])
        store_float(to + 120, two[1])
        store_float(to + 124, load_float(at + 12))
        for i in unroll(8):
            store_byte(to + 128 + i, load_byte(at + 3 * i))
            store_byte(to + 136 + i, load_byte(at + 31 - i) - 128)


def through_shared(source, target):
    """Each thread reads what its neighbour wrote."""
    mine = shared_memory() + 32 * thread_index()
    other = shared_memory() + 32 * (thread_index() ^ 1)
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 96 * (first + thread_index())
        store_shared16(mine, load_cached16(at))
        store_shared_float(mine + 16, load_float(at + 16))
        store_shared_float(mine + 20, load_float(at + 20))
        store_shared_word(mine + 24, word(load_cached16(at + 16), 2))
        store_shared_word(mine + 28, word(load_cached16(at + 16), 3))
        synchronize_warp()
        store_words(to, load_shared16(other + 16))
        four = load_four(other)  # noqa: F821
        for i in unroll(4):
            store_float(to + 16 + 4 * i, load_shared_float(other + 4 * i))
            store_float(to + 32 + 4 * i, four[i])
        eight = load_eight(other)  # noqa: F821
        for i in unroll(8):
            store_float(to + 48 + 4 * i, eight[i])
        (one,) = load_one(other + 28)  # noqa: F821
        store_float(to + 80, one)
        two = load_two(other + 24)  # noqa: F821
        store_float(to + 84, two[0])
        store_float(to + 88, two[1])
        store_word(to + 92, word(load_shared16(other), 1))
        synchronize_warp()


def fields(source, target):
    """Loads at all places that the alignment allows."""
    thread = thread_index()
    memory = shared_memory()
    for i in unroll(2):
        store_shared16(memory + 16 * (thread + THREADS * i), load_cached16(source + 16 * (thread + THREADS * i)))
    synchronize_block()
    at = memory + 16 * thread
    to = target + 32 * thread
    store_words(to, load16(at + (thread * ALIGNMENT & 15), 32))  # noqa: F821
    store_word(to + 16, load4(at + (thread * min(4, ALIGNMENT) & 15), 0))  # noqa: F821
    store_word(to + 20, load4(at + (thread * min(4, ALIGNMENT) & 15), 20))  # noqa: F821
    store_word(to + 24, load2(at + (thread * min(2, ALIGNMENT) & 15), 10))  # noqa: F821
    store_word(to + 28, load1(at + (thread & 15), 3))


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
        initialize_barrier(full, THREADS)
        initialize_barrier(empty, THREADS // 32)
    fence_barriers()  # noqa: F821
    synchronize_block()
    for i in unroll(2):
        at = source + 32 * (thread + THREADS * i)
        copy16(mine, at)
        copy16(mine + 16, at + 16)
        arrive_after_copies(full)
        wait_for(full, i)  # noqa: F821
        to = target + 32 * (thread + THREADS * i)
        store_words(to, load_shared16(other))
        store_words(to + 16, load_shared16(other + 16))
        synchronize_warp()
        if lane_index() == 0:
            arrive(empty)
        wait_for(empty, i)  # noqa: F821
    at = source + 32 * (thread + THREADS * 2)
    for i in range(0, 16, 4):
        copy_edge4(mine + i, at + i)
    for i in range(16, 24, 2):
        copy_edge2(mine + i, at + i)
    for i in range(24, 32):
        copy_edge1(mine + i, at + i)
    synchronize_block()
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
        initialize_barrier(full, THREADS)
    fence_barriers()  # noqa: F821
    synchronize_block()
    for i in unroll(2):
        mine = 64 * (thread + THREADS * i)
        prefetch(source + mine, 64)
        expect(full, nbytes)
        bulk_copy(memory + mine, source + mine, nbytes, full)
        arrive(full)
        wait_for(full, i)  # noqa: F821
        other = 64 * ((thread ^ 96) + THREADS * i)
        for piece in range(0, nbytes, 16):
            store_words(target + other + piece, load_shared16(memory + other + piece))


def met(source, target):
    """Three warps bring numbers for the last warp, and for one another."""
    thread = thread_index()
    memory = shared_memory()
    if thread < 96:
        store_shared16(memory + 16 * thread, load_cached16(source + 16 * thread))
        say_written()  # noqa: F821
        meet_writers()  # noqa: F821
        store_words(target + 16 * thread, load_shared16(memory + 16 * ((thread + 32) % 96)))
    else:
        wait_for_writers()  # noqa: F821
        for i in unroll(3):
            store_words(target + 16 * (thread + 32 * i), load_shared16(memory + 16 * (thread - 96 + 32 * i)))


def counted(source, target):
    """Adds one to what the launch before left, which this one starts before the end of; and takes its time for it:
    each of the loads of ``source``, all zeros, waits for the one before."""
    launch_dependents()
    wait_for_predecessors()
    mine = target + 16 * thread_index()
    before = load_past16(mine)
    if thread_index() == 0:
        at = source
        for _ in range(2000):
            at = source + load_byte(at)
    synchronize_block()
    store_words(mine, before + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: arithmetic of one lane
# ---------------------------------------------------------------------------------------------------------------------


def of_words(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 288 * (first + thread_index())
        p = load_cached16(at)
        q = load_cached16(at + 16)
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
        store_word(to + 240, a & b)
        store_word(to + 244, a | 0x80808080)
        store_word(to + 248, a ^ b)
        store_word(to + 252, a << 31)
        store_word(to + 256, a >> (thread_index() & 31))
        store_word(to + 260, a + b)
        store_word(to + 264, a - b)
        store_word(to + 268, a * b)
        store_float(to + 272, signed_byte(a))
        store_float(to + 276, unsigned_byte(a))
        store_float(to + 280, signed_byte(b >> 24))
        store_float(to + 284, unsigned_byte(b >> 24))


def widened(source, target):
    """All the 65,536 halves and bfloats, and some of them by themselves."""
    for first in range(0, ITEMS, THREADS):
        at = source + 256 * (first + thread_index())
        to = target + 1120 * (first + thread_index())
        for i in range(8):
            low = load_cached16(at + 32 * i)
            high = load_cached16(at + 32 * i + 16)
            store_run(to + 128 * i, half_floats(low, high))
            store_run(to + 128 * i + 64, bfloat_floats(low, high))
        for i in range(8):
            store_float(to + 1024 + 4 * i, load_half(at + 2 * i))
            store_float(to + 1056 + 4 * i, load_bfloat(at + 2 * i))
        words = load_cached16(at)
        for i in unroll(4):
            store_float(to + 1088 + 8 * i, half(word(words, i)))
            store_float(to + 1092 + 8 * i, half(word(words, i) >> 16))


def as_bfloats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        for i in unroll(8):
            store_bfloat(target + 16 * item + 2 * i, load_float(source + 32 * item + 4 * i))


def as_halves(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        for i in unroll(4):
            a = load_float(source + 32 * item + 8 * i)
            b = load_float(source + 32 * item + 8 * i + 4)
            store_half(target + 32 * item + 8 * i, a)
            store_half(target + 32 * item + 8 * i + 2, b)
            store_word(target + 32 * item + 8 * i + 4, two_halves(a, b))


def as_bytes(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 20 * (first + thread_index())
        to = target + 8 * (first + thread_index())
        factor = load_float(at + 16)
        a = load_float(at)
        b = load_float(at + 4)
        c = load_float(at + 8)
        d = load_float(at + 12)
        store_word(to, scaled_bytes(a, b, c, d, factor))
        store_byte(to + 4, scaled_byte(a, factor))
        store_byte(to + 5, scaled_byte(b, factor))
        store_byte(to + 6, scaled_byte(c, factor))
        store_byte(to + 7, scaled_byte(d, factor))


def of_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        store_float(target + 8 * item, reciprocal(load_float(source + 8 * item)))
        store_float(target + 8 * item + 4, power_of_two_below(load_float(source + 8 * item + 4)))


def of_runs(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 96 * item
        to = target + 320 * item
        values = load_run(at + 16)
        scale = load_float(at + 80)
        minimum = load_float(at + 84)
        store_run(to, run_weights(load_cached16(at), scale, minimum))
        store_run(to + 64, run_weights(values, scale, minimum))
        store_run(to + 128, scaled(values, scale))
        store_run(to + 192, masked(values, (item & 63) - 20))
        store_part(to + 256, values, item % 17)


def fused_once(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 12 * item
        store_float(target + 4 * item, fused(load_float(at), load_float(at + 4), load_float(at + 8)))


def dots_of_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        item = first + thread_index()
        at = source + 128 * item
        store_float(target + 4 * item, dot_floats(load_run(at), load_run(at + 64)))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: arithmetic of a warp
# ---------------------------------------------------------------------------------------------------------------------


def store_whole(target, value):
    for i in unroll(4):
        store_byte(target + i, value >> (8 * i))


def sums(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 16 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        value = load_byte(at) + 256 * load_byte(at + 1) + 65536 * load_byte(at + 2) - 8388608
        store_whole(to, sum_of_warp(value))
        store_whole(to + 4, sum_of_half_warp(value))
        words = load_cached16(at)
        store_float(to + 8, sum_of_four_words(word(words, 2)))
        store_float(to + 12, sum_of_eight_words(word(words, 3)))


def largest(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 32 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        store_float(to, largest_of_warp(load_float(at)))
        store_float(to + 4, largest_of_eight(load_float(at + 4)))
        store_float(
            to + 8,
            largest_of_values(load_float(at + 8), load_float(at + 12), load_float(at + 16), load_float(at + 20)),
        )
        store_float(to + 12, largest_of_eight(largest_of_values(load_float(at + 24), load_float(at + 28), 0.0, -1.0)))


def shared_out(source, target):
    lane = lane_index()
    for first in range(0, ITEMS, THREADS):
        at = source + 8 * (first + thread_index())
        to = target + 40 * (first + thread_index())
        a = load_float(at)
        b = load_float(at + 4)
        for i in unroll(5):
            store_float(to + 8 * i, share(a, b, 1 << i, lane & (1 << i)))
            store_float(to + 8 * i + 4, share(b, b, 1 << i, 0))


def dots_of_bytes(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 96 * (first + thread_index())
        to = target + 32 * (first + thread_index())
        dots = dot_pair(load_cached16(at), load_cached16(at + 16), load_cached16(at + 32))
        for i in unroll(4):
            store_float(to + 4 * i, dots[i])
        dots = dot_pair_more(load_cached16(at + 48), load_cached16(at + 64), load_cached16(at + 80), dots)
        for i in unroll(4):
            store_float(to + 16 + 4 * i, dots[i])


def dots_of_short_floats(source, target):
    for first in range(0, ITEMS, THREADS):
        at = source + 208 * (first + thread_index())
        to = target + 16 * (first + thread_index())
        totals = dot_short(load_run(at), load_run(at + 64), load_run(at + 128), load_past_floats(at + 192))
        for i in unroll(4):
            store_float(to + 4 * i, totals[i])
