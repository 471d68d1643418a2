"""How a product walks a weight on the GPU: which thread takes what, and how bytes pass through shared memory.

This is geometry, in plain numbers: :mod:`qmm.kernels.matvec` is the kernel that follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmm.kernels.formats import Format

__all__ = ["BLOCK", "COLUMN_TILES", "SHARED_NBYTES", "WARPS", "ZERO_NBYTES", "Activations", "Tiling"]

BLOCK = 32
"""Activations that share a scale."""
SHARED_NBYTES = 48 * 1024
"""What a block may have of shared memory without asking for more."""

COLUMN_TILES = (1, 2, 4, 8)
"""Column counts that a kernel is compiled for; others take the next one and leave its last columns out."""
WARPS = 16
"""Warps of a block."""
BARRIERS_NBYTES = 256
"""Shared memory for barriers, at its beginning."""
PRODUCERS = 3
"""Warps that copy."""
ZERO_NBYTES = 4096
"""Zeros that stand for blocks past the end of a row, and for activations that a lane leaves out."""


@dataclass(frozen=True)
class Activations:
    """Where the activations of up to ``columns`` columns lie, once quantized, in one piece of memory.

    First the values, ``(scale blocks, 2, columns, 16)`` int8 or float16, then float32 scales ``(scale blocks,
    columns)``, then for int8 the scaled sums of each run, ``(2, scale blocks, columns)`` float32. A scale block is 32
    values. Four weight blocks that a quad of lanes takes at once have their scale blocks side by side: block ``4 g + t``
    of ``s`` scale blocks has the j-th of them at ``(g * s + j) * 4 + t``.
    """

    columns: int
    int8: bool

    @property
    def run_nbytes(self) -> int:
        """Bytes of the values of a run, all columns."""
        return self.columns * (16 if self.int8 else 32)

    def nbytes(self, scale_blocks: int) -> int:
        """All of it, for rows of so many scale blocks."""
        return scale_blocks * (2 * self.run_nbytes + 4 * self.columns * (3 if self.int8 else 1))


def scale_blocks_of(block_format: Format, k: int) -> int:
    """Scale blocks of a row of ``k`` activations, filled up to four weight blocks."""
    return -(-block_format.blocks(k) // 4) * block_format.block_weights // 8


@dataclass(frozen=True)
class Tiling:
    """How a block of WARPS warps shares the rows of a format.

    The block takes ``row_warps`` tiles of ``8 * lane_rows`` rows at once. ``k_warps`` warps share a tile: a warp takes one unit
    (what a lane loads at once) of four neighbouring blocks in each row, the next warp the next unit. A chunk, which is
    what a stage holds of each row, gives every warp ``units`` of these steps.
    """

    warps: int
    lane_rows: int
    k_warps: int
    row_warps: int
    units: int
    chunk_blocks: int
    pitch: int
    stages: int
    alignment: int

    @classmethod
    def of(cls, block_format: Format, alignment: int, ring_nbytes: int, row_warps: int = 1, warps: int = WARPS, units: int = 1, lane_rows: int = 2) -> Tiling:
        """The tiling of a format whose tensor starts at a multiple of ``alignment`` bytes, in a ring of that size."""
        k_warps = warps // row_warps
        units = max(units, -(-block_format.lanes // (4 * k_warps)))
        chunk_blocks = 4 * k_warps * units // block_format.lanes
        alignment = min(alignment, block_format.alignment)
        pitch = _pitch(block_format, chunk_blocks * block_format.block_nbytes, alignment)
        stage_nbytes = 8 * lane_rows * row_warps * pitch
        return cls(
            warps=warps,
            lane_rows=lane_rows,
            k_warps=k_warps,
            row_warps=row_warps,
            units=units,
            chunk_blocks=chunk_blocks,
            pitch=pitch,
            stages=max(2, min(8, ring_nbytes // stage_nbytes)),
            alignment=alignment,
        )

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

    def partial_nbytes(self, columns: int) -> int:
        """Shared memory where the warps of a tile put their sums, twice."""
        return 2 * self.k_warps * self.rows * columns * 4

    def shared_nbytes(self, columns: int) -> int:
        """Shared memory up to the end of the ring, and what an unaligned load may look beyond it."""
        return BARRIERS_NBYTES + ZERO_NBYTES + self.partial_nbytes(columns) + self.stages * self.stage_nbytes + 16

    def constants(self, block_format: Format, bulk: bool) -> dict[str, Any]:
        """What kernels that stage are specialized with; ``bulk`` where the GPU has bulk copies."""
        chunk_nbytes = self.chunk_blocks * block_format.block_nbytes
        return {
            **block_format.constants(),
            "ALIGNMENT": self.alignment,
            "BARRIERS_NBYTES": BARRIERS_NBYTES,
            "BULK": bulk,
            "CHUNK_BLOCKS": self.chunk_blocks,
            "CHUNK_NBYTES": chunk_nbytes,
            "EDGE": min(4, self.alignment),
            "copy_edge": f"copy_edge{min(4, self.alignment)}",
            "fence_barriers": ("fence", bulk),
            "wait_for": ("waiter", bulk),
            "K_WARPS": self.k_warps,
            "LANE_ROWS": self.lane_rows,
            "PITCH": self.pitch,
            "PRODUCERS": PRODUCERS,
            "ROWS": self.rows,
            "ROW_WARPS": self.row_warps,
            "QUAD_SCALE_BLOCKS": block_format.block_weights // 8,
            "SCALE_BLOCKS": max(1, block_format.block_weights // BLOCK),
            "STAGES": self.stages,
            "STAGE_NBYTES": self.stage_nbytes,
            "TILE_ROWS": 8 * self.lane_rows,
            "UNITS": self.units,
            "THREADS": self.threads,
            "WARPS": self.warps,
            "ZERO_NBYTES": ZERO_NBYTES,
        }


def _pitch(block_format: Format, chunk_nbytes: int, alignment: int) -> int:
    """Bytes from one row of a stage to the next, a multiple of 32, chosen so that lanes meet in few memory banks."""
    least = -(-(31 + chunk_nbytes) // 32) * 32
    return min((least + 32 * i for i in range(4)), key=lambda pitch: _conflicts(block_format, pitch, alignment))


def _conflicts(block_format: Format, pitch: int, alignment: int) -> int:
    """Cycles that a wide load of a warp takes: lane ``4 g + t`` reads row g, block t."""
    width = 16 if alignment >= 16 else 4
    lanes = [(lane >> 2) * pitch + (lane & 3) * block_format.block_nbytes for lane in range(32)]
    together = 32 * 4 // width
    return sum(_cycles(lanes[start : start + together], width) for start in range(0, 32, together))


def _cycles(addresses: list[int], width: int) -> int:
    words: dict[int, set[int]] = {}
    for address in addresses:
        for word in range(address // 4, (address + width) // 4):
            words.setdefault(word % 32, set()).add(word)
    return max(map(len, words.values()))
