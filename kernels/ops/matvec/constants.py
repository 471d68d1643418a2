"""The compile-time constants of the product kernel, and the kernel's description."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qmm.kernels.formats import Format
from qmm.kernels.lang.fields import FieldAccess
from qmm.kernels.ops.layout import COLUMN_TILES, ROOMY_RUNS
from qmm.kernels.ops.matvec.config import Schedule
from qmm.kernels.ops.tiling import PipelineConstants
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["MatvecConstants", "matvec_kernel"]


@dataclass(frozen=True)
class MatvecConstants(PipelineConstants):
    """The compile-time constants of the product kernel."""

    COLUMNS: int
    """Columns that are multiplied at once."""
    INT8: bool
    """Whether activations are int8, else float16."""
    SUMS: int
    """Sums of each scale block of activations: 0, 1, or one for each run."""
    RUN_NBYTES: int
    """Bytes of a run of activations, all columns."""
    X_NBYTES: int
    """Bytes of a scale block of activations, all columns, with scales and sums."""
    SCALE_BLOCKS: int
    """Scale blocks of a weight block, at least 1."""
    QUAD_SCALE_BLOCKS: int
    """Scale blocks of four weight blocks."""
    X_SHARED: bool
    """Whether activations are in shared memory."""
    X_BULK: bool
    """Whether one bulk copy copies them there."""
    FUSED: bool
    """Whether the CTA quantizes them for itself."""
    ROUNDS: int
    """Rounds of loads in flight at once, with FUSED."""
    FIRST_STAGES: int
    """Stages that are filled before activations are loaded."""
    PROGRAMMATIC: bool
    """Whether the kernel starts before its predecessor ends."""
    AT_ONCE: int
    """Runs whose products are added up before they are scaled."""
    RUN_MINIMA: bool
    """Whether two runs with one scale have different minima."""
    RUN_STEP: int
    """The distance between the runs of a lane, in runs, if it is the same for all and even; else 0."""
    SCALES_BY_PAIR: bool
    """Whether the scales of columns are loaded pair by pair: all at once, ptxas would spill."""
    SUMS_BY_PAIR: bool
    """The same of the sums."""
    ARRIVAL_BY_FULL: bool
    """Whether the branch before a stage's release depends on the address of its barrier, not of its data, or ptxas
    spills (Q2_K, sm_100)."""
    TOTALS: int
    """Running sums of a lane."""
    accumulate: Callable[..., Any]
    """The main loop's step: adds the products of a lane's runs to its sums."""
    store_totals: Callable[..., Any]
    """Stores a lane's sums to shared memory and clears them."""


def matvec_kernel(block_format: Format, schedule: Schedule) -> Kernel:
    """The product with up to ``schedule.activations.columns`` columns."""
    from qmm.kernels.ops.matvec import mainloop_fma, mainloop_s8, mainloop_tf32

    tiling, activations = schedule.tiling, schedule.activations
    columns, many_runs = activations.columns, block_format.runs > ROOMY_RUNS
    mainloop = mainloop_tf32 if block_format.short else mainloop_s8 if activations.int8 else mainloop_fma
    constants = MatvecConstants(
        **tiling.constants(block_format, schedule.bulk, product=True),
        COLUMNS=columns,
        INT8=activations.int8,
        SUMS=activations.sums,
        RUN_NBYTES=activations.run_nbytes,
        X_NBYTES=activations.block_nbytes,
        SCALE_BLOCKS=activations.spread,
        QUAD_SCALE_BLOCKS=block_format.block_weights // 8,
        X_SHARED=schedule.x_shared,
        X_BULK=schedule.config.x == "bulk",
        FUSED=schedule.fused,
        ROUNDS=max(1, 8 // columns),
        FIRST_STAGES=schedule.config.first_stages,
        PROGRAMMATIC=schedule.bulk,
        AT_ONCE=activations.at_once(block_format),
        RUN_MINIMA=activations.sums > 0 and block_format.run_minima,
        RUN_STEP=activations.run_step(block_format),
        SCALES_BY_PAIR=columns >= (16 >> many_runs >> (activations.sums > 0)),
        SUMS_BY_PAIR=columns == COLUMN_TILES[-1],
        ARRIVAL_BY_FULL=many_runs and block_format.has_minimum,
        TOTALS=mainloop.totals(tiling.lane_rows, columns),
        accumulate=mainloop.accumulate,
        store_totals=mainloop.store_totals,
    )
    mode = "int8" if activations.int8 else "f16"
    name = f"matvec_{block_format.name}_{columns}_{mode}_{tiling.alignment}"
    return _kernel(name, constants, tiling.threads, tiling.alignment)


@functools.cache
def _kernel(name: str, constants: MatvecConstants, threads: int, alignment: int) -> Kernel:
    """One kernel for each set of constants, however many schedules have it."""
    from qmm.kernels.ops.matvec.kernel import matvec

    return Kernel(name, matvec, constants, threads, FieldAccess(alignment, "shared"), shared=True)
