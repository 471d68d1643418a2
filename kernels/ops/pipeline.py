"""The ring of pipeline stages in shared memory for a weight's bytes, and the producer warps that fill it.

A stage holds one chunk of each row of a tile. Producer warps only start copies, as far ahead as there are stages;
consumer warps wait for a stage to be full, read it and release it. Both directions are mbarriers in shared memory, so
warps need not run in lockstep.

From compute capability 9.0 on (BULK) a lane copies a row's part with one instruction; before, the warp copies it 16
bytes a lane. Either way copies are 16 bytes at a multiple of 16, and may include the end of a neighbouring row. Where
16 bytes would reach outside the tensor, at its first and last bytes, smaller pieces are copied: no byte outside the
tensor is read.
"""

from __future__ import annotations

from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.ptx.barrier import (
    mbarrier_arrive,
    mbarrier_arrive_after_copies,
    mbarrier_expect_tx,
    mbarrier_init,
    mbarrier_wait,
)
from qmm.kernels.lang.ptx.copy import bulk_copy, copy16, copy_edge, prefetch_l2
from qmm.kernels.lang.ptx.grid import cta_count, cta_index
from qmm.kernels.lang.specialize import unroll
from qmm.kernels.ops.tiling import EMPTY, PipelineConstants

__all__ = ["following", "prefetch_rows", "prepare", "produce"]

c = PipelineConstants.placeholder()


def prepare(barriers, thread):
    """Initializes the barriers: for each stage "full" and "empty".

    Every lane arrives. One arrival for each warp after a ``sync_warp`` is correct too, but no faster (H100, 40
    products: lane arrivals take 0.996 of its time on geometric mean), and compute-sanitizer's racecheck reports it as a
    race.
    """
    if thread < c.STAGES:
        mbarrier_init(barriers + 8 * thread, 32 * c.PRODUCERS)
        mbarrier_init(barriers + EMPTY + 8 * thread, 32 * c.WARPS)


def produce(ring, barriers, weights, row_nbytes, m, chunks, row, chunk, row_step, item, count, producer, lane):
    """Copies up to ``count`` chunks of the CTA's rows, beginning with its ``item``-th. Each producer warp copies its
    share of every chunk. Returns the row and chunk that come next."""
    end = weights + m * row_nbytes
    stage = item % c.STAGES
    parity = (item // c.STAGES & 1) ^ 1
    while row < m and count > 0:
        full = barriers + 8 * stage
        mbarrier_wait(full + EMPTY, parity, c.BULK)
        if c.BULK:
            fetch_bulk(ring + stage * c.STAGE_NBYTES, full, weights, end, row_nbytes, row, m, chunk, producer, lane)
        else:
            fetch(ring + stage * c.STAGE_NBYTES, full, weights, end, row_nbytes, row, m, chunk, producer, lane)
        row, chunk = following(row, chunk, chunks, row_step)
        count -= 1
        stage += 1
        if stage == c.STAGES:
            stage = 0
            parity ^= 1
    return row, chunk


def prefetch_rows(weights, row_nbytes, rows, nbytes, lane):
    """Prefetches the first ``nbytes`` of each of ``rows`` rows to L2, except 16-byte pieces shared with other rows. One
    warp of each CTA takes its share of the rows."""
    row = lane * cta_count() + cta_index()
    while row < rows:
        start = weights + row * row_nbytes
        first = mask("prefetch, first piece", (start + 15) & -16, start & -16)
        last = mask("prefetch, last piece", (start + nbytes) & -16, (start + nbytes + 15) & -16)
        if last > first:
            prefetch_l2(first, last - first)
        row += cta_count() * 32


def following(row, chunk, chunks, row_step):
    """The row and chunk that a CTA takes next: the next chunk of these rows, or the first of its next rows."""
    chunk += 1
    if chunk == chunks:
        return row + row_step, 0
    return row, chunk


def fetch_bulk(stage, full, weights, end, row_nbytes, row, m, chunk, producer, lane):
    """Starts copying one chunk of ROWS rows into a stage, a row a lane, addresses kept modulo LINE.

    A bulk copy takes its warp about 50 cycles, one lane after the other; hence several producer warps.
    """
    for i in unroll((c.ROWS + 32 * c.PRODUCERS - 1) // (32 * c.PRODUCERS)):
        line = (lane + 32 * i) * c.PRODUCERS + producer
        if mask("lines, bulk", line < c.ROWS) and mask("rows, bulk", row + line < m):
            begin = weights + (row + line) * row_nbytes
            start = begin + chunk * c.CHUNK_NBYTES
            chunk_end = start + c.CHUNK_NBYTES
            stop = mask("depth, bulk", min(chunk_end, begin + row_nbytes), chunk_end)
            target = stage + line * c.PITCH - (start & -c.LINE)
            first = start & -16
            last = (stop + 15) & -16
            if c.ALIGNMENT < 16:
                if mask("first piece, bulk", first < weights, False):
                    copy_edges(target + first, first, weights, end)
                    first += 16
                if mask("last piece, bulk", last > end, False) and mask("only piece, bulk", last > first):
                    last -= 16
                    copy_edges(target + last, last, weights, end)
            if last > first:
                mbarrier_expect_tx(full, last - first)
                bulk_copy(target + first, first, last - first, full)
    mbarrier_arrive(full)


def fetch(stage, full, weights, end, row_nbytes, row, m, chunk, producer, lane):
    """The same with copies of 16 bytes a lane, row after row."""
    for line in range(producer, mask("rows, by 16", min(c.ROWS, m - row), c.ROWS), c.PRODUCERS):
        begin = weights + (row + line) * row_nbytes
        start = begin + chunk * c.CHUNK_NBYTES
        chunk_end = start + c.CHUNK_NBYTES
        stop = mask("depth, by 16", min(chunk_end, begin + row_nbytes), chunk_end)
        target = stage + line * c.PITCH - (start & -c.LINE)
        piece = (start & -16) + 16 * lane
        while piece < stop:
            if c.ALIGNMENT >= 16 or (
                mask("first piece, by 16", piece >= weights) and mask("last piece, by 16", piece + 16 <= end)
            ):
                copy16(target + piece, piece)
            else:
                copy_edges(target + piece, piece, weights, end)
            piece += 512
    mbarrier_arrive_after_copies(full)


def copy_edges(target, source, weights, end):
    """Copies those of 16 bytes that lie in the tensor."""
    i = 0
    while i < 16:
        if mask("edge before", source + i >= weights) and mask("edge after", source + i < end):
            copy_edge(target + i, source + i, c.EDGE)
        i += c.EDGE
