"""The main loop with int8 activations: runs of 16 weights by 16 activations on the tensor cores, exact in int32.

Two columns cost as much as one, and eight little more. Each run has a scale, so a lane scales its dot products one by
one: ``total += x_scale * (scale * dot - minimum * x_sum)``.
"""

from __future__ import annotations

from qmm.kernels.lang.ptx.arithmetic import fma
from qmm.kernels.lang.ptx.mma import mma_s8, mma_s8_more
from qmm.kernels.lang.specialize import unroll
from qmm.kernels.ops.matvec.columns import c, load_all, load_pair, load_values
from qmm.kernels.ops.matvec.epilogue import store_rows as store_totals

__all__ = ["accumulate", "store_totals", "totals"]

BIAS = -12582912.0  # subtracts mma_s8's 12,582,912: exact, since a scale has at most 18 significant bits


def totals(lane_rows: int, columns: int) -> int:
    """Running sums of a lane: of each of its rows with each column."""
    return lane_rows * columns


def accumulate(total, runs, part, here, left, lane, x):
    """Adds a unit's products to ``total``.

    Args:
        total: registers, LANE_ROWS by COLUMNS.
        runs: registers, for each row the runs of the lane's unit.
        part: which unit of the block it is.
        here: the first scale block of the quad's four neighbouring blocks.
        left: weights from the block's beginning to the row's end; used by plain formats only.
        lane: of the warp.
        x: a :class:`qmm.kernels.ops.matvec.columns.Columns`.
    """
    quad = lane & 3
    first = c.position(part, 0)
    for i in unroll(range(0, c.RUNS, c.AT_ONCE)):
        if c.RUN_STEP:  # an even distance between a unit's runs: constant offsets from the first
            scale_block = here + 4 * (first >> 1) + quad + 2 * c.RUN_STEP * (i // c.AT_ONCE)
            half = first & 1
        else:
            scale_block = here + 4 * (c.position(part, i) >> 1) + quad
            half = c.position(part, i) & 1
        if not c.SCALES_BY_PAIR:
            scales_x = load_all(x.scales + scale_block * (4 * c.COLUMNS))
        at_sums = x.sums + scale_block * (4 * c.COLUMNS)
        if c.SUMS == 2 and not c.RUN_MINIMA:
            # Factored, this address makes ptxas spill (Q5_K, n = 1, sm_90).
            at_sums = x.sums + half * x.other_sums + scale_block * (4 * c.COLUMNS)
        if c.SUMS and not c.SUMS_BY_PAIR:
            sums_x = load_all(at_sums)
            if c.RUN_MINIMA:
                other_sums_x = load_all(at_sums + x.other_sums)
        if c.RUN_STEP:
            of_first = scale_block - 2 * c.RUN_STEP * (i // c.AT_ONCE)
            mine = x.diagonal + ((of_first * 2 + half) * c.RUN_NBYTES & x.inside)
            mine += 4 * c.RUN_STEP * (i // c.AT_ONCE) * c.RUN_NBYTES
        else:
            mine = x.diagonal + ((scale_block * 2 + half) * c.RUN_NBYTES & x.inside)
        for pair in unroll((c.COLUMNS + 1) // 2):
            if c.SCALES_BY_PAIR:
                scales_x = load_pair(x.scales + scale_block * (4 * c.COLUMNS) + 8 * pair)
            if c.SUMS and c.SUMS_BY_PAIR:
                sums_x = load_pair(at_sums + 8 * pair)
                if c.RUN_MINIMA:
                    other_sums_x = load_pair(at_sums + x.other_sums + 8 * pair)
            x_words = load_values(mine + 32 * pair)
            if c.AT_ONCE == 2:
                other_x_words = load_values(mine + c.RUN_NBYTES + 32 * pair)
            for above in unroll(range(0, c.LANE_ROWS, 2)):
                add_rows(total, runs, i, above, pair, x_words, other_x_words, scales_x, sums_x, other_sums_x)


def add_rows(total, runs, i, above, pair, x_words, other_x_words, scales_x, sums_x, other_sums_x):
    """Adds the i-th runs of two rows, and with AT_ONCE the next ones, multiplied by a pair of columns.

    Arguments that the format does not have (other runs, sums) are not used.
    """
    upper, _, _ = runs[above][i]
    lower, _, _ = runs[above + 1][i]
    dots = mma_s8(upper, lower, x_words)
    if c.AT_ONCE == 2:
        other_upper, _, _ = runs[above][i + 1]
        other_lower, _, _ = runs[above + 1][i + 1]
        dots = mma_s8_more(other_upper, other_lower, other_x_words, dots)
    for below in unroll(2):
        _, scale, minimum = runs[above + below][i]
        if c.RUN_MINIMA:
            _, _, other_minimum = runs[above + below][i + 1]
        for e in unroll(min(2, c.COLUMNS)):
            dot = fma(scale, dots[2 * below + e], scale * BIAS)
            if c.HAS_MINIMUM:
                dot -= minimum * sums_x[(0 if c.SUMS_BY_PAIR else 2 * pair) + e]
            if c.RUN_MINIMA:
                dot -= other_minimum * other_sums_x[(0 if c.SUMS_BY_PAIR else 2 * pair) + e]
            scale_x = scales_x[e if c.SCALES_BY_PAIR else 2 * pair + e]
            so_far = total[(above + below) * c.COLUMNS + 2 * pair + e]
            total[(above + below) * c.COLUMNS + 2 * pair + e] = fma(scale_x, dot, so_far)
