"""The main loop with float16 activations for all other formats: fused multiply-adds in float32."""

from __future__ import annotations

from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.primitives import half_floats, masked, run_weights
from qmm.kernels.lang.ptx.arithmetic import dot_floats
from qmm.kernels.lang.specialize import registers, unroll
from qmm.kernels.ops.matvec.columns import c, load_all, load_one, load_values
from qmm.kernels.ops.matvec.epilogue import store_rows as store_totals

__all__ = ["accumulate", "store_totals", "totals"]


def totals(lane_rows: int, columns: int) -> int:
    """Running sums of a lane: of each of its rows with each column."""
    return lane_rows * columns


def accumulate(total, runs, part, here, left, lane, x):
    """Adds a unit's products to ``total``; arguments as for :func:`qmm.kernels.ops.matvec.mainloop_s8.accumulate`."""
    quad = lane & 3
    first = c.position(part, 0)
    for i in unroll(c.RUNS):
        if c.RUN_STEP:  # an even distance between a unit's runs: constant offsets from the first
            scale_block = here + 4 * (first >> 1) + quad + 2 * c.RUN_STEP * i
            half = first & 1
        elif c.BLOCK_RUNS > 1:
            scale_block = here + 4 * (c.position(part, i) >> 1) + quad
            half = c.position(part, i) & 1
        else:  # two blocks of 16 share a scale
            scale_block = here + (quad >> 1)
            half = quad & 1
        if not c.SCALES_BY_PAIR:
            scales_x = load_all(x.scales + scale_block * (4 * c.COLUMNS))
        floats = registers(c.LANE_ROWS, 0.0)
        for r in unroll(c.LANE_ROWS):
            q, scale, minimum = runs[r][i]
            floats[r] = run_weights(q, scale, minimum)
            if c.PLAIN:
                floats[r] = mask("tail", masked(floats[r], left), floats[r])
        for column in unroll(c.COLUMNS):
            at = x.values + (scale_block * 2 + half) * c.RUN_NBYTES + 32 * column
            x_floats = half_floats(load_values(at), load_values(at + 16))
            if c.SCALES_BY_PAIR:
                scale_x = load_one(x.scales + (scale_block * c.COLUMNS + column) * 4)
            else:
                scale_x = scales_x[column]
            for r in unroll(c.LANE_ROWS):
                total[r * c.COLUMNS + column] += scale_x * dot_floats(floats[r], x_floats)
