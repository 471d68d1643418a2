"""How the CUDA schedules are cut: sizes that their kernels are specialized with, and that the host launches them by.

Nothing here imports Numba, so a kernel that was compiled before is found and launched without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmm.kernels.formats import Format

__all__ = ["BLOCK", "COLUMN_TILES", "WARPS", "Staging"]

BLOCK = 32
"""Activations that share one scale (:mod:`qmm.kernels.activations`)."""

COLUMN_TILES = (1, 2, 4, 8)
"""Column counts that a kernel is compiled for; others take the next one and leave its last columns out."""

WARPS = 4
SHARED_NBYTES = 48 * 1024
"""What a block may have of shared memory without asking for more."""


@dataclass(frozen=True)
class Staging:
    """How the bytes of a format's rows pass through shared memory."""

    chunk_blocks: int
    units: int
    stage_nbytes: int
    rows: int
    stages: int
    alignment: int

    @classmethod
    def of(cls, block_format: Format, alignment: int, rows: int = 2) -> Staging:
        """The staging of a format whose tensor starts at a multiple of ``alignment`` bytes."""
        chunk_blocks = 1
        while chunk_blocks * block_format.lanes % 32 or chunk_blocks * block_format.block_nbytes % 16:
            chunk_blocks += 1
        # A chunk may begin anywhere in a line of 128 bytes; unaligned loads may look 3 bytes past its last field.
        stage_nbytes = -(-(127 + chunk_blocks * block_format.block_nbytes + 3) // 128) * 128
        stages = 4
        while WARPS * stages * rows * stage_nbytes > SHARED_NBYTES:
            if stages > 3:
                stages -= 1
            else:
                rows, stages = rows - 1, 4
        return cls(
            chunk_blocks=chunk_blocks,
            units=chunk_blocks * block_format.lanes // 32,
            stage_nbytes=stage_nbytes,
            rows=rows,
            stages=stages,
            alignment=min(alignment, block_format.alignment),
        )

    @property
    def shared_nbytes(self) -> int:
        """Shared memory of a block of WARPS warps."""
        return WARPS * self.stages * self.rows * self.stage_nbytes

    def constants(self, block_format: Format) -> dict[str, Any]:
        """What kernels that stage are specialized with, machine operations by name (:mod:`qmm.kernels.build`)."""
        return {
            **block_format.constants(),
            "ALIGNMENT": self.alignment,
            "CHUNK_BLOCKS": self.chunk_blocks,
            "CHUNK_NBYTES": self.chunk_blocks * block_format.block_nbytes,
            "EDGE": min(4, self.alignment),
            "ROWS": self.rows,
            "STAGES": self.stages,
            "STAGE_NBYTES": self.stage_nbytes,
            "UNITS": self.units,
            "VECTORS": -(-(127 + self.chunk_blocks * block_format.block_nbytes) // 512),
            "WARPS": WARPS,
            "copy_edge": f"copy_edge{min(4, self.alignment)}",
            "wait_for_oldest": ("wait", self.stages - 2),
        }
