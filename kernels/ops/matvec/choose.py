"""Which config a product gets: a measured one where the GPU has a tuning table, else the rule's."""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np

from qmm.kernels.formats import Format
from qmm.kernels.ops.layout import COLUMN_TILES
from qmm.kernels.ops.matvec.config import Case, Config, Schedule, legal
from qmm.kernels.ops.op import Architecture
from qmm.kernels.ops.tiling import LINE_NBYTES, RING_NBYTES, SECTOR_NBYTES, Tiling
from qmm.kernels.tuning import Key, tuning_for

__all__ = ["choose", "rule"]

TWO_UNIT_STAGE_NBYTES: Final = 42 << 10
"""The largest stage in which a warp takes two units (n = 1: Q5_K, 4096x14336, with stages of 46,080 bytes 17.1 us, with
one unit 15.5; but Q4_1, 4096x4096, n = 4, with 41,984 bytes 7.7, with one 8.8)."""
FUSED_VALUES: Final = 1024
"""The most activations that a warp quantizes where each CTA quantizes them for itself: eight loads a thread, all in
flight at once."""
COPIED_NBYTES: Final = 48 << 10
"""The most activations that warps copy to shared memory, eight loads of 16 bytes a thread in flight; more are
fetched by one bulk copy (n = 8: Q2_K, 14336x4096, 19.3 us, copied by warps 22.1; but Q5_K, 4096x14336, 28.0, copied
26.1)."""
TWO_STAGE_K: Final = 8192
"""Weights a row beyond which two stages, not one, are filled first: see :func:`_first_stages`."""
THIRD_STAGE_WEIGHT_NBYTES: Final = 0.65
"""Bytes a weight from which a third stage is filled first: see :func:`_first_stages`."""
UNSPILLED_RUNS: Final = 2
"""Runs of a unit beyond which ptxas spills sooner: fewer units, rows or warps then."""
UNSPILLED_REGISTERS: Final = 12
"""Registers that a lane loads a unit and row. With so many (Q4_K, Q5_K) ptxas spills where a lane has four rows, with
more (Q3_K) also where there are 16 warps."""


@functools.lru_cache(maxsize=4096)
def choose(case: Case, architecture: Architecture) -> Schedule:
    """The schedule of a product: with the config measured on such a GPU for its shape or a similar one
    (:mod:`qmm.kernels.tuning`), else with that of :func:`rule`."""
    tuning = tuning_for(architecture)
    if tuning is not None:
        key = Key(case.block_format.name, case.columns, case.int8, case.alignment, case.fusible, case.mapped)
        measured = tuning.find(key, case.m, case.k)
        if measured is not None:
            config = Config(**measured.config)
            if not legal(config, case, architecture):
                return Schedule.of(case, config, architecture)
    return Schedule.of(case, rule(case, architecture), architecture)


def rule(case: Case, architecture: Architecture) -> Config:
    """A config for any product on any GPU.

    It follows what was measured on an H100: times below and at the constants are microseconds, of a weight 14336x4096
    unless another shape is given.
    """
    fit = _Fit(case, architecture)
    warps, lane_rows = _warps(fit), _lane_rows(fit)
    tiling = fit.beside_activations(warps, lane_rows, _most_units(fit, lane_rows), 2 if case.mapped else 3)
    # Two stages of two rows a lane and one unit still pay (n = 8: Q2_K, 4096x14336, 19.4, with activations in global
    # memory 27.2); of four rows a lane not (Q8_0 31.2, else 28.7).
    tiling = tiling or fit.beside_activations(warps, 2, 1, 2)
    x_shared = tiling is not None
    if tiling is None:
        tiling = _tiling_beside_nothing(fit, warps)
    # Few activations are quantized by each CTA (n = 4: Q8_0, 4096x4096, 13.4, else 12.6; Q3_K, 4096x14336, n = 1, by 8
    # warps 18.5, else 17.1; but n = 8, 256x640, 3.7, else 4.2).
    fused = x_shared and case.fusible and fit.exact and case.columns * case.k <= FUSED_VALUES * tiling.warps
    x = "global"
    if x_shared:
        x = "bulk" if architecture.bulk and case.activations.nbytes > COPIED_NBYTES else "copied"
    return Config(
        warps=tiling.warps,
        lane_rows=tiling.lane_rows,
        row_warps=tiling.row_warps,
        units=tiling.units,
        stages=tiling.stages,
        line=tiling.line,
        x="fused" if fused else x,
        first_stages=min(_first_stages(fit, tiling, fused), tiling.stages),
    )


def _warps(fit: _Fit) -> int:
    """Consumer warps where activations are in shared memory.

    Up to two columns 16. But 8 if 16 would not all have a unit (n = 1: Q8_0, 4864x896, 3.5, else 4.2; 640x1024 2.3,
    else 2.6), if registers are short, or if two columns are too many activations for the CTA to quantize (4096x14336:
    Q5_K 17.4, else 18.7; Q6_K 22.1, else 23.1; but Q8_0 26.8, else 26.5).
    """
    case, columns = fit.case, fit.columns
    if columns <= 2 and fit.exact and fit.roomy and fit.unit_registers <= UNSPILLED_REGISTERS:
        busy = fit.fills_warps(16) and (columns == 1 or columns * case.k <= 16 * FUSED_VALUES)
        return 16 if busy else 8
    return 4 if not case.int8 and columns * fit.unit_runs >= 32 else 8


def _lane_rows(fit: _Fit) -> int:
    """Rows of a lane: four if loads of activations are the limit, tiles of 32 rows still fill the GPU, and registers
    suffice (n = 8: Q4_K, when its units had 32 weights, 20.8, else 26.6; those of 64, today's, need too many)."""
    case = fit.case
    frugal = fit.unit_registers < UNSPILLED_REGISTERS and not fit.crowded and not case.mapped
    return 4 if fit.several and fit.fills(32) and frugal else 2


def _most_units(fit: _Fit, lane_rows: int) -> int:
    """The most units that a warp takes of a stage, if the stage stays small.

    Two (n = 1: Q4_K, when its units had 32 weights, 12.5, with one 13.9; but Q8_0, with stages that get large, 19.5,
    with one 18.7; and Q2_K, with rows too short for two units of 64, 15.0, with one 10.5). One where ptxas would spill:
    see UNSPILLED_RUNS; also with eight columns where a lane has four rows, or where unaligned fields are assembled from
    the words around them. From host memory four: bytes at the seam of two chunks are read twice, and larger chunks have
    fewer seams (n = 8 by n = 1: Q3_K 1.054, Q6_K 1.066 with three seams a row).
    """
    case = fit.case
    if fit.several and case.mapped:
        return 4
    unaligned = fit.columns == COLUMN_TILES[-1] and (lane_rows == 4 or fit.block_format.alignment < 4)
    spills = fit.unit_runs > UNSPILLED_RUNS and fit.columns > 1 and not case.int8
    return 1 if fit.crowded or unaligned or spills else 2


def _tiling_beside_nothing(fit: _Fit, warps: int) -> Tiling:
    """The tiling where activations stay in global memory. Their addresses take more registers: 4 warps where 8 would
    have too few."""
    enough = fit.case.int8 and fit.roomy and fit.unit_runs <= UNSPILLED_RUNS
    if fit.columns > 2 and not enough and not fit.block_format.short:
        warps = 4
    tiling = fit.tiling(0, warps, 2, 1)
    while tiling.shared_nbytes(fit.columns) > fit.architecture.shared_nbytes and warps > 4:
        warps //= 2
        tiling = fit.tiling(0, warps, 2, 1)
    return tiling


def _first_stages(fit: _Fit, tiling: Tiling, fused: bool) -> int:
    """Stages to fill before activations are loaded.

    * If a CTA has more than two tiles: all, where another kernel quantizes the activations (n = 8: Q8_0 29.1, else
      30.6); else two (n = 1: Q4_K 12.9, with three 13.5; Q5_K, which now gets three, 15.6, with one 16.6), but three
      from THIRD_STAGE_WEIGHT_NBYTES on, where bytes are the limit more than instructions (n = 1: Q8_0 22.6, Q6_K 18.0,
      with two 23.4 and 18.4).
    * If not: one (4096x4096, Q4_K: n = 4 7.1, n = 8 9.1, with two 8.1 and 9.2; Q3_K: 7.8 and 9.6, with two 8.5 and
      10.0; 4096x14336, Q5_K, n = 1 17.2, with two 18.0); but two for rows beyond TWO_STAGE_K, where another kernel
      quantizes fewer than eight columns (4096x14336, Q4_K: n = 2 15.3, with one 17.0; n = 4 15.9, with one 16.4; but n
      = 8 18.8, with one 18.4).
    * Three at least of a plain format (4096x4096, F16: n = 1 12.2, n = 8 14.4, with one 13.2 and 15.5).
    """
    block_format = fit.block_format
    first_stages = tiling.stages
    if fit.short(tiling):
        first_stages = 2 if fit.case.k > TWO_STAGE_K and not fused and fit.columns < COLUMN_TILES[-1] else 1
    elif fused:
        weight_nbytes = block_format.block_nbytes / block_format.block_weights
        first_stages = 2 if weight_nbytes < THIRD_STAGE_WEIGHT_NBYTES else 3
    return max(first_stages, 3) if block_format.plain else first_stages


class _Fit:
    """A case on a GPU: the quantities that the rule depends on, and the tilings that fit.

    Attributes:
        unit_runs: runs of 16 weights of a unit.
        unit_registers: registers that a lane loads a unit and row.
        exact: whether a CTA can quantize the activations as another kernel would: to int8, or for a plain format.
        roomy: whether a CTA has more shared memory than the ring of stages may take.
        several: whether int8 activations of more than two columns are multiplied.
        crowded: whether units of more than UNSPILLED_RUNS are multiplied by eight columns.
    """

    def __init__(self, case: Case, architecture: Architecture) -> None:
        self.case, self.architecture = case, architecture
        self.block_format, self.columns = case.block_format, case.columns
        self.x_nbytes = case.activations.nbytes
        self.unit_runs, self.unit_registers = case.block_format.runs, _registers(case.block_format)
        self.exact = case.int8 or case.block_format.plain
        self.roomy = architecture.shared_nbytes > RING_NBYTES
        self.several = self.columns > 2 and case.int8
        self.crowded = self.unit_runs > UNSPILLED_RUNS and self.columns == COLUMN_TILES[-1]

    def tiling(self, beside: int, warps: int, lane_rows: int, most: int) -> Tiling:
        """The tiling with as many stages as fit beside so many bytes of shared memory, and up to ``most`` units a warp
        if stages stay small; from host memory, where only the link counts, whole rows if they fit."""
        case = self.case
        tiles = self.row_warps(warps, 8 * lane_rows)
        line = LINE_NBYTES if case.mapped else SECTOR_NBYTES
        choices: dict[str, Any] = {"line": line, "warps": warps, "lane_rows": lane_rows, "row_warps": tiles}
        least = Tiling.of(self.block_format, case.alignment, 0, **choices)
        ring = least.ring_within(self.architecture.shared_nbytes - beside, self.columns)
        limit = ring // 2 if case.mapped else TWO_UNIT_STAGE_NBYTES
        for units in (4, 2):
            if units <= most:
                tried = Tiling.of(self.block_format, case.alignment, ring, units=units * least.units, **choices)
                small = tried.stage_nbytes <= min(limit, ring // 2)
                if small and tried.chunk_blocks <= self.block_format.blocks(case.k):
                    return tried
        return Tiling.of(self.block_format, case.alignment, max(0, ring), **choices)

    def beside_activations(self, warps: int, lane_rows: int, most: int, stages: int) -> Tiling | None:
        """The tiling beside the activations in shared memory, if there is room for so many stages."""
        tiling = self.tiling(self.x_nbytes, warps, lane_rows, most)
        room = self.architecture.shared_nbytes - self.x_nbytes
        return tiling if tiling.stages >= stages and tiling.shared_nbytes(self.columns) <= room else None

    def fills_warps(self, warps: int) -> bool:
        """Whether so many warps all have a unit to take, of one row or of several."""
        return self.row_warps(warps, 16) > 1 or self.steps() >= warps

    def fills(self, rows: int) -> bool:
        """Whether tiles of so many rows keep three quarters of the SMs busy."""
        return -(-self.case.m // rows) >= 0.75 * self.architecture.sms

    def short(self, tiling: Tiling) -> bool:
        """Whether no CTA gets more than two tiles."""
        return self.case.m <= 2 * tiling.rows * self.architecture.sms

    def steps(self) -> int:
        """The most warps that can share a row: each takes one unit of four neighbouring blocks."""
        return -(-self.block_format.blocks(self.case.k) // 4) * self.block_format.lanes

    def row_warps(self, warps: int, tile_rows: int) -> int:
        """Tiles of rows at once: more than one if a row is too short for all warps and there are enough rows."""
        row_warps = 1
        while (
            warps // (2 * row_warps) >= self.steps()
            and self.case.m >= 4 * self.architecture.sms * row_warps * tile_rows
        ):
            row_warps *= 2
        return row_warps


@functools.cache
def _registers(block_format: Format) -> int:
    """Registers that a lane loads a unit and row."""
    loaded = block_format.load(bytes(block_format.block_nbytes), 0)
    return sum(np.size(value) for value in loaded)
