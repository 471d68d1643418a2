"""The layout of quantized activations on the GPU, which one kernel writes and products read.

Plain numbers, for the kernels as compile-time constants and for the planners. Nothing here imports Numba.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qmm.kernels.formats import Format

__all__ = ["BLOCK", "COLUMN_TILES", "ROOMY_RUNS", "WARPS", "ZERO_NBYTES", "Activations", "scale_blocks_of"]

BLOCK: Final = 32
"""Activations that share one scale (:mod:`qmm.kernels.ops.quantize`)."""
COLUMN_TILES: Final = (1, 2, 4, 8)
"""Column counts that kernels are compiled for; other counts use the next larger one."""
WARPS: Final = 16
"""Warps of a CTA of kernels that do not read weights."""
ROOMY_RUNS: Final = 4
"""Runs of a unit up to which a lane has registers for them. With more (Q2_K, Q3_K) ptxas would spill: dequantization
gets half the warps, and a product loads fewer scales at a time."""
ZERO_NBYTES: Final = 4096
"""Zero bytes, read in place of blocks past the end of a row and of activations that a lane does not use."""


@dataclass(frozen=True)
class Activations:
    """The layout of up to ``columns`` columns of quantized activations, in one piece of memory.

    First the values, ``(scale blocks, 2, columns, 16)`` int8 or float16, then float32 scales ``(scale blocks,
    columns)``, then the sums of each block's or run's values, ``(sums, scale blocks, columns)`` float32. A scale block
    is 32 values. The scale blocks of four weight blocks, which a quad of lanes takes at once, alternate: the j-th of
    the ``s`` scale blocks of weight block ``4 g + t`` is at ``(g * s + j) * 4 + t``. So a quad reads neighbouring
    words.

    Attributes:
        columns: one of COLUMN_TILES.
        int8: whether values are int8, else float16.
        sums: sums for each scale block: 0 where the format has no minima, else 1 or 2.
        spread: scale blocks of a weight block, at least 1.
        scale_blocks: of a row.
    """

    columns: int
    int8: bool
    sums: int
    spread: int
    scale_blocks: int

    @classmethod
    def of(cls, block_format: Format, k: int, columns: int, int8: bool) -> Activations:
        """The layout of rows of ``k`` for a format: with sums if it has minima, one for each scale block if pairs of
        runs share a minimum, else one for each run."""
        sums = 1 if block_format.pairs and not block_format.run_minima else 2
        spread = max(1, block_format.block_weights // BLOCK)
        wanted = sums if int8 and block_format.has_minimum else 0
        return cls(columns, int8, wanted, spread, scale_blocks_of(block_format, k))

    @property
    def run_nbytes(self) -> int:
        """Bytes of the values of a run, all columns."""
        return self.columns * (16 if self.int8 else 32)

    @property
    def block_nbytes(self) -> int:
        """Bytes of a scale block, all columns: values, scale and sums."""
        return 2 * self.run_nbytes + 4 * self.columns * (1 + self.sums)

    @property
    def nbytes(self) -> int:
        """All of it; a multiple of 16."""
        return self.scale_blocks * self.block_nbytes

    def at_once(self, block_format: Format) -> int:
        """Runs whose products are added up before they are scaled."""
        return 2 if self.int8 and block_format.pairs else 1

    def run_step(self, block_format: Format) -> int:
        """The format's run step, or 0 if lanes that read zeros in place of activations would reach past the zeros with
        it."""
        at_once = self.at_once(block_format)
        step = block_format.run_step(at_once)
        reach = 4 * step * (block_format.runs // at_once - 1) * self.run_nbytes
        return step if 64 + reach + 2 * self.run_nbytes <= ZERO_NBYTES else 0


def scale_blocks_of(block_format: Format, k: int) -> int:
    """Scale blocks of a row of ``k`` activations, rounded up to four weight blocks and to four scale blocks, so that
    the size of each part is a multiple of 16 bytes."""
    weights = -(-block_format.blocks(k) // 4) * 4 * block_format.block_weights
    return -(-weights // (4 * BLOCK)) * 4
