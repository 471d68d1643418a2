"""How kernels that read weights on the GPU are cut: which thread takes what, and how bytes pass through shared memory.

Plain numbers, which the kernels are specialized with and the host launches them by. Nothing here imports Numba, so a
kernel that was compiled before is found and launched without it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qmm.kernels.formats import Format

__all__ = [
    "BARRIERS_NBYTES",
    "BLOCK",
    "COLUMN_TILES",
    "PRODUCERS",
    "SHARED_NBYTES",
    "WARPS",
    "ZERO_NBYTES",
    "Activations",
    "Machine",
    "Schedule",
    "Tiling",
]

BLOCK = 32
"""Activations that share one scale (:mod:`qmm.kernels.ops.quantize`)."""
COLUMN_TILES = (1, 2, 4, 8)
"""Column counts that a kernel is compiled for; others take the next one and leave its last columns out."""
WARPS = 16
"""Warps of a block of those kernels that do not read weights."""
PRODUCERS = 3
"""Warps that copy weights. One alone takes 50 cycles for each row of a stage, and was the limit: Q4_K, 14336x4096,
n = 1 on an H200: 17.7 us with one, 14.7 with three."""
SHARED_NBYTES = 48 << 10
"""What a block may have of shared memory without asking for more."""
BARRIERS_NBYTES = 256
"""Shared memory for barriers, at its beginning."""
ZERO_NBYTES = 4096
"""Zeros that stand for blocks past the end of a row, and for activations that a lane leaves out."""
RING_NBYTES = 160 << 10
"""The most shared memory of a ring. What is under way hides the latency of memory, and what is in the ring already when
the activations arrive hides the time that they take (4096x14336, n = 1 on an H100: Q4_K 13.1, with 144 KB 14.2; but
Q6_K 20.2, with 200 KB 22.2)."""
SECTOR_NBYTES = 32
"""Bytes keep their place modulo this on their way from the GPU's memory: what moves is sectors. Where the halves of one
went to different sectors of shared memory, it was transferred twice (cp.async, Q6_K, 4096x4096, mapped: 647,168 sectors
read instead of 430,080)."""
LINE_NBYTES = 128
"""The same on the way from host memory: a request asks for what lies in one such line of shared memory, and split ones
fill the link less (H100, modulo 32: Q4_K 95% of what a plain reading gets, Q6_K 72%)."""
WIDE_NBYTES = 42 << 10
"""The largest stage in which a warp takes two units at once (on an H100: Q5_K, 4096x14336, n = 1, with stages of 46,080
bytes 17.1, else 15.5; but Q4_1, 4096x4096, n = 4, with 41,984 bytes 7.7, else 8.8)."""
FUSED_VALUES = 1024
"""The most activations that a warp quantizes, where each block does so for itself: eight loads of a thread, all under
way at once."""
DENSE = 0.65
"""Bytes of a weight that are many: see :meth:`Schedule.of`."""
LONG_ROW = 8192
"""Activations of a row that are many: see :meth:`Schedule.of`."""
BULK_NBYTES = 48 << 10
"""The most activations that warps copy to shared memory, eight loads of 16 bytes a thread under way; more come by one
bulk copy (n = 8 on an H100: Q2_K, 14336x4096, 19.3, else 22.1 us; but Q5_K, 4096x14336, 28.0, else 26.1)."""


@dataclass(frozen=True)
class Machine:
    """What a schedule depends on of a GPU.

    Attributes:
        multiprocessors: how many it has.
        shared_nbytes: the most shared memory of a block.
        bulk: whether it makes bulk copies and starts kernels before their predecessors end (sm_90 and later).
    """

    multiprocessors: int
    shared_nbytes: int
    bulk: bool


@dataclass(frozen=True)
class Activations:
    """Where the activations of up to ``columns`` columns lie, once quantized, in one piece of memory.

    First the values, ``(scale blocks, 2, columns, 16)`` int8 or float16, then float32 scales ``(scale blocks,
    columns)``, then the sums of each block's or run's values, ``(sums, scale blocks, columns)`` float32. A scale block
    is 32 values. Those of four weight blocks, which a quad of lanes takes at once, alternate: weight block ``4 g + t``
    of ``s`` scale blocks has the j-th of them at ``(g * s + j) * 4 + t``. So a quad reads neighbouring words.
    """

    columns: int
    int8: bool
    sums: int

    @classmethod
    def of(cls, block_format: Format, columns: int, int8: bool) -> Activations:
        """Those of a format: sums if it has minima, one of each block where its runs share them in pairs."""
        sums = 1 if block_format.pairs and not block_format.run_minima else 2
        return cls(columns, int8, sums if int8 and block_format.has_minimum else 0)

    @property
    def run_nbytes(self) -> int:
        """Bytes of the values of a run, all columns."""
        return self.columns * (16 if self.int8 else 32)

    def at_once(self, block_format: Format) -> int:
        """Runs whose products are added up before they are scaled."""
        return 2 if self.int8 and block_format.pairs else 1

    def run_step(self, block_format: Format) -> int:
        """The format's, unless lanes that read zeros instead of activations would reach past the zeros with it."""
        at_once = self.at_once(block_format)
        step = block_format.run_step(at_once)
        reach = 4 * step * (block_format.runs // at_once - 1) * self.run_nbytes
        return step if 64 + reach + 2 * self.run_nbytes <= ZERO_NBYTES else 0

    def nbytes(self, scale_blocks: int) -> int:
        """All of it, for rows of so many scale blocks."""
        return scale_blocks * (2 * self.run_nbytes + 4 * self.columns * (1 + self.sums))


def scale_blocks_of(block_format: Format, k: int) -> int:
    """Scale blocks of a row of ``k`` activations, filled up to four weight blocks, and to four: then all that belongs
    to them is a multiple of 16 bytes."""
    weights = -(-block_format.blocks(k) // 4) * 4 * block_format.block_weights
    return -(-weights // (4 * BLOCK)) * 4


@dataclass(frozen=True)
class Tiling:
    """How the warps of a block share the rows of a format.

    The block takes ``row_warps`` tiles of ``8 * lane_rows`` rows at once, ``k_warps`` warps to a tile. A warp takes one
    unit (what a lane loads at once) of four neighbouring blocks in each row, the next warp the next unit. A chunk, what
    a stage holds of each row, gives every warp ``units`` of these steps.
    """

    warps: int
    lane_rows: int
    row_warps: int
    units: int
    chunk_blocks: int
    line: int
    pitch: int
    stages: int
    alignment: int

    @classmethod
    def of(
        cls,
        block_format: Format,
        alignment: int,
        ring_nbytes: int,
        line: int = SECTOR_NBYTES,
        warps: int = WARPS,
        lane_rows: int = 2,
        row_warps: int = 1,
        units: int = 1,
    ) -> Tiling:
        """The tiling of a format whose tensor starts at a multiple of ``alignment`` bytes, in a ring of that size."""
        k_warps = warps // row_warps
        units = max(units, -(-block_format.lanes // k_warps))  # a chunk is whole quads of blocks
        chunk_blocks = 4 * k_warps * units // block_format.lanes
        alignment = min(alignment, block_format.alignment)
        pitch = _pitch(block_format, chunk_blocks * block_format.block_nbytes, line, alignment)
        stages = max(2, min(8, ring_nbytes // (8 * lane_rows * row_warps * pitch)))
        return cls(warps, lane_rows, row_warps, units, chunk_blocks, line, pitch, stages, alignment)

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of_dequantization(cls, block_format: Format, alignment: int, machine: Machine) -> Tiling:
        """The tiling of the dequantization: of as many warps as leave room for two stages, and have registers."""
        warps = WARPS if block_format.runs <= 4 else WARPS // 2
        least = cls.of(block_format, alignment, 0)
        while warps > 4 and least.shared_nbytes(0) > machine.shared_nbytes:
            warps //= 2
            least = cls.of(block_format, alignment, 0, warps=warps)
        return cls.of(block_format, alignment, least.ring_within(machine.shared_nbytes, 0), warps=warps)

    def ring_within(self, shared_nbytes: int, columns: int) -> int:
        """What there is for the ring where a block has so much shared memory."""
        return min(RING_NBYTES, shared_nbytes - self.shared_nbytes(columns) + self.stages * self.stage_nbytes)

    @property
    def k_warps(self) -> int:
        """Warps that share a tile."""
        return self.warps // self.row_warps

    def chunks(self, block_format: Format, k: int) -> int:
        """Chunks of a row of ``k`` weights."""
        return -(-block_format.blocks(k) // self.chunk_blocks)

    @property
    def threads(self) -> int:
        """Threads of a block: the warps that multiply, those that copy, one that adds up."""
        return 32 * (self.warps + PRODUCERS + 1)

    @property
    def rows(self) -> int:
        """Rows that a block takes at once."""
        return 8 * self.lane_rows * self.row_warps

    @property
    def stage_nbytes(self) -> int:
        """Shared memory of a stage."""
        return self.rows * self.pitch

    def shared_nbytes(self, columns: int) -> int:
        """Shared memory up to the end of the ring: barriers, zeros, twice the sums of the warps, stages.

        The last 16: unaligned loads look up to 4 bytes past a field, copies of activations end at a multiple of 16.
        """
        sums = 2 * self.k_warps * self.rows * columns * 4
        return BARRIERS_NBYTES + ZERO_NBYTES + sums + self.stages * self.stage_nbytes + 16

    def constants(self, block_format: Format, bulk: bool, product: bool) -> dict[str, Any]:
        """What kernels that stage are specialized with; ``bulk`` where the GPU has bulk copies."""
        return {
            **block_format.constants(product),
            "ALIGNMENT": self.alignment,
            "BARRIERS_NBYTES": BARRIERS_NBYTES,
            "BULK": bulk,
            "CHUNK_BLOCKS": self.chunk_blocks,
            "CHUNK_NBYTES": self.chunk_blocks * block_format.block_nbytes,
            "EDGE": min(4, self.alignment),
            "K_WARPS": self.k_warps,
            "LANE_ROWS": self.lane_rows,
            "LINE": self.line,
            "PITCH": self.pitch,
            "PRODUCERS": PRODUCERS,
            "QUAD_SCALE_BLOCKS": block_format.block_weights // 8,
            "ROWS": self.rows,
            "SCALE_BLOCKS": max(1, block_format.block_weights // BLOCK),
            "STAGES": self.stages,
            "STAGE_NBYTES": self.stage_nbytes,
            "TILE_ROWS": 8 * self.lane_rows,
            "UNITS": self.units,
            "WARPS": self.warps,
            "ZERO_NBYTES": ZERO_NBYTES,
        }


@dataclass(frozen=True)
class Schedule:
    """How a product with a few columns runs: everything that its kernel is specialized with, beside the format.

    Attributes:
        tiling: of the weight.
        activations: how they are stored.
        x_shared: whether they are in shared memory; where they do not fit, they are read from global memory.
        x_bulk: whether they come there by one bulk copy.
        fused: whether each block quantizes them for itself, in its shared memory.
        first_stages: how many are filled before the activations are asked for, which queue up behind them.
        bulk: as :class:`Machine` has it.
    """

    tiling: Tiling
    activations: Activations
    x_shared: bool
    x_bulk: bool
    fused: bool
    first_stages: int
    bulk: bool

    def shared_nbytes(self, scale_blocks: int) -> int:
        """Shared memory of a block, for rows of so many scale blocks."""
        x_nbytes = self.activations.nbytes(scale_blocks) if self.x_shared else 0
        return self.tiling.shared_nbytes(self.activations.columns) + x_nbytes

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(
        cls,
        block_format: Format,
        m: int,
        k: int,
        n: int,
        int8: bool,
        alignment: int,
        fusible: bool,
        mapped: bool,
        machine: Machine,
    ) -> Schedule:
        """The schedule for up to eight columns, by what was measured on an H200 (figures: us, 14336x4096).

        * Up to two columns, 16 warps with two rows a lane, or 8 where more would have nothing to do (n = 1 on an H100:
          Q8_0, 4864x896, 3.5, else 4.2; 640x1024 2.3, else 2.6), or no registers, or with two columns do not quantize
          (4096x14336: Q5_K 17.4, else 18.7; Q6_K 22.1, else 23.1; but Q8_0 26.8, else 26.5); beyond, where the loads of
          activations are the limit, 8 warps with four rows a lane, if m fills the GPU so and there are registers for it
          (n = 8: Q4_K 20.8, else 26.6, when its units were of 32 weights; of 64 they are too large for four rows).
        * Two units a warp and stage where a stage stays small (n = 1: Q4_K, of 32 weights, 12.5, else 13.9); one where
          it would get large (Q8_0 18.7, else 19.5) or the row is too short for two (Q2_K, of 64, 10.5, else
          15.0).
        * Each block quantizes the activations for itself, if they are few for its warps (n = 4 on an H100: Q8_0,
          4096x4096, 13.4, else 12.6; Q3_K, 4096x14336, n = 1, of 8 warps 18.5, else 17.1; but n = 8, 256x640 3.7, else
          4.2).
        * What is filled before activations are asked for, all on an H100: where a block has more than two tiles, all
          stages if another kernel makes the activations (n = 8: Q8_0 29.1, else 30.6); else two (n = 1: Q5_K 15.6, with
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

        Args:
            block_format: of the weight.
            m: rows.
            k: weights a row.
            n: columns, 1 to 8.
            int8: whether the activations are int8.
            alignment: that the weight's address divides by.
            fusible: whether a block could quantize them: float32, rows of whole multiples of 16 bytes, and at such.
            mapped: whether the weight lies in host memory.
            machine: the GPU.
        """
        columns = next(tile for tile in COLUMN_TILES if tile >= n)
        activations = Activations.of(block_format, columns, int8)
        case = _Case(block_format, m, k, activations, alignment, mapped, machine)
        roomy = machine.shared_nbytes > RING_NBYTES
        # With four runs or more of each row at once (Q2_K, Q3_K, Q4_K) ptxas spills sooner: they take less in several
        # ways.
        many = block_format.runs > 2
        crowded = many and columns == COLUMN_TILES[-1]
        warps = 8
        if columns <= 2 and (int8 or block_format.plain) and roomy and _registers(block_format) <= 12:
            busy = case.fills_warps(16) and (columns == 1 or columns * k <= 16 * FUSED_VALUES)
            warps = 16 if busy else 8
        elif not int8 and columns * block_format.runs >= 32:
            warps = 4
        several = columns > 2 and int8
        frugal = _registers(block_format) < 12 and not crowded and not mapped
        lane_rows = 4 if several and case.fills(32) and frugal else 2
        # So it does with eight columns of four rows, or where a block's fields are put together from words around them.
        pieced = columns == COLUMN_TILES[-1] and (lane_rows == 4 or block_format.alignment < 4)
        most = 1 if crowded or pieced or (many and columns > 1 and not int8) else 2
        if several and mapped:
            most = 4

        made = case.beside_activations(warps, lane_rows, most, 2 if mapped else 3)
        made = made or case.beside_activations(warps, 2, 1, 2)
        x_shared = made is not None
        if made is None:
            # The activations stay in global memory, whose addresses take more registers: where 8 warps would have too
            # few, there are 4.
            warps = 4 if columns > 2 and not (int8 and roomy and not many) and not block_format.short else warps
            made = case.tiling(0, warps, 2, 1)
            while made.shared_nbytes(columns) > machine.shared_nbytes and warps > 4:  # F32 where a block has 99 KiB
                warps //= 2
                made = case.tiling(0, warps, 2, 1)
        fused = x_shared and fusible and (int8 or block_format.plain) and columns * k <= FUSED_VALUES * made.warps
        x_bulk = x_shared and machine.bulk and not fused and case.x_nbytes > BULK_NBYTES
        first_stages = made.stages
        if case.short(made):
            first_stages = 2 if k > LONG_ROW and not fused and columns < COLUMN_TILES[-1] else 1
        elif fused:
            first_stages = 2 if block_format.block_nbytes < DENSE * block_format.block_weights else 3
        if block_format.plain:
            first_stages = max(first_stages, 3)
        first_stages = min(first_stages, made.stages)
        return cls(made, activations, x_shared, x_bulk, fused, first_stages, machine.bulk)


class _Case(NamedTuple):
    """A product and a machine, for which tilings are tried."""

    block_format: Format
    m: int
    k: int
    activations: Activations
    alignment: int
    mapped: bool
    machine: Machine

    @property
    def columns(self) -> int:
        """Columns of the activations."""
        return self.activations.columns

    @property
    def x_nbytes(self) -> int:
        """Bytes of the activations."""
        return self.activations.nbytes(scale_blocks_of(self.block_format, self.k))

    def tiling(self, beside: int, warps: int, lane_rows: int, most: int) -> Tiling:
        """The tiling with as many stages as there is room for beside so many bytes, and up to ``most`` units a warp
        where stages are small; from host memory, where only the link counts, whole rows if they fit."""
        tiles = _row_warps(self.block_format, self.m, self.k, warps, 8 * lane_rows, self.machine.multiprocessors)
        line = LINE_NBYTES if self.mapped else SECTOR_NBYTES
        of_format = functools.partial(Tiling.of, self.block_format, self.alignment)
        cut = functools.partial(of_format, line=line, warps=warps, lane_rows=lane_rows, row_warps=tiles)
        least = cut(0)
        ring = least.ring_within(self.machine.shared_nbytes - beside, self.columns)
        limit = ring // 2 if self.mapped else WIDE_NBYTES
        for units in (4, 2):
            if units <= most:
                made = cut(ring, units=units * least.units)
                small = made.stage_nbytes <= min(limit, ring // 2)
                if small and made.chunk_blocks <= self.block_format.blocks(self.k):
                    return made
        return cut(max(0, ring))

    def beside_activations(self, warps: int, lane_rows: int, most: int, stages: int) -> Tiling | None:
        """The tiling beside all activations of a row, if there is room for so many stages."""
        made = self.tiling(self.x_nbytes, warps, lane_rows, most)
        room = self.machine.shared_nbytes - self.x_nbytes
        return made if made.stages >= stages and made.shared_nbytes(self.columns) <= room else None

    def fills_warps(self, warps: int) -> bool:
        """Whether each of so many warps has a unit to take, of a row or of several rows at once."""
        several = _row_warps(self.block_format, self.m, self.k, warps, 16, self.machine.multiprocessors) > 1
        return several or _steps(self.block_format, self.k) >= warps

    def fills(self, rows: int) -> bool:
        """Whether tiles of so many rows keep three quarters of the multiprocessors busy."""
        return -(-self.m // rows) >= 0.75 * self.machine.multiprocessors

    def short(self, made: Tiling) -> bool:
        """Whether no block gets more than two tiles."""
        return self.m <= 2 * made.rows * self.machine.multiprocessors


def _registers(block_format: Format) -> int:
    """What a lane loads of a row at once. From 12 on (Q3_K, Q4_K, Q5_K) ptxas spills with four rows, beyond (Q3_K) with
    16 warps too."""
    loaded = block_format.load(bytes(block_format.block_nbytes), 0)
    return sum(np.size(value) for value in loaded)


def _steps(block_format: Format, k: int) -> int:
    """How many warps share a row of ``k`` weights at most: each takes one unit of four neighbouring blocks."""
    return -(-block_format.blocks(k) // 4) * block_format.lanes


def _row_warps(block_format: Format, m: int, k: int, warps: int, tile_rows: int, multiprocessors: int) -> int:
    """Tiles that a block takes at once: more than one where a row is too short for all warps, and rows are many."""
    steps = _steps(block_format, k)
    row_warps = 1
    while warps // (2 * row_warps) >= steps and m >= 4 * multiprocessors * row_warps * tile_rows:
        row_warps *= 2
    return row_warps


@functools.lru_cache(maxsize=4096)
def _pitch(block_format: Format, chunk_nbytes: int, line: int, alignment: int) -> int:
    """Bytes from one row of a stage to the next, whole lines, chosen so that lanes meet in few memory banks."""
    least = -(-(line - 1 + chunk_nbytes) // line) * line
    return min(
        (least + line * i for i in range(128 // line)), key=lambda pitch: _cycles(block_format, pitch, alignment)
    )


def _cycles(block_format: Format, pitch: int, alignment: int) -> int:
    """Cycles that a wide load of a warp takes: lane ``4 g + t`` reads row g, block t."""
    width = 16 if alignment >= 16 else 4
    together = 32 * 4 // width
    addresses = [(lane >> 2) * pitch + (lane & 3) * block_format.block_nbytes for lane in range(32)]
    cycles = 0
    for start in range(0, 32, together):
        banks: dict[int, set[int]] = {}
        for address in addresses[start : start + together]:
            for word in range(address // 4, (address + width) // 4):
                banks.setdefault(word % 32, set()).add(word)
        cycles += max(map(len, banks.values()))
    return cycles
