"""Products on the tensor cores, an instruction of the whole warp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qmm.errors import EmulatorError
from qmm.kernels.lang.operation import operation
from qmm.kernels.lang.ptx.arithmetic import MAGIC

__all__ = ["mma_s8", "mma_s8_more", "mma_tf32"]

MMA_S8 = (
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
MMA_TF32 = (
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


@operation("(Words, Words, Words) -> float32[4]", of_warp=True)
def mma_s8(a, b, x):
    """Products of two rows with two columns of signed bytes: ``12,582,912 + dot`` as four floats, exact.

    A tensor-core product sums over the four lanes of a quad, whose runs have different scales. So x is placed
    on a diagonal: only the lane with index t in its quad contributes to column ``2 t + e``, and each lane gets its own
    run's sum for two columns. Lane ``4 g + t`` passes its run ``a`` of row g and ``b`` of row g + 8. As ``x`` the
    lanes with ``t == g // 2`` pass the same run of x's column ``g % 2``, and all others zeros.

    Returns row g with columns 0 and 1, then row g + 8 with columns 0 and 1.
    """
    return _dots(a, b, x, np.full((32, 4), MAGIC, np.int32))


@operation("(Words, Words, Words, float32[4]) -> float32[4]", of_warp=True)
def mma_s8_more(a, b, x, dots):
    """Adds the products of other runs to ``dots``, the result of :func:`mma_s8`, which includes the 12,582,912."""
    return _dots(a, b, x, np.array(dots, np.float32).view(np.int32))


def _dots(a: Sequence[np.ndarray], b: Sequence[np.ndarray], x: Sequence[np.ndarray], totals: np.ndarray) -> list[Any]:
    rows, rows_below, columns = (
        np.array(side, np.uint32).view(np.int8).reshape(8, 64).astype(np.int32) for side in (a, b, x)
    )
    upper, lower = (totals[:, half].reshape(8, 8) for half in (slice(0, 2), slice(2, 4)))
    upper, lower = upper + rows @ columns.T, lower + rows_below @ columns.T
    return _by_lane(*[square.astype(np.int32).view(np.float32) for square in (upper, lower)])


def _by_lane(upper: np.ndarray, lower: np.ndarray) -> list[Any]:
    """Of two squares of eight rows by eight columns, lane ``4 g + t`` gets row g of both, columns ``2 t`` and
    ``2 t + 1``."""
    return [tuple(row) for row in np.concatenate([upper.reshape(32, 2), lower.reshape(32, 2)], axis=1)]


@mma_s8.cuda
def _(e, a, b, x):
    return _emit_dots(e, (a, b, x), [e.constant(e.i32, MAGIC)] * 4)


@mma_s8_more.cuda
def _(e, a, b, x, dots):
    return _emit_dots(e, (a, b, x), [e.bitcast(dot, e.i32) for dot in dots])


def _emit_dots(e: Any, sides: tuple[Any, Any, Any], totals: list[Any]) -> list[Any]:
    for i in (0, 2):
        a, b, x = ([e.part(side, i), e.part(side, i + 1)] for side in sides)
        registers = a[0], b[0], a[1], b[1], *x, *totals
        totals = e.ptx(MMA_S8, ",".join(["=r"] * 4 + ["r"] * 10), *registers)
    return [e.bitcast(total, e.f32) for total in totals]


@operation("(Floats, Floats, Floats, float32[4]) -> float32[4]", of_warp=True)
def mma_tf32(a, b, x, totals):
    """Adds products of two rows with eight columns to ``totals``, in float32.

    Lane ``4 g + t`` passes its sixteen numbers ``a`` of row g, ``b`` of row g + 8, and of column g the sixteen at the
    same places, ``x``; all have 11 significant bits at most, which makes the products exact. It gets rows g and g + 8
    (the latter two) with columns ``2 t`` and ``2 t + 1``, summed over the quad. In Python a sum is rounded once.
    """
    sides = [np.array(side, np.float32).reshape(8, 64) for side in (a, b, x)]
    if any((side.view(np.uint32) & 0x1FFF).any() for side in sides):
        raise EmulatorError("the tensor cores' TF32 leaves out the last 13 bits of a number, of which some are not 0")
    before = np.array(totals, np.float32)
    rows, rows_below, columns = (side.astype(np.float64) for side in sides)
    # einsum, not a BLAS product, which may spread a NaN to other rows.
    upper = before[:, :2].reshape(8, 8) + np.einsum("rk,ck->rc", rows, columns)
    lower = before[:, 2:].reshape(8, 8) + np.einsum("rk,ck->rc", rows_below, columns)
    return _by_lane(upper.astype(np.float32), lower.astype(np.float32))


@mma_tf32.cuda
def _(e, a, b, x, totals):
    bits = [e.bitcast(side, e.vector_type(e.i32, 16)) for side in (a, b, x)]
    for i in range(0, 16, 2):
        rows, rows_below, columns = ([e.part(side, i), e.part(side, i + 1)] for side in bits)
        registers = rows[0], rows_below[0], rows[1], rows_below[1], *columns, *totals
        totals = e.ptx(MMA_TF32, ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4), *registers)
    return totals
