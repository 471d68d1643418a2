"""Tilings of the GPU kernels that read weights: what each lane takes, and how shared memory is laid out.

Plain numbers, for the kernels as compile-time constants and for the planners. Nothing here imports Numba.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

from qmm.kernels.formats import Format
from qmm.kernels.formats.format import FormatConstants
from qmm.kernels.ops.layout import WARPS, ZERO_NBYTES

__all__ = [
    "BARRIERS_NBYTES",
    "EMPTY",
    "FULL",
    "LINE_NBYTES",
    "OF_X",
    "PRODUCERS",
    "RING_NBYTES",
    "SECTOR_NBYTES",
    "SUMS_EMPTY",
    "SUMS_FULL",
    "PipelineConstants",
    "Tiling",
]

PRODUCERS: Final = 3
"""Producer warps, which copy weights. One takes 50 cycles for each row of a stage, and was the limit (Q4_K, 14336x4096,
n = 1 on an H200: 17.7 us with one, 14.7 with three)."""
BARRIERS_NBYTES: Final = 256
"""Shared memory for mbarriers, at its beginning."""
FULL, EMPTY = 0, 64
"""Offsets in shared memory of the mbarriers "full" and "empty" of the stages, 8 bytes each."""
SUMS_FULL, SUMS_EMPTY, OF_X = 128, 144, 160
"""The same for the epilogue's two buffers of partial sums; and for the activations."""
MOST_STAGES: Final = 8
RING_NBYTES: Final = 160 << 10
"""The most shared memory of a ring. Copies in flight hide the latency of memory, and stages that are full already hide
the loading of activations (4096x14336, n = 1 on an H100: Q4_K 13.1, with 144 KB 14.2; but Q6_K 20.2, with 200 KB
22.2)."""
SECTOR_NBYTES: Final = 32
"""Copies from the GPU's memory keep addresses modulo this, the size of a sector: a sector whose halves went to
different sectors of shared memory was transferred twice (cp.async, Q6_K, 4096x4096, mapped: 647,168 sectors read
instead of 430,080)."""
LINE_NBYTES: Final = 128
"""The same for copies from host memory. A request covers one line of shared memory, and split requests use less of the
link's bandwidth (H100, modulo 32: Q4_K 95% of a plain copy's, Q6_K 72%)."""


@dataclass(frozen=True)
class PipelineConstants(FormatConstants):
    """The compile-time constants of kernels that read weights through a ring of pipeline stages."""

    ALIGNMENT: int
    """The alignment of every row, in bytes."""
    BARRIERS_NBYTES: int
    """Shared memory for mbarriers."""
    BULK: bool
    """Whether the GPU has bulk copies (sm_90 and later)."""
    CHUNK_BLOCKS: int
    """Blocks of a row in a stage."""
    CHUNK_NBYTES: int
    """Bytes of a row in a stage."""
    EDGE: int
    """Bytes of a copy at a tensor's first and last bytes."""
    K_WARPS: int
    """Consumer warps that share a row."""
    LANE_ROWS: int
    """Rows of a lane."""
    LINE: int
    """Copies to shared memory keep addresses modulo this."""
    PITCH: int
    """Bytes from one row of a stage to the next."""
    PRODUCERS: int
    """Producer warps."""
    ROWS: int
    """Rows that a CTA takes at once."""
    STAGES: int
    """Pipeline stages."""
    STAGE_NBYTES: int
    """Bytes of a stage."""
    TILE_ROWS: int
    """Rows of a consumer warp."""
    UNITS: int
    """Units that a consumer warp takes of a stage. A lane loads a unit at once."""
    WARPS: int
    """Consumer warps."""
    ZERO_NBYTES: int
    """Zeros in shared memory."""


@dataclass(frozen=True)
class Tiling:
    """How the warps of a CTA share the rows of a format.

    The CTA takes ``row_warps`` tiles of ``8 * lane_rows`` rows at once, ``k_warps`` warps to a tile. In one step a
    warp takes one unit (what a lane loads at once) of four neighbouring blocks in each row, and the next warp takes the
    next unit. A chunk is the part of a row in a stage: ``units`` steps for every warp.

    Attributes:
        warps: consumer warps.
        lane_rows: rows of a lane.
        row_warps: tiles at once.
        units: steps of a warp in a stage.
        chunk_blocks: blocks of a row in a stage.
        line: copies to shared memory keep addresses modulo this.
        pitch: bytes from one row of a stage to the next.
        stages: pipeline stages.
        alignment: of every row, in bytes.
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
        """The tiling of a format whose rows start at multiples of ``alignment`` bytes, with as many stages as the ring
        holds."""
        one_stage = cls.with_stages(block_format, alignment, 1, line, warps, lane_rows, row_warps, units)
        stages = max(2, min(MOST_STAGES, ring_nbytes // one_stage.stage_nbytes))
        return cls.with_stages(block_format, alignment, stages, line, warps, lane_rows, row_warps, units)

    @classmethod
    def with_stages(
        cls,
        block_format: Format,
        alignment: int,
        stages: int,
        line: int,
        warps: int,
        lane_rows: int,
        row_warps: int,
        units: int,
    ) -> Tiling:
        """The tiling with so many stages."""
        k_warps = warps // row_warps
        units = max(units, -(-block_format.lanes // k_warps))  # a chunk is whole quads of blocks
        chunk_blocks = 4 * k_warps * units // block_format.lanes
        alignment = min(alignment, block_format.alignment)
        pitch = _pitch(block_format, chunk_blocks * block_format.block_nbytes, line, alignment)
        return cls(warps, lane_rows, row_warps, units, chunk_blocks, line, pitch, stages, alignment)

    def ring_within(self, shared_nbytes: int, columns: int) -> int:
        """Bytes left for the ring where a CTA has so much shared memory."""
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
        """Threads of a CTA: consumer warps, producer warps, and one for the epilogue."""
        return 32 * (self.warps + PRODUCERS + 1)

    @property
    def rows(self) -> int:
        """Rows that a CTA takes at once."""
        return 8 * self.lane_rows * self.row_warps

    @property
    def stage_nbytes(self) -> int:
        """Shared memory of a stage."""
        return self.rows * self.pitch

    def shared_nbytes(self, columns: int) -> int:
        """Shared memory up to the end of the ring: mbarriers, zeros, two buffers of partial sums, stages.

        And 16 bytes: unaligned loads read up to 4 bytes past a field, copies of activations end at a multiple of 16.
        """
        sums = 2 * self.k_warps * self.rows * columns * 4
        return BARRIERS_NBYTES + ZERO_NBYTES + sums + self.stages * self.stage_nbytes + 16

    def constants(self, block_format: Format, bulk: bool, product: bool) -> dict[str, Any]:
        """The fields of PipelineConstants, by name; ``bulk`` where the GPU has bulk copies."""
        return {
            **block_format.constants(product).described(),
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
            "ROWS": self.rows,
            "STAGES": self.stages,
            "STAGE_NBYTES": self.stage_nbytes,
            "TILE_ROWS": 8 * self.lane_rows,
            "UNITS": self.units,
            "WARPS": self.warps,
            "ZERO_NBYTES": ZERO_NBYTES,
        }


@functools.lru_cache(maxsize=4096)
def _pitch(block_format: Format, chunk_nbytes: int, line: int, alignment: int) -> int:
    """Bytes from one row of a stage to the next, whole lines, with the fewest bank conflicts."""
    least = -(-(line - 1 + chunk_nbytes) // line) * line
    return min(
        (least + line * i for i in range(128 // line)), key=lambda pitch: _cycles(block_format, pitch, alignment)
    )


def _cycles(block_format: Format, pitch: int, alignment: int) -> int:
    """Cycles of a warp's wide load, by bank conflicts: lane ``4 g + t`` reads row g, block t."""
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
