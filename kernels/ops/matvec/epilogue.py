"""The epilogue: the consumer warps' partial sums of a tile are added up in a fixed order and stored as results.

Each consumer warp has partial sums of all rows of the tile, over its share of k. It stores them to one of two buffers
in shared memory and goes on to the next tile; one warp of the CTA adds up the buffer and stores the results.
"""

from __future__ import annotations

from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.ptx.barrier import mbarrier_arrive, mbarrier_wait
from qmm.kernels.lang.ptx.global_memory import store_global_float
from qmm.kernels.lang.ptx.shared_memory import load_shared_float, store_shared_float
from qmm.kernels.lang.ptx.warp import shuffle_xor_add
from qmm.kernels.lang.specialize import registers, unroll
from qmm.kernels.ops.matvec.columns import c
from qmm.kernels.ops.tiling import SUMS_EMPTY, SUMS_FULL

__all__ = ["add_up", "store_rows", "store_squares"]


def store_rows(total, slot, tile_row, quad):
    """Adds up a quad's partial sums of each row with each column, stores them to ``slot``, and clears them."""
    for above in unroll(range(0, c.LANE_ROWS, 2)):
        # Odd lanes of the quad keep row g + 8, even ones row g; the upper two lanes keep the later columns.
        kept = registers(c.COLUMNS, 0.0)
        for column in unroll(c.COLUMNS):
            upper, lower = total[above * c.COLUMNS + column], total[(above + 1) * c.COLUMNS + column]
            kept[column] = shuffle_xor_add(upper, lower, 1, quad & 1)
            total[above * c.COLUMNS + column] = 0.0
            total[(above + 1) * c.COLUMNS + column] = 0.0
        line = tile_row + 8 * above + 8 * (quad & 1)
        if c.COLUMNS == 1:
            result = shuffle_xor_add(kept[0], kept[0], 2, 0)
            if quad < 2:
                store_shared_float(slot + line * 4, result)
        else:
            at = slot + (line * c.COLUMNS + (quad >> 1) * (c.COLUMNS // 2)) * 4
            for column in unroll(c.COLUMNS // 2):
                result = shuffle_xor_add(kept[column], kept[column + c.COLUMNS // 2], 2, quad >> 1)
                store_shared_float(at + 4 * column, result)


def store_squares(total, slot, tile_row, quad):
    """Stores a lane's sums of rows g and g + 8 with columns 2 t and 2 t + 1 to ``slot``, and clears them. The
    tensor cores have added them up over the quad."""
    for above in unroll(range(0, c.LANE_ROWS, 2)):
        for e in unroll(4):
            column = 2 * quad + (e & 1)
            if mask("sums, short", column < c.COLUMNS):
                line = tile_row + 8 * above + 8 * (e >> 1)
                store_shared_float(slot + (line * c.COLUMNS + column) * 4, total[2 * above + e])
            total[2 * above + e] = 0.0


def add_up(sums, barriers, row, row_step, m, n, y, y_pitch, lane):
    """For each tile of the CTA, adds up the partial sums of its warps and stores the results."""
    tile = 0
    while row < m:
        buffer = tile & 1
        mbarrier_wait(barriers + SUMS_FULL + 8 * buffer, (tile >> 1) & 1, c.BULK)
        item = lane
        while item < c.ROWS * c.COLUMNS:
            total = 0.0
            for step in unroll(c.K_WARPS):
                total += load_shared_float(sums + ((buffer * c.K_WARPS + step) * (c.ROWS * c.COLUMNS) + item) * 4)
            r = row + item // c.COLUMNS
            column = item & (c.COLUMNS - 1)
            if mask("rows of results", r < m) and mask("columns of results", column < n):
                store_global_float(y + (column * y_pitch + r) * 4, total)
            item += 32
        mbarrier_arrive(barriers + SUMS_EMPTY + 8 * buffer)
        tile += 1
        row += row_step
