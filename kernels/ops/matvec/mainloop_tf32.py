"""The main loop for numbers of at most 11 significant bits, F16 and BF16: on the tensor cores as TF32, exact products.

Activations are float16 with a scale, which is multiplied into them first. A lane passes sixteen weights of two rows and
the sixteen activations of its own column at the same places; the tensor cores add up over a quad and over time.
"""

from __future__ import annotations

from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.primitives import half_floats, masked, scale_floats
from qmm.kernels.lang.ptx.mma import mma_tf32
from qmm.kernels.lang.specialize import registers, unroll
from qmm.kernels.ops.matvec.columns import c, load_one, load_values
from qmm.kernels.ops.matvec.epilogue import store_squares as store_totals

__all__ = ["accumulate", "store_totals", "totals"]


def totals(lane_rows: int, columns: int) -> int:
    """Running sums of a lane: of rows g and g + 8 with columns 2 t and 2 t + 1, for each two rows."""
    return 2 * lane_rows


def accumulate(total, runs, part, here, left, lane, x):
    """Adds a unit's products to ``total``; arguments as for :func:`qmm.kernels.ops.matvec.mainloop_s8.accumulate`."""
    group, quad = lane >> 2, lane & 3
    scale_block = here + (quad >> 1)  # two blocks of 16 share a scale
    half = quad & 1
    # The lane reads its run of column `group`; past the last column, zeros.
    mine = x.zeros
    scale_x = 0.0
    floats = registers(c.LANE_ROWS, 0.0)
    for r in unroll(c.LANE_ROWS):
        floats[r], _, _ = runs[r][0]
        floats[r] = mask("tail, short", masked(floats[r], left), floats[r])
    if mask("columns, short", group < c.COLUMNS):
        mine = x.values + (scale_block * 2 + half) * c.RUN_NBYTES + 32 * group
        scale_x = load_one(x.scales + (scale_block * c.COLUMNS + group) * 4)
    x_floats = scale_floats(half_floats(load_values(mine), load_values(mine + 16)), scale_x)
    for above in unroll(range(0, c.LANE_ROWS, 2)):
        so_far = total[2 * above], total[2 * above + 1], total[2 * above + 2], total[2 * above + 3]
        sums = mma_tf32(floats[above], floats[above + 1], x_floats, so_far)
        for e in unroll(4):
            total[2 * above + e] = sums[e]
