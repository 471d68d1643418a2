"""Dequantization on the GPU: a tensor's weights as float32, bit for bit what ``gguf.quants.dequantize`` gives.

The bytes are staged as in :mod:`qmm.kernels.matvec`, one row at a time to a warp; a lane stores the runs of its unit.
"""

from __future__ import annotations

from qmm.kernels.matvec import fetch, fill, following
from qmm.kernels.primitives import run_weights
from qmm.kernels.ptx import (
    block_count,
    block_index,
    lane_index,
    shared_memory,
    store_part,
    store_run,
    synchronize_warp,
    thread_index,
)
from qmm.kernels.specialize import unroll

__all__ = ["dequantize"]


def dequantize(weights, row_nbytes, m, blocks, chunks, k, out):
    """``out`` is ``(m, k)`` float32, row-major, at a multiple of 16 bytes."""
    lane = lane_index()
    warp = thread_index() >> 5
    ring = shared_memory() + warp * (STAGES * ROWS * STAGE_NBYTES)
    row = block_index() * WARPS + warp
    row_step = block_count() * WARPS
    next_row, next_chunk = fill(ring, weights, row_nbytes, row, row_step, m, chunks, lane)
    chunk = 0
    full = 0
    empty = (STAGES - 1) * STAGE_NBYTES
    while row < m:
        wait_for_oldest()
        synchronize_warp()
        fetch(ring + empty, weights, row_nbytes, next_row, m, next_chunk, lane)
        next_row, next_chunk = following(next_row, next_chunk, chunks, row_step)
        for u in unroll(UNITS):
            unit = lane + 32 * u
            place = unit // LANES
            block = chunk * CHUNK_BLOCKS + place
            if block < blocks:
                part = unit & (LANES - 1)
                phase = (weights + row * row_nbytes + chunk * CHUNK_NBYTES) & 127
                runs = unpack(part, *load(ring + full + phase + place * BLOCK_NBYTES, part))
                target = out + (row * k + block * (16 * BLOCK_RUNS)) * 4
                for i in unroll(RUNS):
                    q, scale, minimum = runs[i]
                    values = run_weights(q, scale, minimum)
                    if PLAIN:
                        store_part(target, values, min(16, k - block * 16))
                    else:
                        store_run(target + position(part, i) * 64, values)
        row, chunk = following(row, chunk, chunks, row_step)
        empty = full
        full += STAGE_NBYTES
        if full == STAGES * STAGE_NBYTES:
            full = 0
