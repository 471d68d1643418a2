"""Plans of products: what every tiling, config and plan must hold, over formats, alignments, shapes and GPUs.

The kernels believe these numbers; nothing here runs one, and nothing needs a GPU.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ptx_kernels import AMPERE, HOPPER, MACHINES

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.formats.format import Format as AnyFormat
from qmm.kernels.ops.dequantize import dequantization_tiling
from qmm.kernels.ops.layout import COLUMN_TILES, ZERO_NBYTES, Activations, scale_blocks_of
from qmm.kernels.ops.matvec.choose import choose, rule
from qmm.kernels.ops.matvec.config import Case, Schedule, legal
from qmm.kernels.ops.matvec.plan import NOTHING, Product, plan
from qmm.kernels.ops.op import Architecture, At, Operand, Slab, WeightLayout
from qmm.kernels.ops.tiling import (
    BARRIERS_NBYTES,
    EMPTY,
    FULL,
    LINE_NBYTES,
    OF_X,
    RING_NBYTES,
    SECTOR_NBYTES,
    SUMS_EMPTY,
    SUMS_FULL,
    Tiling,
)


def load_nothing(block, lane):
    return ()


def unpack_nothing(lane):
    return ()


def user_format(name: str, runs: int, lanes: int, block_nbytes: int, alignment: int, step: int) -> Format:
    """A format as a user may write one, whose lanes take runs that are ``step`` apart."""
    return AnyFormat(
        name=name,
        block_weights=16 * runs * lanes,
        block_nbytes=block_nbytes,
        lanes=lanes,
        runs=runs,
        has_minimum=True,
        load=load_nothing,
        unpack=unpack_nothing,
        position=lambda lane, i: (lane // step) * step * runs + lane % step + step * i,
        alignment=alignment,
    )


USERS = [
    user_format("small", runs=2, lanes=1, block_nbytes=17, alignment=1, step=1),
    user_format("odd", runs=2, lanes=4, block_nbytes=77, alignment=1, step=2),
    user_format("many runs", runs=8, lanes=8, block_nbytes=544, alignment=16, step=4),
    user_format("many lanes", runs=1, lanes=32, block_nbytes=272, alignment=16, step=1),
]
ALL = {**FORMATS, **{block_format.name: block_format for block_format in USERS}}
ALIGNMENTS = (1, 2, 4, 8, 16)

each_format = pytest.mark.parametrize("block_format", ALL.values(), ids=ALL)
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: MACHINES[machine][0])


def tilings(block_format: Format) -> Iterator[Tiling]:
    for alignment, ring_nbytes, line in itertools.product(
        ALIGNMENTS, (0, 64 << 10, RING_NBYTES), (SECTOR_NBYTES, LINE_NBYTES)
    ):
        for warps, lane_rows, row_warps, units in itertools.product((4, 8, 16), (2, 4), (1, 2, 4), (1, 2)):
            yield Tiling.of(block_format, alignment, ring_nbytes, line, warps, lane_rows, row_warps, units)


def modes(block_format: Format) -> tuple[bool, ...]:
    """The kinds of activations, as whether they are int8."""
    return (False,) if block_format.plain else (True, False)


SHAPES = [(1, 1), (1, 28672), (16, 4096), (512, 640), (4096, 4096), (14336, 28672), (262144, 640), (262144, 14336)]


def schedules(block_format: Format, machine: Architecture) -> Iterator[tuple[Case, Schedule]]:
    """Schedules of many cases."""
    for (m, least), n, int8, mapped in itertools.product(SHAPES, (1, 2, 3, 5, 8), modes(block_format), (False, True)):
        k = block_format.blocks(least) * block_format.block_weights
        for alignment, fusible in ((16, True), (1, True), (16, False)):
            case = Case(block_format, m, k, n, int8, alignment, fusible, mapped)
            yield case, choose(case, machine)


def schedule_of(
    name: str,
    m: int,
    k: int,
    n: int,
    int8: bool = True,
    alignment: int = 16,
    fusible: bool = True,
    mapped: bool = False,
    machine: Architecture = HOPPER,
) -> Schedule:
    return choose(Case(FORMATS[name], m, k, n, int8, alignment, fusible, mapped), machine)


# ---------------------------------------------------------------------------------------------------------------------
# Tilings
# ---------------------------------------------------------------------------------------------------------------------


@each_format
def test_a_row_of_a_stage_has_room_for_its_chunk_wherever_it_starts(block_format: Format) -> None:
    for tiling in tilings(block_format):
        assert tiling.pitch % tiling.line == 0
        assert tiling.line % SECTOR_NBYTES == 0
        chunk_nbytes = tiling.chunk_blocks * block_format.block_nbytes
        # Bytes keep their place modulo the line; copies begin and end at multiples of 16.
        ends = [-(-(phase + chunk_nbytes) // 16) * 16 for phase in range(tiling.line)]
        assert max(ends) <= tiling.pitch, tiling


@each_format
def test_the_warps_of_a_tile_take_every_unit_of_a_chunk_once(block_format: Format) -> None:
    for tiling in tilings(block_format):
        assert tiling.chunk_blocks % 4 == 0
        taken = [
            # As consume() and dequantize() reckon them: the unit of the block, and the block.
            (turn & (block_format.lanes - 1), turn // block_format.lanes * 4 + quad)
            for unit in range(tiling.units)
            for step in range(tiling.k_warps)
            for turn in [step + tiling.k_warps * unit]
            for quad in range(4)
        ]
        assert sorted(taken) == list(itertools.product(range(block_format.lanes), range(tiling.chunk_blocks))), tiling


@each_format
def test_numbers_that_kernels_take_for_powers_of_two_are_some(block_format: Format) -> None:
    for tiling in tilings(block_format):
        for number in (tiling.k_warps, block_format.lanes, tiling.line):
            assert number.bit_count() == 1
        assert tiling.rows == tiling.row_warps * 8 * tiling.lane_rows
        assert tiling.lane_rows % 2 == 0  # mma_s8 takes two at once


@each_format
def test_a_ring_has_two_to_eight_stages_whose_barriers_have_room(block_format: Format) -> None:
    for tiling in tilings(block_format):
        assert 2 <= tiling.stages <= 8
    assert EMPTY - FULL >= 8 * 8
    assert SUMS_FULL - EMPTY >= 8 * 8
    assert SUMS_EMPTY - SUMS_FULL >= 2 * 8
    assert OF_X - SUMS_EMPTY >= 2 * 8
    assert BARRIERS_NBYTES >= OF_X + 8


@each_format
def test_a_ring_is_as_large_as_it_may_be(block_format: Format) -> None:
    for ring_nbytes in (64 << 10, RING_NBYTES):
        tiling = Tiling.of(block_format, 16, ring_nbytes)
        least = 2 * tiling.stage_nbytes
        assert tiling.stages * tiling.stage_nbytes <= max(ring_nbytes, least)
        assert tiling.stages == 8 or (tiling.stages + 1) * tiling.stage_nbytes > ring_nbytes


@each_format
def test_shared_memory_is_the_sum_of_its_parts(block_format: Format) -> None:
    for tiling in itertools.islice(tilings(block_format), 0, None, 7):
        for columns in COLUMN_TILES:
            sums = np.empty((2, tiling.k_warps, tiling.rows, columns), np.float32)
            ring = np.empty((tiling.stages, tiling.rows, tiling.pitch), np.uint8)
            start = BARRIERS_NBYTES + ZERO_NBYTES + sums.nbytes
            assert start % tiling.line == 0  # or bytes would not keep their place in a line
            assert tiling.shared_nbytes(columns) == start + ring.nbytes + 16


@each_format
def test_the_alignment_is_what_format_and_tensor_both_keep_to(block_format: Format) -> None:
    for alignment in ALIGNMENTS:
        assert Tiling.of(block_format, alignment, 0).alignment == min(alignment, block_format.alignment)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "F16"])
def test_the_pitch_is_the_best_of_those_near(name: str) -> None:
    # Four lanes of a quad read four neighbouring blocks, the eight quads eight rows: 32 banks of 4 bytes serve them.
    block_format = FORMATS[name]
    tiling = Tiling.of(block_format, 16, 0)
    width = 16 if tiling.alignment == 16 else 4

    def cycles(pitch: int) -> int:
        taken = 0
        for first in range(0, 32, 128 // width):
            words = {
                (quad * pitch + block * block_format.block_nbytes) // 4 + word
                for quad, block in (divmod(lane, 4) for lane in range(first, first + 128 // width))
                for word in range(width // 4)
            }
            taken += max(sum(word % 32 == bank for word in words) for bank in range(32))
        return taken

    least = -(-(tiling.line - 1 + tiling.chunk_blocks * block_format.block_nbytes) // 32) * 32
    assert least <= tiling.pitch < least + 128
    assert cycles(tiling.pitch) == min(cycles(pitch) for pitch in range(least, least + 128, 32))


# ---------------------------------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", COLUMN_TILES)
@pytest.mark.parametrize(("int8", "sums"), [(True, 2), (True, 1), (True, 0), (False, 0)])
def test_activations_take_what_their_parts_take(columns: int, int8: bool, sums: int) -> None:
    for scale_blocks in (4, 32, 128, 896):
        activations = Activations(columns, int8, sums, 8, scale_blocks)
        values = np.empty((scale_blocks, 2, columns, 16), np.int8 if int8 else np.float16)
        scales = np.empty((scale_blocks, columns), np.float32)
        of_runs = np.empty((sums, scale_blocks, columns), np.float32)
        assert activations.nbytes == values.nbytes + scales.nbytes + of_runs.nbytes
        assert activations.run_nbytes == values.strides[1]
        # Each part starts where its loads may be as wide as they are: 16 bytes for values, columns floats for scales.
        assert values.nbytes % (4 * columns) == 0
        assert (values.nbytes + scales.nbytes) % (4 * columns) == 0


@each_format
def test_scale_blocks_fill_up_four_weight_blocks(block_format: Format) -> None:
    least = max(128, 4 * block_format.block_weights)
    for blocks in (1, 2, 3, 4, 5, 8, 9):
        k = blocks * block_format.block_weights
        assert scale_blocks_of(block_format, k) * 32 == -(-k // least) * least
    assert scale_blocks_of(FORMATS["F16"], 1) == 4  # a plain row may end anywhere


@each_format
@pytest.mark.parametrize("columns", COLUMN_TILES)
def test_lanes_that_leave_activations_out_read_zeros(block_format: Format, columns: int) -> None:
    for int8 in modes(block_format):
        activations = Activations.of(block_format, 4 * block_format.block_weights, columns, int8)
        # consume(): such a lane looks from `zero_x` on, which is 64 bytes into the zeros; its address does not depend
        # on its place, but what is added to it for the i-th run or pair of a unit does: 4 * RUN_STEP * i * RUN_NBYTES,
        # and RUN_NBYTES for the other run; then 32 bytes for each pair of columns, of which it loads 16. Plain weights
        # look at the first 32 bytes.
        at_once = activations.at_once(block_format)
        steps = 4 * activations.run_step(block_format) * (block_format.runs // at_once - 1) * activations.run_nbytes
        steps += (at_once - 1) * activations.run_nbytes
        assert 64 + steps + 32 * ((columns + 1) // 2 - 1) + 16 <= ZERO_NBYTES
        # A block past the row's end is read from the zeros' beginning; unaligned loads look 3 bytes further.
        assert block_format.block_nbytes + 3 <= ZERO_NBYTES


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


@each_format
@each_machine
def test_the_rule_chooses_what_is_legal(block_format: Format, machine: Architecture) -> None:
    for case, schedule in schedules(block_format, machine):
        assert legal(rule(case, machine), case, machine) == ""
        assert schedule.shared_nbytes <= machine.shared_nbytes, case
        assert schedule.tiling.threads <= 1024, case
        assert schedule.tiling.threads * 16 >= ZERO_NBYTES, case  # each thread clears 16 bytes
        assert 1 <= schedule.config.first_stages <= schedule.tiling.stages, case


@each_format
@each_machine
def test_activations_are_in_shared_memory_or_all_in_global_memory(block_format: Format, machine: Architecture) -> None:
    for case, schedule in schedules(block_format, machine):
        assert schedule.activations.columns == next(tile for tile in COLUMN_TILES if tile >= case.n), case
        assert not (schedule.activations.sums and not schedule.activations.int8), case
        assert schedule.activations.nbytes % 16 == 0, case
        if schedule.fused:  # quantize_block writes to shared memory
            assert schedule.x_shared, case
            assert schedule.activations.int8 or block_format.plain, case


USUAL = Case(FORMATS["Q4_K"], 14336, 4096, 1, True, 16, True, False)
ILLEGAL = {
    "warps = 12 is no power of two": {"warps": 12},
    "8 warps cannot share 16 tiles": {"warps": 8, "row_warps": 16},
    "a lane takes 2 or 4 rows, not 3": {"lane_rows": 3},
    "line is 32 or 128 bytes, not 64": {"line": 64},
    "a ring has 2 to 8 stages, not 9": {"stages": 9},
    "3 of 2 stages cannot be filled first": {"stages": 2, "first_stages": 3},
    "activations are in one of fused, bulk, copied, global, not 'somewhere'": {"x": "somewhere"},
    "2 warps a tile take at least 2 units, not 1": {"warps": 4, "row_warps": 2, "units": 1},
    "a CTA of 1152 threads": {"warps": 32},
}


@pytest.mark.parametrize("reason", ILLEGAL)
def test_what_the_kernels_could_not_do_is_not_legal(reason: str) -> None:
    config = replace(rule(USUAL, HOPPER), **ILLEGAL[reason])
    assert legal(config, USUAL, HOPPER) == reason
    with pytest.raises(ValueError, match=r"for Q4_K 14336x4096, n = 1: "):
        Schedule.of(USUAL, config, HOPPER)


def test_what_a_gpu_or_a_case_has_not_is_not_legal() -> None:
    config = rule(USUAL, HOPPER)
    assert legal(replace(config, x="bulk"), USUAL, AMPERE) == "the GPU has no bulk copies"
    assert "a CTA cannot quantize its activations" in legal(
        replace(config, x="fused"), replace(USUAL, fusible=False), HOPPER
    )
    small = replace(HOPPER, shared_nbytes=48 << 10)
    assert re.fullmatch(r"\d+ bytes of shared memory, and a CTA has at most 49152", legal(config, USUAL, small))


@each_format
@each_machine
def test_a_dequantization_fits_too(block_format: Format, machine: Architecture) -> None:
    for alignment in ALIGNMENTS:
        tiling = dequantization_tiling(block_format, alignment, machine)
        assert tiling.shared_nbytes(0) <= machine.shared_nbytes
        assert tiling.row_warps == 1  # dequantize() knows of no other
        assert tiling.threads <= 1024


@each_machine
def test_activations_that_do_not_fit_stay_in_global_memory(machine: Architecture) -> None:
    for name in ("Q4_K", "Q8_0"):
        schedule = schedule_of(name, 4096, 65536, 8, machine=machine)
        assert schedule.activations.nbytes > machine.shared_nbytes
        assert not schedule.x_shared
        assert not schedule.fused


def test_only_activations_that_may_be_fused_are() -> None:
    for machine in (HOPPER, AMPERE):
        fused = [
            schedule_of("Q4_K", 4096, 4096, 1, int8, fusible=fusible, machine=machine).fused
            for int8, fusible in ((True, True), (True, False), (False, True))
        ]
        assert fused == [True, False, False]


def test_few_rows_take_fewer_at_once() -> None:
    many, few = (schedule_of("Q8_0", m, 4096, 8, alignment=2).tiling for m in (14336, 512))
    assert (many.rows, few.rows) == (32, 16)


def test_short_rows_are_taken_several_at_once_where_they_are_many() -> None:
    many, few = (schedule_of("Q4_K", m, 768, 1).tiling for m in (262144, 512))
    assert many.row_warps > 1
    assert few.row_warps == 1


def test_mapped_weights_keep_their_place_in_a_line_of_128_bytes() -> None:
    for mapped, line in ((True, LINE_NBYTES), (False, SECTOR_NBYTES)):
        assert schedule_of("Q6_K", 4096, 4096, 1, mapped=mapped).tiling.line == line


@each_format
@pytest.mark.parametrize("n", [1, 4, 8])
def test_parts_of_mapped_rows_share_few_sectors(block_format: Format, n: int) -> None:
    schedule = choose(Case(block_format, 14336, 4096, n, not block_format.plain, 16, True, True), HOPPER)
    row_nbytes = block_format.row_nbytes(4096)
    parts = range(0, row_nbytes, schedule.tiling.chunk_blocks * block_format.block_nbytes)
    shared = sum(part % SECTOR_NBYTES > 0 for part in parts)  # each is read twice
    assert shared * SECTOR_NBYTES <= 0.02 * row_nbytes


# ---------------------------------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------------------------------

ON_A_CARD = WeightLayout(16, mapped=False)


def planned(n: int, m: int = 640, k: int = 1024, name: str = "Q4_K", **changed: Any) -> Product:
    x, y = changed.pop("x", Operand.contiguous(n, k)), changed.pop("y", Operand.contiguous(n, m))
    int8 = not FORMATS[name].plain
    return plan(FORMATS[name], m, k, changed.pop("weights", ON_A_CARD), x, y, int8, HOPPER, **changed)


def bases(product: Product) -> set[str]:
    return {value.base for launch in product.launches for value in launch.arguments.values() if isinstance(value, At)}


def test_a_plan_names_each_parameter_of_its_kernels() -> None:
    for launch in planned(20).launches:
        assert set(launch.arguments) == set(inspect.signature(launch.kernel.function).parameters)


def test_few_activations_are_quantized_by_the_product_and_take_no_workspace() -> None:
    product = planned(1)
    assert [launch.kernel.function.__name__ for launch in product.launches] == ["matvec"]
    assert (product.quantized, product.quantize_launches, product.workspace_nbytes) == (None, 0, 0)
    assert bases(product) == {"weights", "x", "y", "zeros"}


def test_more_than_eight_columns_read_the_weights_again_for_each_eight() -> None:
    product = planned(20, k=4096)
    names = [launch.kernel.function.__name__ for launch in product.launches]
    assert names == ["quantize", "matvec", "matvec", "matvec"]
    assert [launch.arguments["n"] for launch in product.launches[1:]] == [8, 8, 4]
    assert product.quantize_launches == 1
    assert product.quantized is not None
    assert product.workspace_nbytes == 3 * -(-product.quantized.nbytes // 256) * 256


def test_results_of_another_dtype_pass_through_the_workspace() -> None:
    y = Operand("float16", 640, (Slab(0, 1, 0, 1280, 2),), True, (0, 1280))
    product = planned(1, y=y)
    assert [launch.kernel.function.__name__ for launch in product.launches] == ["matvec", "cast"]
    assert product.workspace_nbytes == 4 * 640
    assert product.prefetches == 0


def test_arrays_overlap_where_results_come_before_all_activations_were_read() -> None:
    product = planned(1, m=1024)
    assert product.overlaps(4096, 4096)
    assert product.overlaps(4096, 4096 + 4092)
    assert not product.overlaps(4096, 8192)
    assert not planned(1, m=1024, no_alias=False).overlaps(4096, 4096)


def test_what_is_read_from_host_memory_is_not_prefetched() -> None:
    assert planned(1).prefetch_region.nbytes == 0  # of a GPU that says nothing of its L2
    architecture = replace(HOPPER, l2_nbytes=50 << 20)
    operands = Operand.contiguous(1, 1024), Operand.contiguous(1, 640)
    regions = [
        plan(FORMATS["Q4_K"], 640, 1024, WeightLayout(16, mapped), *operands, True, architecture).prefetch_region
        for mapped in (False, True)
    ]
    assert regions[1] == NOTHING
    assert regions[0].rows * regions[0].nbytes == 640 * FORMATS["Q4_K"].row_nbytes(1024)


def test_rows_without_weights_are_zeros() -> None:
    (launch,) = planned(3, k=0).launches
    assert launch.arguments["source"] == At("zeros")
    assert launch.arguments["pitch"] == 0


@pytest.mark.parametrize(
    ("m", "k", "x", "y"),
    [
        (65, 4096, (2, 64), (2, 65)),
        (65, 4096, (2, 4096), (2, 64)),
        (65, 4096, (2, 4096), (1, 65)),
        (0, 32, (1, 32), (1, 0)),
    ],
)
def test_operands_of_other_shapes_are_refused(m: int, k: int, x: tuple[int, int], y: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"for a {m} x {k} weight x is n x {k}"):
        planned(x[0], m, k, x=Operand.contiguous(*x), y=Operand.contiguous(*y))


def test_equal_layouts_give_the_same_kernel() -> None:
    first, second = (planned(1, k=k).launches[-1].kernel for k in (4096, 8192))
    assert first is second
    assert planned(1, weights=WeightLayout(4, mapped=False)).launches[-1].kernel is not first


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].plain])
def test_activations_of_plain_formats_are_not_quantized_to_int8(name: str) -> None:
    x, y, layout = Operand.contiguous(3, 4096), Operand.contiguous(3, 128), WeightLayout(16, False)
    plans = [plan(FORMATS[name], 128, 4096, layout, x, y, int8, HOPPER) for int8 in (True, False)]
    assert plans[0] == plans[1]
