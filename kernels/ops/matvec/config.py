"""The choices of a product's schedule, as data: what may be chosen, and what follows from it.

A :class:`Case` is a product, a :class:`Config` a choice for it. :func:`legal` checks whether they fit each other on a
GPU; the kernels rely on nothing else. :mod:`qmm.kernels.ops.matvec.choose` decides which config a case gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qmm.kernels.formats import Format
from qmm.kernels.ops.layout import COLUMN_TILES, ZERO_NBYTES, Activations
from qmm.kernels.ops.op import Architecture
from qmm.kernels.ops.tiling import LINE_NBYTES, MOST_STAGES, SECTOR_NBYTES, Tiling

__all__ = ["X_PLACES", "Case", "Config", "Schedule", "legal"]

X_PLACES: Final = ("fused", "bulk", "copied", "global")
"""Where a CTA reads activations: from shared memory, where it quantizes them itself (fused), or where one bulk copy or
its warps copy them; or from global memory."""


@dataclass(frozen=True)
class Case:
    """What the schedule of a product with up to eight columns depends on.

    Attributes:
        block_format: of the weight. m: rows. k: weights a row. n: columns, 1 to 8. int8: whether activations are
        quantized to int8, else to float16. alignment: of every row, a power of two up to 16. fusible: whether a
        CTA could quantize the activations: float32, rows at multiples of 16 bytes and of such a size. mapped: whether
        the weight is read over the link to the host.
    """

    block_format: Format
    m: int
    k: int
    n: int
    int8: bool
    alignment: int
    fusible: bool
    mapped: bool

    @property
    def columns(self) -> int:
        """The columns of the kernel that serves it."""
        return next(tile for tile in COLUMN_TILES if tile >= self.n)

    @property
    def activations(self) -> Activations:
        """Where its activations lie, once quantized."""
        return Activations.of(self.block_format, self.k, self.columns, self.int8)


@dataclass(frozen=True)
class Config:
    """A choice; :class:`qmm.kernels.ops.tiling.Tiling` says what the numbers mean.

    Attributes:
        warps: consumer warps, which multiply.
        lane_rows: rows of a lane.
        row_warps: tiles of rows that a CTA takes at once.
        units: steps of a warp in a stage.
        stages: pipeline stages.
        line: the copy to shared memory keeps addresses modulo this.
        x: one of X_PLACES.
        first_stages: stages that are filled before activations are loaded, which queue up behind these copies.
    """

    warps: int
    lane_rows: int
    row_warps: int
    units: int
    stages: int
    line: int
    x: str
    first_stages: int


@dataclass(frozen=True)
class Schedule:
    """A case with its config, and what follows from them: all that the kernel is specialized with.

    Attributes:
        config: the choice.
        tiling: of the weight.
        activations: once quantized.
        bulk: whether the GPU has bulk copies and starts kernels before their predecessors end.
    """

    config: Config
    tiling: Tiling
    activations: Activations
    bulk: bool

    @classmethod
    def of(cls, case: Case, config: Config, architecture: Architecture) -> Schedule:
        """The schedule of a choice.

        Raises:
            ValueError: the config is not legal for the case.
        """
        reason = legal(config, case, architecture)
        if reason:
            raise ValueError(f"{config} for {case.block_format.name} {case.m}x{case.k}, n = {case.n}: {reason}")
        return cls(config, _tiling(case, config), case.activations, architecture.bulk)

    @property
    def x_shared(self) -> bool:
        """Whether activations are read from shared memory."""
        return self.config.x != "global"

    @property
    def fused(self) -> bool:
        """Whether each CTA quantizes them for itself."""
        return self.config.x == "fused"

    @property
    def shared_nbytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        x_nbytes = self.activations.nbytes if self.x_shared else 0
        return self.tiling.shared_nbytes(self.activations.columns) + x_nbytes


def legal(config: Config, case: Case, architecture: Architecture) -> str:
    """Why a config is not legal for a case; empty if it is."""
    for name, number in (("warps", config.warps), ("row_warps", config.row_warps)):
        if number < 1 or number.bit_count() > 1:
            return f"{name} = {number} is no power of two"
    if config.row_warps > config.warps:
        return f"{config.warps} warps cannot share {config.row_warps} tiles"
    if config.lane_rows not in (2, 4):
        return f"a lane takes 2 or 4 rows, not {config.lane_rows}"
    if config.line not in (SECTOR_NBYTES, LINE_NBYTES):
        return f"line is {SECTOR_NBYTES} or {LINE_NBYTES} bytes, not {config.line}"
    if not 2 <= config.stages <= MOST_STAGES:
        return f"a ring has 2 to {MOST_STAGES} stages, not {config.stages}"
    if not 1 <= config.first_stages <= config.stages:
        return f"{config.first_stages} of {config.stages} stages cannot be filled first"
    if config.x not in X_PLACES:
        return f"activations are in one of {', '.join(X_PLACES)}, not {config.x!r}"
    if config.x == "bulk" and not architecture.bulk:
        return "the GPU has no bulk copies"
    if config.x == "fused" and not (case.fusible and (case.int8 or case.block_format.plain)):
        return "a CTA cannot quantize its activations"
    tiling = _tiling(case, config)
    if tiling.units != config.units:
        return f"{config.warps // config.row_warps} warps a tile take at least {tiling.units} units, not {config.units}"
    if not ZERO_NBYTES // 16 <= tiling.threads <= 1024:
        return f"a CTA of {tiling.threads} threads"
    wanted = tiling.shared_nbytes(case.columns) + (case.activations.nbytes if config.x != "global" else 0)
    if wanted > architecture.shared_nbytes:
        return f"{wanted} bytes of shared memory, and a CTA has at most {architecture.shared_nbytes}"
    return ""


def _tiling(case: Case, config: Config) -> Tiling:
    return Tiling.with_stages(
        case.block_format,
        case.alignment,
        config.stages,
        config.line,
        config.warps,
        config.lane_rows,
        config.row_warps,
        config.units,
    )
