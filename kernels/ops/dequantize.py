"""Dequantization on the GPU: a tensor's weights as float32, bit for bit what ``gguf.quants.dequantize`` gives.

The bytes pass through the same ring as in :mod:`qmm.kernels.ops.matvec.kernel`, and lanes take the same units; a lane
stores the runs of its unit.
"""

from __future__ import annotations

from qmm.kernels.lang.primitives import run_weights
from qmm.kernels.lang.ptx.barrier import fence_mbarrier_init, mbarrier_arrive, mbarrier_wait, sync_cta
from qmm.kernels.lang.ptx.global_memory import store_global_run, store_global_run_part
from qmm.kernels.lang.ptx.grid import cta_count, cta_index, lane_index, shared_memory, thread_index
from qmm.kernels.lang.specialize import unroll
from qmm.kernels.ops.pipeline import following, prepare, produce

__all__ = ["dequantize"]


def dequantize(weights, row_nbytes, m, blocks, chunks, k, out):
    """``out`` is ``(m, k)`` float32, row-major, at a multiple of 16 bytes."""
    lane = lane_index()
    thread = thread_index()
    warp = thread >> 5
    barriers = shared_memory()
    ring = barriers + BARRIERS_NBYTES
    row = cta_index() * ROWS
    row_step = cta_count() * ROWS
    prepare(barriers, thread)
    fence_mbarrier_init(BULK)
    sync_cta()
    if warp >= WARPS:
        if warp < WARPS + PRODUCERS:
            produce(ring, barriers, weights, row_nbytes, m, chunks, row, 0, row_step, 0, 1 << 62, warp - WARPS, lane)
    else:
        full = barriers
        stage = ring
        parity = 0
        chunk = 0
        while row < m:
            mbarrier_wait(full, parity, BULK)
            for u in unroll(UNITS):
                part = (warp + K_WARPS * u) & (LANES - 1)
                place = ((warp + K_WARPS * u) // LANES) * 4 + (lane & 3)
                block = chunk * CHUNK_BLOCKS + place
                for r in unroll(LANE_ROWS):
                    line = (lane >> 2) + 8 * r
                    if block < blocks and row + line < m:
                        phase = (weights + (row + line) * row_nbytes + chunk * CHUNK_NBYTES) & (LINE - 1)
                        runs = unpack(part, *load(stage + line * PITCH + phase + place * BLOCK_NBYTES, part))
                        target = out + ((row + line) * k + block * (16 * BLOCK_RUNS)) * 4
                        for i in unroll(RUNS):
                            q, scale, minimum = runs[i]
                            values = run_weights(q, scale, minimum)
                            if PLAIN:
                                store_global_run_part(target, values, min(16, k - block * 16))
                            else:
                                store_global_run(target + position(part, i) * 64, values)
            mbarrier_arrive(full + 64)
            row, chunk = following(row, chunk, chunks, row_step)
            stage += STAGE_NBYTES
            full += 8
            if full == barriers + 8 * STAGES:
                full = barriers
                stage = ring
                parity ^= 1
