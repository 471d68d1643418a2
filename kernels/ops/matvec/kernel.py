"""The product of a quantized weight with a few columns, on the GPU: ``y[n, m] = x[n, k] @ W[m, k]^T`` for ``n <= 8``.

It is memory-bound, by reading W. One persistent CTA per SM takes tiles of 16 or 32 neighbouring rows, one after the
other. Producer warps copy the rows' bytes to a ring of pipeline stages in shared memory
(:mod:`qmm.kernels.ops.pipeline`). Each byte is copied once, whatever n is: mapped host memory is not cached, and a
second read would cost a second transfer. Consumer warps multiply, and one warp runs the epilogue.

From a stage, lane ``4 g + t`` of a warp takes one unit (the format's ``load``) of rows g and g + 8, from the t-th of
four neighbouring blocks, unpacks it into runs of 16 weights and multiplies these with the columns: int8 activations on
the tensor cores (:func:`qmm.kernels.lang.ptx.mma.mma_s8`), so that two columns cost as much as one and eight little
more; weights of float16 and bfloat16 there too (:func:`qmm.kernels.lang.ptx.mma.mma_tf32`); the rest by fused
multiply-adds. Warps take the units of a row in turn (K-split), so each has partial sums of all rows of the
tile. The epilogue adds them up through shared memory, in a fixed order.

Activations are quantized by another kernel (:mod:`qmm.kernels.ops.quantize`), or with FUSED at the start of this one.
Both kernels start before their predecessors end (programmatic dependent launch, from sm_90 on). This one starts its
copies at once, since weights never change, and then waits for its predecessor.

Between the last byte of a product and the first of the next one memory would idle for some 3 us, while the last tiles
are multiplied, CTAs end and others start. If the next product is known, each CTA prefetches a part of its weights to L2
as soon as its own bytes have arrived (n = 1 on an H100: Q4_K, 14336x4096, 12.5 us, else 13.3; prefetched together with
its last own bytes, 14.0).
"""

from __future__ import annotations

from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.ptx.arithmetic import zero_words
from qmm.kernels.lang.ptx.barrier import (
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier_wait,
    sync_cta,
    sync_warp,
)
from qmm.kernels.lang.ptx.copy import bulk_copy
from qmm.kernels.lang.ptx.grid import (
    cta_count,
    cta_index,
    lane_index,
    launch_dependents,
    shared_memory,
    thread_index,
    wait_for_predecessors,
)
from qmm.kernels.lang.ptx.shared_memory import store_shared16
from qmm.kernels.lang.specialize import registers, unroll
from qmm.kernels.ops.matvec.activations import X_REQUESTED, copy_activations, quantize_block
from qmm.kernels.ops.matvec.columns import Columns, c
from qmm.kernels.ops.matvec.epilogue import add_up
from qmm.kernels.ops.pipeline import prefetch_rows, prepare, produce
from qmm.kernels.ops.tiling import EMPTY, OF_X, SUMS_EMPTY, SUMS_FULL

__all__ = ["matvec"]

CONSUMERS = 2
"""The named barrier of the consumer warps."""


def matvec(
    weights, row_nbytes, m, blocks, chunks, k, scale_blocks, x, x_stride, zeros, n, y, y_pitch,
    next_weights, next_row_nbytes, next_rows, next_nbytes,
):  # fmt: skip
    """The products of every row with up to COLUMNS columns.

    ``x`` holds ``scale_blocks`` of activations as :class:`qmm.kernels.ops.layout.Activations` lays them out; or
    with FUSED, ``n`` rows of ``k`` float32 at a stride of ``x_stride`` bytes, each at a multiple of 16. At ``zeros``
    are ZERO_NBYTES zero bytes. ``y`` is float32, with ``y_pitch`` numbers a row. The first ``next_nbytes`` of each of
    ``next_rows`` rows, or joined rows, are prefetched to L2: they begin at ``next_weights``, at a stride of
    ``next_row_nbytes``.
    """
    lane = lane_index()
    thread = thread_index()
    warp = thread >> 5
    barriers = shared_memory()
    zeroed = barriers + c.BARRIERS_NBYTES
    sums = zeroed + c.ZERO_NBYTES
    ring = sums + 2 * c.K_WARPS * c.ROWS * c.COLUMNS * 4
    row = cta_index() * c.ROWS
    row_step = cta_count() * c.ROWS
    x_nbytes = scale_blocks * c.X_NBYTES
    if c.PROGRAMMATIC:
        launch_dependents()
    prepare(barriers, thread)
    if thread == 0:
        mbarrier_init(barriers + OF_X, 1)
    if thread < 2:
        mbarrier_init(barriers + SUMS_FULL + 8 * thread, 32 * c.WARPS)
        mbarrier_init(barriers + SUMS_EMPTY + 8 * thread, 32)
    if thread * 16 < c.ZERO_NBYTES:
        store_shared16(zeroed + thread * 16, zero_words())
    fence_mbarrier_init(c.BULK)
    sync_cta()

    next_row = row
    chunk = 0
    producer = warp - c.WARPS
    if producer >= 0 and producer < c.PRODUCERS:
        next_row, chunk = produce(
            *(ring, barriers, weights, row_nbytes, m, chunks),
            *(row, 0, row_step, 0, c.FIRST_STAGES, producer, lane),
        )
    if c.PROGRAMMATIC:
        wait_for_predecessors()

    if producer >= c.PRODUCERS:
        add_up(sums, barriers, row, row_step, m, n, y, y_pitch, lane)
    elif producer >= 0:
        # Activations come first: else they queue up behind the weights.
        if c.X_BULK:
            if producer == 0 and lane == 0:
                mbarrier_expect_tx(barriers + OF_X, x_nbytes)
                bulk_copy(ring + c.STAGES * c.STAGE_NBYTES, x, x_nbytes, barriers + OF_X)
                mbarrier_arrive(barriers + OF_X)
        elif c.X_SHARED:
            named_barrier_wait(X_REQUESTED, 32 * (c.WARPS + c.PRODUCERS))
        produce(
            *(ring, barriers, weights, row_nbytes, m, chunks),
            *(next_row, chunk, row_step, c.FIRST_STAGES, 1 << 62, producer, lane),
        )
        if c.BULK and producer == 0 and row < m:
            last = (m - row + row_step - 1) // row_step * chunks - 1
            mbarrier_wait(barriers + 8 * (last % c.STAGES), last // c.STAGES & 1, c.BULK)
            prefetch_rows(next_weights, next_row_nbytes, next_rows, next_nbytes, lane)
    else:
        values = x
        zero_x = zeros
        if c.X_SHARED:
            values = ring + c.STAGES * c.STAGE_NBYTES
            zero_x = zeroed + 64  # other memory banks than the other lanes read
        if c.FUSED:
            quantize_block(x, x_stride, n, k, scale_blocks, values, thread)
            named_barrier_wait(CONSUMERS, 32 * c.WARPS)
        elif c.X_BULK:
            mbarrier_wait(barriers + OF_X, 0, c.BULK)
        elif c.X_SHARED:
            copy_activations(values, x, x_nbytes, thread)
            named_barrier_wait(CONSUMERS, 32 * c.WARPS)
        consume(
            *(ring, barriers, sums, zeroed, weights, row_nbytes, m, blocks, chunks, k),
            *(values, scale_blocks, zero_x, row, row_step, warp, lane),
        )


def consume(
    ring, barriers, sums, zeroed, weights, row_nbytes, m, blocks, chunks, k,
    values, scale_blocks, zero_x, row, row_step, warp, lane,
):  # fmt: skip
    """One consumer warp's share of every tile of the CTA, whose activations lie at ``values``."""
    last_group = (blocks - 1) >> 2
    group, quad = lane >> 2, lane & 3
    x = columns_of(values, scale_blocks, zero_x, lane)
    tile_row = (warp // c.K_WARPS) * c.TILE_ROWS + group
    step = warp & (c.K_WARPS - 1)
    total = registers(c.TOTALS, 0.0)
    full = barriers
    stage = ring
    parity = 0
    tile = 0
    while row < m:
        chunk = 0
        while chunk < chunks:
            mbarrier_wait(full, parity, c.BULK)
            for u in unroll(c.UNITS):
                part = (step + c.K_WARPS * u) & (c.LANES - 1)
                block_group = (step + c.K_WARPS * u) // c.LANES
                place = block_group * 4 + quad
                runs = registers(c.LANE_ROWS, 0)
                for r in unroll(c.LANE_ROWS):
                    phase = (weights + (row + tile_row + 8 * r) * row_nbytes + chunk * c.CHUNK_NBYTES) & (c.LINE - 1)
                    address = stage + (tile_row + 8 * r) * c.PITCH + phase + place * c.BLOCK_NBYTES
                    if mask("blocks", chunk * c.CHUNK_BLOCKS + place >= blocks, False):
                        address = zeroed
                    runs[r] = c.unpack(part, *c.load(address, part))
                if u == c.UNITS - 1:
                    release(full, stage)
                next_group = chunk * (c.CHUNK_BLOCKS // 4) + block_group
                here = mask("groups", min(next_group, last_group), next_group) * c.QUAD_SCALE_BLOCKS
                left = k - (chunk * c.CHUNK_BLOCKS + place) * 16
                c.accumulate(total, runs, part, here, left, lane, x)
            chunk += 1
            stage += c.STAGE_NBYTES
            full += 8
            if full == barriers + 8 * c.STAGES:
                full = barriers
                stage = ring
                parity ^= 1

        buffer = tile & 1
        mbarrier_wait(barriers + SUMS_EMPTY + 8 * buffer, ((tile >> 1) & 1) ^ 1, c.BULK)
        c.store_totals(total, sums + (buffer * c.K_WARPS + step) * (c.ROWS * c.COLUMNS * 4), tile_row, quad)
        mbarrier_arrive(barriers + SUMS_FULL + 8 * buffer)
        tile += 1
        row += row_step


def columns_of(values, scale_blocks, zero_x, lane):
    """The addresses from which a lane loads the activations at ``values``.

    It passes one column of its own run to mma_s8; a lane without a column passes zeros.
    """
    scales = values + scale_blocks * (2 * c.RUN_NBYTES)
    sums = scales + scale_blocks * (4 * c.COLUMNS)
    column = (lane >> 2) & 1
    diagonal = values + column * 16
    inside = -1
    if lane & 3 != lane >> 3 or column >= c.COLUMNS:
        diagonal = zero_x
        inside = 0
    return Columns(values, scales, sums, scale_blocks * (4 * c.COLUMNS), zero_x, diagonal, inside)


def release(full, stage):
    """Gives a stage back to the producers.

    Neither address is ever 0: the branch and the warp's barrier keep ptxas from moving loads over the arrival, or it
    spills (Q5_1, n = 8, sm_90; Q2_K, sm_80 and sm_100; Q4_K, n = 8, sm_100).
    """
    sync_warp()
    if c.ARRIVAL_BY_FULL:
        if full != 0:
            mbarrier_arrive(full + EMPTY)
    elif stage != 0:
        mbarrier_arrive(full + EMPTY)
