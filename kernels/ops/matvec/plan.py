"""Plans of products: ``y[n, m] = x[n, k] @ W[m, k]^T``.

More than eight columns are taken eight at a time, and the weights are read once for each eight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qmm.kernels.formats import Format
from qmm.kernels.ops.layout import COLUMN_TILES, Activations
from qmm.kernels.ops.matvec.choose import choose
from qmm.kernels.ops.matvec.config import Case, Schedule
from qmm.kernels.ops.matvec.constants import matvec_kernel
from qmm.kernels.ops.op import Architecture, At, LaunchSpec, Operand, WeightLayout, Work, alignment_of, rounded
from qmm.kernels.ops.quantize.plan import quantize_specs, store_specs

__all__ = ["NOTHING", "Product", "Region", "case_of", "plan", "scheduled"]

NEXT_OF_L2 = 6
"""One over this is the part of L2 that the next product's weights may take. It should last for the 3 us in which memory
would idle: on an H100 8 MB (Q4_K, 14336x4096, n = 1: 12.5 us with 6 or 8 MB, 14.4 with 12; Q8_0, 4096x4096: 7.9 with 8,
else 8.8)."""


class Region(NamedTuple):
    """The weight bytes to prefetch to L2 before a product starts: the first ``nbytes`` of each of ``rows`` rows, or
    pieces of joined rows, at a stride of ``row_nbytes``."""

    row_nbytes: int
    rows: int
    nbytes: int


NOTHING = Region(0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Product(Work):
    """The work of a product.

    Attributes:
        x: its activations.
        y: its results.
        quantized: how its activations lie in the workspace, None where each CTA quantizes them for itself.
        quantize_launches: how many launches quantize them; these come first.
        alias_range: x and y overlap where their addresses' difference, y - x, is between these two; both 0 if they may.
        prefetch_region: what another product may prefetch to L2 before this one starts.
        prefetches: the index of the launch that may prefetch for the next product; None where no weight is read.
    """

    x: Operand
    y: Operand
    quantized: Activations | None = None
    quantize_launches: int = 0
    alias_range: tuple[int, int] = (0, 0)
    prefetch_region: Region = NOTHING
    prefetches: int | None = None

    def overlaps(self, x: int, y: int) -> bool:
        """Whether arrays at these addresses share memory that the product reads and writes in no defined order."""
        least, most = self.alias_range
        return least < y - x < most


def plan(
    block_format: Format,
    m: int,
    k: int,
    weights: WeightLayout,
    x: Operand,
    y: Operand,
    int8: bool,
    architecture: Architecture,
    no_alias: bool = True,
) -> Product:
    """The work of a product.

    Args:
        block_format: of the weight.
        m: rows of the weight, at least 1.
        k: weights a row.
        weights: where the weight lies.
        x: activations ``(n, k)``, at least one row.
        y: results ``(n, m)``.
        int8: whether activations are quantized to int8, else to float16; those of a plain format are not quantized.
        architecture: of the GPU.
        no_alias: whether x and y do not overlap (:meth:`Product.overlaps`).

    Raises:
        ValueError: the operands' shapes are not ``(n, k)`` and ``(n, m)``, m or n is less than 1, k is no whole number
            of blocks, or the GPU has too little shared memory for any config.
    """
    n = x.rows
    if m < 1 or n < 1 or x.columns != k or (y.rows, y.columns) != (n, m):
        raise ValueError(
            f"x is {n} x {x.columns} and y is {y.rows} x {y.columns}; for a {m} x {k} weight x is n x {k} and y is "
            f"n x {m}, m and n at least 1"
        )
    if k == 0:
        return Product(tuple(store_specs(y, At("zeros"), 0, architecture)), x=x, y=y)
    schedule = choose(case_of(block_format, m, k, weights, x, int8), architecture)
    return scheduled(block_format, m, k, weights, x, y, schedule, architecture, no_alias)


def case_of(block_format: Format, m: int, k: int, weights: WeightLayout, x: Operand, int8: bool) -> Case:
    """What the schedule of a product depends on; arguments as for :func:`plan`."""
    int8 = int8 and not block_format.plain
    alignment = alignment_of(weights.alignment | block_format.row_nbytes(k))  # of every row
    return Case(block_format, m, k, min(x.rows, COLUMN_TILES[-1]), int8, alignment, _fusible(x), weights.mapped)


def scheduled(
    block_format: Format,
    m: int,
    k: int,
    weights: WeightLayout,
    x: Operand,
    y: Operand,
    schedule: Schedule,
    architecture: Architecture,
    no_alias: bool = True,
) -> Product:
    """The work of a product by a given schedule; arguments otherwise as for :func:`plan`."""
    activations, tiling, early = schedule.activations, schedule.tiling, architecture.bulk
    row_nbytes = block_format.row_nbytes(k)
    n, columns = x.rows, activations.columns
    area_nbytes = rounded(activations.nbytes)
    areas_nbytes = 0 if schedule.fused else -(-n // columns) * area_nbytes
    direct = no_alias and y.dense
    launches: list[LaunchSpec] = []
    if not schedule.fused:
        launches += quantize_specs(x, activations, At("workspace"), area_nbytes, architecture)
    ctas = min(architecture.sms, -(-m // tiling.rows))
    quantize_launches = len(launches)
    kernel = matvec_kernel(block_format, schedule)
    (first_slab, *_) = x.slabs
    for first in range(0, n, columns):
        source = At("x", first * first_slab.row_stride)
        if not schedule.fused:
            source = At("workspace", first // columns * area_nbytes)
        target = At("y", first * m * 4) if direct else At("workspace", areas_nbytes + first * m * 4)
        launch = LaunchSpec.of(
            kernel,
            ctas,
            shared_nbytes=schedule.shared_nbytes,
            early=early,
            weights=At("weights"),
            row_nbytes=row_nbytes,
            m=m,
            blocks=block_format.blocks(k),
            chunks=tiling.chunks(block_format, k),
            k=k,
            scale_blocks=activations.scale_blocks,
            x=source,
            x_stride=first_slab.row_stride,
            zeros=At("zeros"),
            n=min(columns, n - first),
            y=target,
            y_pitch=m,
            next_weights=0,
            next_row_nbytes=0,
            next_rows=0,
            next_nbytes=0,
        )
        launches.append(launch)
    prefetches = len(launches) - 1
    if not direct:
        launches += store_specs(y, At("workspace", areas_nbytes), 4, architecture)
    alias_range = (0, 0)
    if schedule.fused and direct:  # results may be stored before all of x is read
        (x_low, x_high), (y_low, y_high) = x.reach, y.reach
        alias_range = x_low - y_high, x_high - y_low
    region = NOTHING
    if early and not weights.mapped:  # host memory is not cached in L2
        region = _prefetch_region(row_nbytes, m, ctas, tiling.rows, architecture)
    return Product(
        tuple(launches),
        areas_nbytes + (0 if direct else n * m * 4),
        x=x,
        y=y,
        quantized=None if schedule.fused else activations,
        quantize_launches=quantize_launches,
        alias_range=alias_range,
        prefetch_region=region,
        prefetches=prefetches,
    )


def _fusible(x: Operand) -> bool:
    """Whether a CTA could quantize the activations, loading 16 bytes at a time."""
    (slab, *others) = x.slabs
    by_16 = x.aligned and slab.row_stride % 16 == 0 and x.columns % 4 == 0
    return not others and x.dtype == "float32" and slab.column_stride == 4 and by_16


def _prefetch_region(row_nbytes: int, m: int, ctas: int, rows: int, architecture: Architecture) -> Region:
    """The part of a weight that ``ctas`` CTAs read first, ``rows`` rows each: whole rows, and more of them if there is
    room, or else the beginning of each. Whole rows are joined into a piece for each CTA."""
    most = architecture.l2_nbytes // NEXT_OF_L2
    rows = min(m, max(ctas * rows, most // row_nbytes))
    nbytes = min(row_nbytes, most // rows)
    joined = -(-rows // ctas) if nbytes == row_nbytes else 1
    return Region(joined * row_nbytes, rows // joined, joined * nbytes)
