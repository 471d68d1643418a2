"""Which config a product gets: the one that was measured on such a GPU, or else a rule."""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np

from qmm.kernels.formats import Format
from qmm.kernels.ops.layout import COLUMN_TILES, WARPS
from qmm.kernels.ops.matvec.config import Case, Config, Schedule, legal
from qmm.kernels.ops.op import Architecture
from qmm.kernels.ops.tiling import LINE_NBYTES, RING_NBYTES, SECTOR_NBYTES, Tiling
from qmm.kernels.tuning import tuning_for

__all__ = ["choose", "dequantization_tiling", "rule"]

WIDE_NBYTES: Final = 42 << 10
"""The largest stage in which a warp takes two units at once (on an H100: Q5_K, 4096x14336, n = 1, with stages of 46,080
bytes 17.1, else 15.5; but Q4_1, 4096x4096, n = 4, with 41,984 bytes 7.7, else 8.8)."""
FUSED_VALUES: Final = 1024
"""The most activations that a warp quantizes, where each CTA does so for itself: eight loads of a thread, all under way
at once."""
DENSE: Final = 0.65
"""Bytes of a weight that are many: see :func:`rule`."""
LONG_ROW: Final = 8192
"""Activations of a row that are many: see :func:`rule`."""
BULK_NBYTES: Final = 48 << 10
"""The most activations that warps copy to shared memory, eight loads of 16 bytes a thread under way; more come by one
bulk copy (n = 8 on an H100: Q2_K, 14336x4096, 19.3, else 22.1 us; but Q5_K, 4096x14336, 28.0, else 26.1)."""


@functools.lru_cache(maxsize=4096)
def choose(case: Case, architecture: Architecture) -> Schedule:
    """The schedule of a product: with the config that was measured for it, or for one of about its size, on such a GPU
    (:mod:`qmm.kernels.tuning`); else by :func:`rule`."""
    tuning = tuning_for(architecture)
    if tuning is not None:
        key = case.block_format.name, case.columns, case.int8, case.alignment, case.fusible, case.mapped
        measured = tuning.find(key, case.m, case.k)
        if measured is not None:
            config = Config(**measured.config)
            if not legal(config, case, architecture):
                return Schedule.of(case, config, architecture)
    return Schedule.of(case, rule(case, architecture), architecture)


def rule(case: Case, architecture: Architecture) -> Config:
    """A config for any product on any GPU, by what was measured on an H100 (figures: us, 14336x4096).

    * Up to two columns, 16 warps with two rows a lane, or 8 where more would have nothing to do (n = 1 on an H100:
      Q8_0, 4864x896, 3.5, else 4.2; 640x1024 2.3, else 2.6), or no registers, or with two columns do not quantize
      (4096x14336: Q5_K 17.4, else 18.7; Q6_K 22.1, else 23.1; but Q8_0 26.8, else 26.5); beyond, where the loads of
      activations are the limit, 8 warps with four rows a lane, if m fills the GPU so and there are registers for it
      (n = 8: Q4_K 20.8, else 26.6, when its units were of 32 weights; of 64 they are too large for four rows).
    * Two units a warp and stage where a stage stays small (n = 1: Q4_K, of 32 weights, 12.5, else 13.9); one where
      it would get large (Q8_0 18.7, else 19.5) or the row is too short for two (Q2_K, of 64, 10.5, else
      15.0).
    * Each CTA quantizes the activations for itself, if they are few for its warps (n = 4 on an H100: Q8_0,
      4096x4096, 13.4, else 12.6; Q3_K, 4096x14336, n = 1, of 8 warps 18.5, else 17.1; but n = 8, 256x640 3.7, else
      4.2).
    * What is filled before activations are asked for, all on an H100: where a CTA has more than two tiles, all
      stages if another kernel quantizes the activations (n = 8: Q8_0 29.1, else 30.6); else two (n = 1: Q5_K 15.6, with
      one 16.6; Q4_K 12.9, with three 13.5), or three of a dense format, which instructions limit less (n = 1: Q8_0
      22.6, Q6_K 18.0, with two 23.4 and 18.4). Where it has not, one (4096x4096, Q4_K: n = 4 7.1, n = 8 9.1, with
      two 8.1 and 9.2; Q3_K: 7.8 and 9.6, with two 8.5 and 10.0; 4096x14336, Q5_K, n = 1 17.2, with two 18.0); or
      two if rows are long, another kernel quantizes, and there are fewer than eight columns (4096x14336, Q4_K: n =
      2 15.3, with one 17.0; n = 4 15.9, with one 16.4; but n = 8 18.8, with one 18.4). Of numbers always three at
      least (4096x4096, F16: n = 1 12.2, n = 8 14.4, with one 13.2 and 15.5).
    * From host memory up to four units, so that few parts of a row share 32 bytes, which are then read twice (n = 8
      on an H100, 14336x4096, in parts of n = 1: Q3_K 1.054, Q6_K 1.066, where three ends a row do).
    * Activations in shared memory if three stages have room beside them (two for mapped weights), or two of two
      rows a lane and one unit (n = 8 on an H100: Q2_K, 4096x14336, 19.4, else 27.2; but Q8_0 with two of four rows
      a lane 31.2, else 28.7).
    """
    block_format, columns, int8 = case.block_format, case.columns, case.int8
    fit = _Fit(case, architecture)
    roomy = architecture.shared_nbytes > RING_NBYTES
    # With four runs or more of each row at once (Q2_K, Q3_K, Q4_K) ptxas spills sooner: they take less in several
    # ways.
    many = block_format.runs > 2
    crowded = many and columns == COLUMN_TILES[-1]
    warps = 8
    if columns <= 2 and (int8 or block_format.plain) and roomy and _registers(block_format) <= 12:
        busy = fit.fills_warps(16) and (columns == 1 or columns * case.k <= 16 * FUSED_VALUES)
        warps = 16 if busy else 8
    elif not int8 and columns * block_format.runs >= 32:
        warps = 4
    several = columns > 2 and int8
    frugal = _registers(block_format) < 12 and not crowded and not case.mapped
    lane_rows = 4 if several and fit.fills(32) and frugal else 2
    # So it does with eight columns of four rows, or where a block's fields are put together from words around them.
    pieced = columns == COLUMN_TILES[-1] and (lane_rows == 4 or block_format.alignment < 4)
    most = 1 if crowded or pieced or (many and columns > 1 and not int8) else 2
    if several and case.mapped:
        most = 4

    tiling = fit.beside_activations(warps, lane_rows, most, 2 if case.mapped else 3)
    tiling = tiling or fit.beside_activations(warps, 2, 1, 2)
    x_shared = tiling is not None
    if tiling is None:
        # The activations stay in global memory, whose addresses take more registers: where 8 warps would have too
        # few, there are 4.
        warps = 4 if columns > 2 and not (int8 and roomy and not many) and not block_format.short else warps
        tiling = fit.tiling(0, warps, 2, 1)
        while tiling.shared_nbytes(columns) > architecture.shared_nbytes and warps > 4:  # F32 where a CTA has 99 KiB
            warps //= 2
            tiling = fit.tiling(0, warps, 2, 1)
    fused = x_shared and case.fusible and (int8 or block_format.plain)
    fused = fused and columns * case.k <= FUSED_VALUES * tiling.warps
    first_stages = tiling.stages
    if fit.short(tiling):
        first_stages = 2 if case.k > LONG_ROW and not fused and columns < COLUMN_TILES[-1] else 1
    elif fused:
        first_stages = 2 if block_format.block_nbytes < DENSE * block_format.block_weights else 3
    if block_format.plain:
        first_stages = max(first_stages, 3)
    x = "global"
    if x_shared:
        x = "bulk" if architecture.bulk and case.activations.nbytes > BULK_NBYTES else "copied"
    return Config(
        warps=tiling.warps,
        lane_rows=tiling.lane_rows,
        row_warps=tiling.row_warps,
        units=tiling.units,
        stages=tiling.stages,
        line=tiling.line,
        x="fused" if fused else x,
        first_stages=min(first_stages, tiling.stages),
    )


class _Fit:
    """Tilings that fit a case on a GPU."""

    def __init__(self, case: Case, architecture: Architecture) -> None:
        self.case, self.architecture = case, architecture
        self.block_format, self.columns = case.block_format, case.columns
        self.x_nbytes = case.activations.nbytes

    def tiling(self, beside: int, warps: int, lane_rows: int, most: int) -> Tiling:
        """The tiling with as many stages as there is room for beside so many bytes, and up to ``most`` units a warp
        where stages are small; from host memory, where only the link counts, whole rows if they fit."""
        case = self.case
        tiles = self.row_warps(warps, 8 * lane_rows)
        line = LINE_NBYTES if case.mapped else SECTOR_NBYTES
        choices: dict[str, Any] = {"line": line, "warps": warps, "lane_rows": lane_rows, "row_warps": tiles}
        least = Tiling.of(self.block_format, case.alignment, 0, **choices)
        ring = least.ring_within(self.architecture.shared_nbytes - beside, self.columns)
        limit = ring // 2 if case.mapped else WIDE_NBYTES
        for units in (4, 2):
            if units <= most:
                tried = Tiling.of(self.block_format, case.alignment, ring, units=units * least.units, **choices)
                small = tried.stage_nbytes <= min(limit, ring // 2)
                if small and tried.chunk_blocks <= self.block_format.blocks(case.k):
                    return tried
        return Tiling.of(self.block_format, case.alignment, max(0, ring), **choices)

    def beside_activations(self, warps: int, lane_rows: int, most: int, stages: int) -> Tiling | None:
        """The tiling beside all activations of a row, if there is room for so many stages."""
        tiling = self.tiling(self.x_nbytes, warps, lane_rows, most)
        room = self.architecture.shared_nbytes - self.x_nbytes
        return tiling if tiling.stages >= stages and tiling.shared_nbytes(self.columns) <= room else None

    def fills_warps(self, warps: int) -> bool:
        """Whether each of so many warps has a unit to take, of a row or of several rows at once."""
        return self.row_warps(warps, 16) > 1 or self.steps() >= warps

    def fills(self, rows: int) -> bool:
        """Whether tiles of so many rows keep three quarters of the SMs busy."""
        return -(-self.case.m // rows) >= 0.75 * self.architecture.sms

    def short(self, tiling: Tiling) -> bool:
        """Whether no CTA gets more than two tiles."""
        return self.case.m <= 2 * tiling.rows * self.architecture.sms

    def steps(self) -> int:
        """How many warps share a row at most: each takes one unit of four neighbouring blocks."""
        return -(-self.block_format.blocks(self.case.k) // 4) * self.block_format.lanes

    def row_warps(self, warps: int, tile_rows: int) -> int:
        """Tiles at once: more than one where a row is too short for all warps, and rows are many."""
        row_warps = 1
        while (
            warps // (2 * row_warps) >= self.steps()
            and self.case.m >= 4 * self.architecture.sms * row_warps * tile_rows
        ):
            row_warps *= 2
        return row_warps


@functools.lru_cache(maxsize=4096)
def dequantization_tiling(block_format: Format, alignment: int, architecture: Architecture) -> Tiling:
    """The tiling of the dequantization: of as many warps as leave room for two stages, and have registers."""
    warps = WARPS if block_format.runs <= 4 else WARPS // 2
    least = Tiling.of(block_format, alignment, 0)
    while warps > 4 and least.shared_nbytes(0) > architecture.shared_nbytes:
        warps //= 2
        least = Tiling.of(block_format, alignment, 0, warps=warps)
    return Tiling.of(block_format, alignment, least.ring_within(architecture.shared_nbytes, 0), warps=warps)


@functools.cache
def _registers(block_format: Format) -> int:
    """What a lane loads of a row at once. From 12 on (Q3_K, Q4_K, Q5_K) ptxas spills with four rows, beyond (Q3_K) with
    16 warps too."""
    loaded = block_format.load(bytes(block_format.block_nbytes), 0)
    return sum(np.size(value) for value in loaded)
