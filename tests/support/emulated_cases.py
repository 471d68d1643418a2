"""Products and dequantizations as hypothesis draws them for ``test_masking.py``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from emulated_device import USUAL
from emulated_products import run_dequantization, run_product
from emulated_schedules import GPUS, Planned, alignments_of
from hypothesis import strategies as st

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.lang.targets.emulator import Settings
from qmm.kernels.ops.dequantize import dequantization_tiling
from qmm.kernels.ops.matvec.config import Config, Schedule
from qmm.kernels.ops.op import ITEM_NBYTES, Architecture, alignment_of
from qmm.kernels.ops.tiling import Tiling

__all__ = ["REACHES", "Case", "Reach", "depths_of_product", "dequantizations", "products", "usual_products", "work_of"]


@dataclass(frozen=True)
class Reach:
    """How far a shape reaches: tiles of rows, and chunks of each, from one row of one block on.

    Attributes:
        past_tiles: tiles that there are more rows than; None for as many as the ring has stages.
        past_chunks: chunks that rows are longer than.
    """

    past_tiles: int | None
    past_chunks: int

    def tiles(self, tiling: Tiling) -> int:
        return tiling.stages if self.past_tiles is None else self.past_tiles


REACHES = {
    "past both": Reach(1, 1),
    "round the ring": Reach(None, 0),
    "past a chunk": Reach(0, 1),
    "past a tile": Reach(1, 0),
    "within a tile": Reach(0, 0),
}


@dataclass(frozen=True)
class Case:
    """A product, or with no columns a dequantization; without a config it is the one that the host takes."""

    name: str
    architecture: Architecture
    m: int
    k: int
    start: int
    n: int = 0
    int8: bool = False
    config: Config | None = None
    mapped: bool = False
    x_start: int = 0
    dtype: str = "float32"
    settings: Settings = USUAL

    def run(self) -> Schedule | Tiling:
        """Run it, and say how it was cut; what must hold is asserted here and where it is run."""
        common = {"architecture": self.architecture, "shift": self.start, "settings": self.settings}
        if self.n == 0:
            outcome = run_dequantization(self.name, self.m, self.k, **common)
            launches, tiling = 1, outcome.schedule
        else:
            of_x = {"int8": self.int8, "x_shift": self.x_start, "dtype": self.dtype, "mapped": self.mapped}
            outcome = run_product(self.name, self.m, self.k, self.n, config=self.config, **of_x, **common)
            launches, tiling = -(-self.n // outcome.schedule.activations.columns), outcome.schedule.tiling
        if tiling.alignment == 16:  # all parts of rows begin at multiples of 16
            assert (outcome.reads == launches).all()
        return outcome.schedule


def work_of(block_format: Format, schedule: Schedule, columns: range, reach: Reach) -> int:
    """What the executor's time goes by: units that warps take, by rows of a lane, runs and columns."""
    tiling, tile = schedule.tiling, schedule.activations.columns
    parts = (reach.tiles(tiling) + 1) * (reach.past_chunks + 1) * -(-columns.start // tile)
    return parts * tiling.warps * tiling.units * tiling.lane_rows * block_format.runs * tile


def depths(block_format: Format, tiling: Tiling, reach: Reach) -> list[int]:
    """Weights of a row, from one block to past a chunk; a multiple of 512 is never needed, so it is left out."""
    chunk = tiling.chunk_blocks * block_format.block_weights
    least = reach.past_chunks * chunk + 1
    of_row = block_format.block_weights
    if block_format.plain:
        of_row = max(1, tiling.alignment * block_format.block_weights // block_format.block_nbytes)
    return [k for k in range(least, least + chunk) if k % of_row == 0 and k % 512]


def depths_of_product(planned: Planned, reach: Reach) -> list[int]:
    """Those of a product: whose activations fit into shared memory, and may be quantized where that is planned."""
    every = depths(planned.case.block_format, planned.schedule.tiling, reach)
    return [k for k in every if planned.fits(k)]


@st.composite
def shapes(
    draw: st.DrawFn, block_format: Format, tiling: Tiling, reach: Reach, depths: list[int], in_file: bool
) -> tuple[int, int, int]:
    """Rows, weights of each, and where the tensor begins, so that rows have no more than the tiling's alignment: at a
    multiple of 32 as in a file, if there are such rows, or where an engine's copy may begin."""

    def keeps(k: int) -> bool:
        """Whether rows of ``k`` weights have no more than that alignment wherever they begin."""
        return min(block_format.alignment, alignment_of(block_format.row_nbytes(k))) <= tiling.alignment

    above = reach.tiles(tiling) * tiling.rows
    k = draw(st.sampled_from([k for k in depths if in_file and keeps(k)] or depths))
    m = draw(st.integers(above + 1, above + tiling.rows))
    if not keeps(k):
        return m, k, tiling.alignment * (2 * draw(st.integers(0, 40)) + 1)
    return m, k, (32 if in_file else tiling.alignment) * draw(st.integers(1, 40))


def ways(warps: int) -> st.SearchStrategy[Settings]:
    """How kernels are run."""
    slow = st.one_of(st.none(), st.integers(0, warps + 3))
    return st.builds(Settings, late=st.booleans(), slow=slow, seed=st.integers(0, 999))


@st.composite
def products(draw: st.DrawFn, planned: Planned, reach: Reach, columns: range, in_file: bool) -> Case:
    """A product with a config, by weights that begin as they do in a file, or elsewhere."""
    block_format, schedule = planned.case.block_format, planned.schedule
    tiling = schedule.tiling
    m, k, start = draw(shapes(block_format, tiling, reach, depths_of_product(planned, reach), in_file))
    dtype = "float32" if schedule.fused else draw(st.sampled_from(list(ITEM_NBYTES)))
    x_start = (16 if schedule.fused else ITEM_NBYTES[dtype]) * draw(st.integers(0, 15))
    sms = 1 if reach.past_tiles is None else draw(st.integers(1, 3))
    return Case(
        block_format.name,
        replace(planned.architecture, sms=sms),
        *(m, k, start, draw(st.sampled_from(columns)), schedule.activations.int8, schedule.config),
        *(tiling.line == 128, x_start, dtype, draw(ways(tiling.warps))),
    )


@st.composite
def usual_products(draw: st.DrawFn, name: str) -> Case:
    """A product with whatever schedule the host takes for its shape."""
    block_format = FORMATS[name]
    architecture = replace(draw(st.sampled_from(list(GPUS.values()))), sms=draw(st.integers(1, 3)))
    alignment = draw(st.sampled_from(alignments_of(block_format)))
    like = Tiling.of(block_format, alignment, 0, warps=8)
    reach = REACHES[draw(st.sampled_from(["within a tile", "past a tile"]))]
    m, k, _ = draw(shapes(block_format, like, reach, depths(block_format, like, reach), in_file=False))
    start = alignment * draw(st.integers(1, 80))
    n, dtype = draw(st.integers(1, 4) | st.integers(5, 10)), draw(st.sampled_from(list(ITEM_NBYTES)))
    x_start = ITEM_NBYTES[dtype] * draw(st.sampled_from([0, 0, 1, 4]))
    plan = None, draw(st.booleans()), x_start, dtype, draw(ways(16))
    return Case(name, architecture, m, k, start, n, draw(st.booleans()) and not block_format.plain, *plan)


@st.composite
def dequantizations(draw: st.DrawFn, name: str, alignment: int, architecture: Architecture, reach: Reach) -> Case:
    """A dequantization."""
    tiling = dequantization_tiling(FORMATS[name], alignment, architecture)
    shape = shapes(FORMATS[name], tiling, reach, depths(FORMATS[name], tiling, reach), draw(st.booleans()))
    m, k, start = draw(shape)
    sms = 1 if reach.past_tiles is None else draw(st.integers(1, 3))
    return Case(name, replace(architecture, sms=sms), m, k, start, settings=draw(ways(tiling.warps)))
