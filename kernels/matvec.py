"""The product of a quantized weight with a few columns, on the GPU: ``y[n, m] = x[n, k] @ W[m, k]^T`` for ``n <= 8``.

It is bound by reading W, so everything serves that. A warp takes ROWS neighbouring rows and streams their bytes through
its own ring of STAGES buffers in shared memory, 16 bytes a lane, by asynchronous copies that need no register. Each
byte of the tensor is copied once by one lane, whatever the columns; mapped host memory passes no cache, so a second
reading would cost a second transfer. Out of the ring a lane takes one unit of a block (the format's ``load``), unpacks
it into runs of 16 weights and multiplies these with every column.

A chunk, which is what a stage holds of a row, is the fewest blocks that give each of the 32 lanes the same number of
units and end at a multiple of 16 bytes. Where a row or chunk begins or ends inside 16 bytes, that part is copied in
small pieces instead: the warp touches no byte outside its own rows, and so none outside the tensor.

Work is dealt to warps round by round over a grid that fills the GPU once; the ring runs on into the warp's next rows.
"""

from __future__ import annotations

from qmm.kernels.primitives import half_floats, masked, run_weights
from qmm.kernels.ptx import (
    block_count,
    block_index,
    commit,
    copy16,
    dot16,
    dot_floats,
    lane_index,
    load_float,
    load_global16,
    shared_memory,
    store_float,
    sum_of_warp,
    synchronize_warp,
    thread_index,
)
from qmm.kernels.specialize import registers, unroll

__all__ = ["matvec"]


def matvec(weights, row_nbytes, m, blocks, chunks, k, x, x_scales, x_sums, x_pitch, n, y, y_pitch):
    """Up to COLUMNS products with every row.

    ``x`` is ``(n, x_pitch)`` int8 (INT8) or float16, ``x_scales`` ``(n, x_pitch / 32)`` and ``x_sums``
    ``(n, x_pitch / 16)`` float32, as :mod:`qmm.kernels.activations` makes them. ``y`` is float32, ``y_pitch`` apart.
    """
    lane = lane_index()
    warp = thread_index() >> 5
    ring = shared_memory() + warp * (STAGES * ROWS * STAGE_NBYTES)
    row = (block_index() * WARPS + warp) * ROWS
    row_step = block_count() * (WARPS * ROWS)

    # The last column stands in for columns past n, which are computed and not stored.
    column = registers(COLUMNS, 0)
    for c in unroll(COLUMNS):
        column[c] = min(c, n - 1) * x_pitch
    total = registers(ROWS * COLUMNS, 0.0)

    next_row, next_chunk = fill(ring, weights, row_nbytes, row, row_step, m, chunks, lane)
    chunk = 0
    full = 0
    empty = (STAGES - 1) * (ROWS * STAGE_NBYTES)
    while row < m:
        wait_for_oldest()
        synchronize_warp()  # every lane's copies have arrived, and every lane is done with the stage before
        fetch(ring + empty, weights, row_nbytes, next_row, m, next_chunk, lane)
        next_row, next_chunk = following(next_row, next_chunk, chunks, row_step)

        for u in unroll(UNITS):
            unit = lane + 32 * u
            place = unit // LANES
            block = chunk * CHUNK_BLOCKS + place
            if block < blocks:
                part = unit & (LANES - 1)
                registers_of_rows = registers(ROWS, 0)
                for r in unroll(ROWS):
                    phase = (weights + (row + r) * row_nbytes + chunk * CHUNK_NBYTES) & 127
                    address = ring + full + r * STAGE_NBYTES + phase + place * BLOCK_NBYTES
                    registers_of_rows[r] = unpack(part, *load(address, part))
                for i in unroll(RUNS):
                    run = block * BLOCK_RUNS + position(part, i)
                    weights_of_rows = registers(ROWS, 0)
                    for r in unroll(ROWS):
                        if not INT8:
                            q, scale, minimum = registers_of_rows[r][i]
                            weights_of_rows[r] = run_weights(q, scale, minimum)
                            if PLAIN:
                                weights_of_rows[r] = masked(weights_of_rows[r], k - block * 16)
                    for c in unroll(COLUMNS):
                        start = column[c] + run * 16
                        scale_x = load_float(x_scales + (start >> 5) * 4)
                        if INT8:
                            values = load_global16(x + start)
                            if HAS_MINIMUM:
                                sum_x = load_float(x_sums + (start >> 4) * 4)
                        else:
                            values = half_floats(load_global16(x + start * 2), load_global16(x + start * 2 + 16))
                        for r in unroll(ROWS):
                            if INT8:
                                q, scale, minimum = registers_of_rows[r][i]
                                total[r * COLUMNS + c] += (scale * scale_x) * dot16(q, values)
                                if HAS_MINIMUM:
                                    total[r * COLUMNS + c] -= minimum * sum_x
                            else:
                                total[r * COLUMNS + c] += scale_x * dot_floats(weights_of_rows[r], values)

        chunk += 1
        if chunk == chunks:
            for r in unroll(ROWS):
                for c in unroll(COLUMNS):
                    result = sum_of_warp(total[r * COLUMNS + c])
                    if lane == 0 and row + r < m and c < n:
                        store_float(y + (c * y_pitch + row + r) * 4, result)
                    total[r * COLUMNS + c] = 0.0
            chunk = 0
            row += row_step
        empty = full
        full += ROWS * STAGE_NBYTES
        if full == STAGES * (ROWS * STAGE_NBYTES):
            full = 0


def fill(ring, weights, row_nbytes, row, row_step, m, chunks, lane):
    """Starts copying a warp's first chunks into all stages but one; what comes after them."""
    chunk = 0
    for stage in unroll(STAGES - 1):
        fetch(ring + stage * (ROWS * STAGE_NBYTES), weights, row_nbytes, row, m, chunk, lane)
        row, chunk = following(row, chunk, chunks, row_step)
    return row, chunk


def following(row, chunk, chunks, row_step):
    """The chunk that a warp takes after this one: the row's next, or the first of its next row."""
    chunk += 1
    if chunk == chunks:
        return row + row_step, 0
    return row, chunk


def fetch(stage, weights, row_nbytes, row, m, chunk, lane):
    """Starts copying one chunk of ROWS rows into a stage; one group of copies, even if empty."""
    for r in unroll(ROWS):
        if row + r < m:
            begin = weights + (row + r) * row_nbytes
            start = begin + chunk * CHUNK_NBYTES
            copy_span(stage + r * STAGE_NBYTES, start, min(start + CHUNK_NBYTES, begin + row_nbytes), lane)
    commit()


def copy_span(target, start, end, lane):
    """Copies the bytes from ``start`` to ``end``, and touches no other, to the same place modulo 128 of ``target``.

    The same place in the line, because the copy moves sectors of 32 bytes: where the halves of a sector went to
    different sectors of shared memory, each was transferred twice (Q6_K, 4096 x 4096, mapped: 647,168 sectors read
    instead of 430,080).
    """
    line = start & -128
    for v in unroll(VECTORS):
        offset = 16 * (lane + 32 * v)
        source = line + offset
        if source >= start and source + 16 <= end:
            copy16(target + offset, source)
    if ALIGNMENT < 16:
        # What is left at either end is less than 16 bytes: a piece a lane, so that one transfer serves it; the lower
        # half of the warp takes the beginning, the upper half the end.
        first = start & -16
        last = end & -16
        piece = (lane & 15) * EDGE
        if piece < 16:
            if lane < 16:
                source = first + piece
                if (first < start or first + 16 > end) and source >= start and source < end:
                    copy_edge(target + (source - line), source)
            else:
                source = last + piece
                if last > first and source < end:
                    copy_edge(target + (source - line), source)
