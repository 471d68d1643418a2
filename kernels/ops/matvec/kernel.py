"""The product of a quantized weight with a few columns, on the GPU: ``y[n, m] = x[n, k] @ W[m, k]^T`` for ``n <= 8``.

It is bound by reading W, so everything serves that. One block stays on each multiprocessor and takes tiles of 16 or 32
neighbouring rows, one after the other. Some of its warps stream their bytes through a ring in shared memory
(:mod:`qmm.kernels.ops.pipeline`); each byte is copied once, whatever the columns: mapped host memory passes no cache,
so a second reading would cost a second transfer. Other warps multiply, and one adds up and stores.

Out of a stage, lane ``4 g + t`` of a warp takes one unit (the format's ``load``) of rows g and g + 8, from the t-th of
four neighbouring blocks, unpacks it into runs of 16 weights and multiplies these with the columns: int8 activations on
the tensor cores (:func:`qmm.kernels.lang.ptx.mma.mma_s8`), so that two columns cost as much as one and eight little
more; weights of float16 and bfloat16 there too (:func:`qmm.kernels.lang.ptx.mma.mma_tf32`); the rest by fused
multiply-adds. Warps take the units of a row in turn, so each has sums of its own for all rows of the tile; when the
tile is done they are added up through shared memory, in a fixed order.

The quantization of the activations is either another kernel (:mod:`qmm.kernels.ops.quantize`), or with FUSED the
beginning of this one. Both this kernel and that one are launched before their predecessors end (from sm_90 on), and
this one starts its copies at once: weights never change. Only then it waits for what it reads and writes otherwise.

Between the last byte of a product and the first of the next one, memory would idle for some 3 us: the rest is
multiplied and added up, blocks end and others start. Where it is known what comes next, each block has some of it
brought into L2 as soon as its own bytes are there (n = 1 on an H100: Q4_K, 14336x4096, 12.5 us, else 13.3; asked for
with its last own bytes, 14.0).
"""

from __future__ import annotations

from qmm.kernels.lang.primitives import half_floats, masked, run_weights
from qmm.kernels.lang.ptx.arithmetic import dot_floats, fma, scale_floats, zero_words
from qmm.kernels.lang.ptx.barrier import (
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier_arrive,
    named_barrier_wait,
    sync_cta,
    sync_warp,
)
from qmm.kernels.lang.ptx.copy import bulk_copy
from qmm.kernels.lang.ptx.global_memory import load_global16, load_global16_l2, load_global_floats, store_global_float
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
)
from qmm.kernels.lang.ptx.warp import shuffle_xor_add
from qmm.kernels.lang.specialize import registers, unroll
from qmm.kernels.ops.pipeline import prefetch_rows, prepare, produce
from qmm.kernels.ops.quantize import LOADS, quantize_block

__all__ = ["matvec"]

OF_X = 160  # where the barrier for the activations lies, from the first barrier on
MULTIPLIERS = 2  # the barrier of the warps that multiply
BIAS = -12582912.0  # takes the 12,582,912 of mma_s8 away: exact, since a scale has at most 18 significant bits


def matvec(
    weights, row_nbytes, m, blocks, chunks, k, scale_blocks, x, x_stride, zeros, n, y, y_pitch,
    next_weights, next_row_nbytes, next_rows, next_nbytes,
):  # fmt: skip
    """Up to COLUMNS products with every row.

    ``x`` holds ``scale_blocks`` of activations as :class:`qmm.kernels.ops.matvec.plan.Activations` lays them out; or
    with FUSED, ``n`` rows of ``k`` float32, ``x_stride`` bytes apart, each at a multiple of 16 bytes. At ``zeros`` are
    ZERO_NBYTES of them. ``y`` is float32, ``y_pitch`` apart. Of each of the ``next_rows`` rows, or rows joined, that
    begin ``next_row_nbytes`` apart from ``next_weights`` on, the first ``next_nbytes`` are brought into L2.
    """
    lane = lane_index()
    thread = thread_index()
    warp = thread >> 5
    barriers = shared_memory()
    nothing = barriers + BARRIERS_NBYTES
    partials = nothing + ZERO_NBYTES
    ring = partials + 2 * K_WARPS * ROWS * COLUMNS * 4
    row = cta_index() * ROWS
    row_step = cta_count() * ROWS
    x_nbytes = scale_blocks * X_NBYTES
    if PROGRAMMATIC:
        launch_dependents()
    prepare(barriers, thread)
    if thread == 0:
        mbarrier_init(barriers + OF_X, 1)
    if thread < 2:
        mbarrier_init(barriers + 128 + 8 * thread, 32 * WARPS)
        mbarrier_init(barriers + 144 + 8 * thread, 32)
    if thread * 16 < ZERO_NBYTES:
        store_shared16(nothing + thread * 16, zero_words())
    fence_mbarrier_init(BULK)
    sync_cta()

    next_row = row
    chunk = 0
    producer = warp - WARPS
    if producer >= 0 and producer < PRODUCERS:
        next_row, chunk = produce(
            *(ring, barriers, weights, row_nbytes, m, chunks),
            *(row, 0, row_step, 0, FIRST_STAGES, producer, lane),
        )
    if PROGRAMMATIC:
        wait_for_predecessors()

    if producer >= PRODUCERS:
        add_up(partials, barriers, row, row_step, m, n, y, y_pitch, lane)
    elif producer >= 0:
        # Activations come first, or they would queue up behind the weights.
        if X_BULK:
            if producer == 0 and lane == 0:
                mbarrier_expect_tx(barriers + OF_X, x_nbytes)
                bulk_copy(ring + STAGES * STAGE_NBYTES, x, x_nbytes, barriers + OF_X)
                mbarrier_arrive(barriers + OF_X)
        elif X_SHARED:
            named_barrier_wait(LOADS, 32 * (WARPS + PRODUCERS))
        produce(
            *(ring, barriers, weights, row_nbytes, m, chunks),
            *(next_row, chunk, row_step, FIRST_STAGES, 1 << 62, producer, lane),
        )
        if BULK and producer == 0 and row < m:
            last = (m - row + row_step - 1) // row_step * chunks - 1
            mbarrier_wait(barriers + 8 * (last % STAGES), last // STAGES & 1, BULK)
            prefetch_rows(next_weights, next_row_nbytes, next_rows, next_nbytes, lane)
    else:
        values = x
        nowhere = zeros
        if X_SHARED:
            values = ring + STAGES * STAGE_NBYTES
            nowhere = nothing + 64  # other memory banks than what the others read
        if FUSED:
            quantize_block(x, x_stride, n, k, scale_blocks, values, thread)
            named_barrier_wait(MULTIPLIERS, 32 * WARPS)
        elif X_BULK:
            mbarrier_wait(barriers + OF_X, 0, BULK)
        elif X_SHARED:
            copy_activations(values, x, x_nbytes, thread)
            named_barrier_wait(MULTIPLIERS, 32 * WARPS)
        multiply(
            *(ring, barriers, partials, nothing, weights, row_nbytes, m, blocks, chunks, k),
            *(values, scale_blocks, nowhere, row, row_step, warp, lane),
        )


def multiply(
    ring, barriers, partials, nothing, weights, row_nbytes, m, blocks, chunks, k,
    values, scale_blocks, nowhere, row, row_step, warp, lane,
):  # fmt: skip
    """One warp's share of every tile of the block, whose activations lie at ``values``."""
    load_values = load_shared16 if X_SHARED else load_global16
    load_floats = load_shared_floats if X_SHARED else load_global_floats
    x_scales = values + scale_blocks * (2 * RUN_NBYTES)
    x_sums = x_scales + scale_blocks * (4 * COLUMNS)
    last_group = (blocks - 1) >> 2
    group = lane >> 2
    quad = lane & 3

    # What a lane passes of the activations: see mma_s8. Others read zeros wherever they look.
    diagonal = values + (group & 1) * 16
    inside = -1
    if quad != lane >> 3 or (group & 1) >= COLUMNS:
        diagonal = nowhere
        inside = 0

    tile_row = (warp // K_WARPS) * TILE_ROWS + group
    step = warp & (K_WARPS - 1)
    total = registers(LANE_ROWS * COLUMNS, 0.0)
    square = registers(2 * LANE_ROWS, 0.0)  # with SHORT: rows g and g + 8 by columns 2 t and 2 t + 1
    full = barriers
    stage = ring
    parity = 0
    tile = 0
    while row < m:
        chunk = 0
        while chunk < chunks:
            mbarrier_wait(full, parity, BULK)
            for u in unroll(UNITS):
                part = (step + K_WARPS * u) & (LANES - 1)
                block_group = (step + K_WARPS * u) // LANES
                place = block_group * 4 + quad
                runs = registers(LANE_ROWS, 0)
                for r in unroll(LANE_ROWS):
                    phase = (weights + (row + tile_row + 8 * r) * row_nbytes + chunk * CHUNK_NBYTES) & (LINE - 1)
                    address = stage + (tile_row + 8 * r) * PITCH + phase + place * BLOCK_NBYTES
                    if chunk * CHUNK_BLOCKS + place >= blocks:
                        address = nothing
                    runs[r] = unpack(part, *load(address, part))
                if u == UNITS - 1:
                    # Neither address is ever 0: the branch and the warp's barrier keep ptxas from moving loads over the
                    # arrival, or it spills (Q5_1, n = 8, sm_90; Q2_K, sm_80 and sm_100; Q4_K, n = 8, sm_100).
                    sync_warp()
                    if ARRIVAL_BY_FULL:
                        if full != 0:
                            mbarrier_arrive(full + 64)
                    elif stage != 0:
                        mbarrier_arrive(full + 64)
                here = min(chunk * (CHUNK_BLOCKS // 4) + block_group, last_group) * QUAD_SCALE_BLOCKS
                first = position(part, 0)
                for i in unroll(range(0, RUNS, AT_ONCE)):
                    if RUN_STEP:  # the runs of a unit are that far apart, an even number: constants from the first on
                        scale_block = here + 4 * (first >> 1) + quad + 2 * RUN_STEP * (i // AT_ONCE)
                        half = first & 1
                    elif BLOCK_RUNS > 1:
                        scale_block = here + 4 * (position(part, i) >> 1) + quad
                        half = position(part, i) & 1
                    else:  # two blocks share a scale
                        scale_block = here + (quad >> 1)
                        half = quad & 1
                    if not SHORT and not SCALES_APART:
                        scales_x = load_floats(x_scales + scale_block * (4 * COLUMNS), COLUMNS)
                    if SHORT:
                        floats = registers(LANE_ROWS, 0.0)
                        for r in unroll(LANE_ROWS):
                            floats[r], _, _ = runs[r][i]
                            floats[r] = masked(floats[r], k - (chunk * CHUNK_BLOCKS + place) * 16)
                        # The lane's own column, whose run is that of its own place; those past the last read zeros.
                        mine = nowhere
                        scale_x = 0.0
                        if group < COLUMNS:
                            mine = values + (scale_block * 2 + half) * RUN_NBYTES + 32 * group
                            (scale_x,) = load_floats(x_scales + (scale_block * COLUMNS + group) * 4, 1)
                        x_floats = scale_floats(half_floats(load_values(mine), load_values(mine + 16)), scale_x)
                        for above in unroll(range(0, LANE_ROWS, 2)):
                            sums = mma_tf32(
                                floats[above],
                                floats[above + 1],
                                x_floats,
                                (
                                    square[2 * above],
                                    square[2 * above + 1],
                                    square[2 * above + 2],
                                    square[2 * above + 3],
                                ),
                            )
                            for e in unroll(4):
                                square[2 * above + e] = sums[e]
                    elif INT8:
                        at_sums = x_sums + scale_block * (4 * COLUMNS)
                        if SUMS == 2 and not RUN_MINIMA:
                            # Factored, this address makes ptxas spill (Q5_K, n = 1, sm_90).
                            at_sums = x_sums + half * scale_blocks * (4 * COLUMNS) + scale_block * (4 * COLUMNS)
                        if SUMS and not SUMS_APART:
                            sums_x = load_floats(at_sums, COLUMNS)
                            if RUN_MINIMA:
                                other_sums = load_floats(at_sums + scale_blocks * (4 * COLUMNS), COLUMNS)
                        scale = registers(LANE_ROWS, 0.0)
                        minimum = registers(LANE_ROWS, 0.0)
                        q = registers(LANE_ROWS, 0)
                        other = registers(LANE_ROWS, 0)
                        other_minimum = registers(LANE_ROWS, 0.0)
                        for r in unroll(LANE_ROWS):
                            q[r], scale[r], minimum[r] = runs[r][i]
                            if AT_ONCE == 2:
                                other[r], _, other_minimum[r] = runs[r][i + 1]
                        if RUN_STEP:
                            of_first = scale_block - 2 * RUN_STEP * (i // AT_ONCE)
                            mine = diagonal + ((of_first * 2 + half) * RUN_NBYTES & inside)
                            mine += 4 * RUN_STEP * (i // AT_ONCE) * RUN_NBYTES
                        else:
                            mine = diagonal + ((scale_block * 2 + half) * RUN_NBYTES & inside)
                        for pair in unroll((COLUMNS + 1) // 2):
                            if SCALES_APART:
                                scales_x = load_floats(x_scales + scale_block * (4 * COLUMNS) + 8 * pair, 2)
                            if SUMS and SUMS_APART:
                                sums_x = load_floats(at_sums + 8 * pair, 2)
                                if RUN_MINIMA:
                                    other_sums = load_floats(at_sums + scale_blocks * (4 * COLUMNS) + 8 * pair, 2)
                            x_words = load_values(mine + 32 * pair)
                            if AT_ONCE == 2:
                                x_other = load_values(mine + RUN_NBYTES + 32 * pair)
                            for above in unroll(range(0, LANE_ROWS, 2)):
                                dots = mma_s8(q[above], q[above + 1], x_words)
                                if AT_ONCE == 2:
                                    dots = mma_s8_more(other[above], other[above + 1], x_other, dots)
                                for below in unroll(2):
                                    for e in unroll(min(2, COLUMNS)):
                                        dot = fma(
                                            scale[above + below], dots[2 * below + e], scale[above + below] * BIAS
                                        )
                                        if HAS_MINIMUM:
                                            dot -= minimum[above + below] * sums_x[(0 if SUMS_APART else 2 * pair) + e]
                                        if RUN_MINIMA:
                                            dot -= (
                                                other_minimum[above + below]
                                                * other_sums[(0 if SUMS_APART else 2 * pair) + e]
                                            )
                                        total[(above + below) * COLUMNS + 2 * pair + e] = fma(
                                            scales_x[e if SCALES_APART else 2 * pair + e],
                                            dot,
                                            total[(above + below) * COLUMNS + 2 * pair + e],
                                        )
                    else:
                        floats = registers(LANE_ROWS, 0.0)
                        for r in unroll(LANE_ROWS):
                            q, scale, minimum = runs[r][i]
                            floats[r] = run_weights(q, scale, minimum)
                            if PLAIN:
                                floats[r] = masked(floats[r], k - (chunk * CHUNK_BLOCKS + place) * 16)
                        for c in unroll(COLUMNS):
                            at = values + (scale_block * 2 + half) * RUN_NBYTES + 32 * c
                            x_floats = half_floats(load_values(at), load_values(at + 16))
                            if SCALES_APART:
                                scales_x = load_floats(x_scales + (scale_block * COLUMNS + c) * 4, 1)
                            for r in unroll(LANE_ROWS):
                                total[r * COLUMNS + c] += scales_x[0 if SCALES_APART else c] * dot_floats(
                                    floats[r], x_floats
                                )
            chunk += 1
            stage += STAGE_NBYTES
            full += 8
            if full == barriers + 8 * STAGES:
                full = barriers
                stage = ring
                parity ^= 1

        buffer = tile & 1
        mbarrier_wait(barriers + 144 + 8 * buffer, ((tile >> 1) & 1) ^ 1, BULK)
        slot = partials + (buffer * K_WARPS + step) * (ROWS * COLUMNS * 4)
        for above in unroll(range(0, LANE_ROWS if SHORT else 0, 2)):
            for e in unroll(4):
                c = 2 * quad + (e & 1)
                if c < COLUMNS:
                    line = tile_row + 8 * above + 8 * (e >> 1)
                    store_shared_float(slot + (line * COLUMNS + c) * 4, square[2 * above + e])
                square[2 * above + e] = 0.0
        for above in unroll(range(0, 0 if SHORT else LANE_ROWS, 2)):
            # Of the quad's lanes, odd ones keep row g + 8, the others row g; the upper two keep the later columns.
            kept = registers(COLUMNS, 0.0)
            for c in unroll(COLUMNS):
                kept[c] = shuffle_xor_add(total[above * COLUMNS + c], total[(above + 1) * COLUMNS + c], 1, quad & 1)
                total[above * COLUMNS + c] = 0.0
                total[(above + 1) * COLUMNS + c] = 0.0
            line = tile_row + 8 * above + 8 * (quad & 1)
            if COLUMNS == 1:
                result = shuffle_xor_add(kept[0], kept[0], 2, 0)
                if quad < 2:
                    store_shared_float(slot + line * 4, result)
            else:
                at = slot + (line * COLUMNS + (quad >> 1) * (COLUMNS // 2)) * 4
                for c in unroll(COLUMNS // 2):
                    store_shared_float(at + 4 * c, shuffle_xor_add(kept[c], kept[c + COLUMNS // 2], 2, quad >> 1))
        mbarrier_arrive(barriers + 128 + 8 * buffer)
        tile += 1
        row += row_step


def add_up(partials, barriers, row, row_step, m, n, y, y_pitch, lane):
    """Adds up what the warps found for each tile of the block, and stores it."""
    tile = 0
    while row < m:
        buffer = tile & 1
        mbarrier_wait(barriers + 128 + 8 * buffer, (tile >> 1) & 1, BULK)
        item = lane
        while item < ROWS * COLUMNS:
            total = 0.0
            for step in unroll(K_WARPS):
                total += load_shared_float(partials + ((buffer * K_WARPS + step) * (ROWS * COLUMNS) + item) * 4)
            r = row + item // COLUMNS
            c = item & (COLUMNS - 1)
            if r < m and c < n:
                store_global_float(y + (c * y_pitch + r) * 4, total)
            item += 32
        mbarrier_arrive(barriers + 144 + 8 * buffer)
        tile += 1
        row += row_step


def copy_activations(target, source, nbytes, thread):
    """Copies what the quantization made to shared memory, eight pieces of 16 bytes a thread under way at a time."""
    at = thread * 16
    first = True
    while first or at < nbytes:
        words = registers(8, zero_words())
        for i in unroll(8):
            if at + i * (16 * 32 * WARPS) < nbytes:
                words[i] = load_global16_l2(source + at + i * (16 * 32 * WARPS))
        if first:
            named_barrier_arrive(LOADS, 32 * (WARPS + PRODUCERS))
            first = False
        for i in unroll(8):
            if at + i * (16 * 32 * WARPS) < nbytes:
                store_shared16(target + at + i * (16 * 32 * WARPS), words[i])
        at += 8 * 16 * 32 * WARPS
