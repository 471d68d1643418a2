"""How products are cut: what every tiling and schedule must hold, over formats, alignments, shapes and GPUs.

The kernels believe these numbers; nothing here runs one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from ptx_compile import AMPERE, HOPPER, MACHINES

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.formats.format import Format as AnyFormat
from qmm.kernels.ops.matvec.plan import (
    BARRIERS_NBYTES,
    COLUMN_TILES,
    LINE_NBYTES,
    RING_NBYTES,
    SECTOR_NBYTES,
    ZERO_NBYTES,
    Activations,
    Schedule,
    Tiling,
    scale_blocks_of,
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


def schedules(block_format: Format, machine) -> Iterator[tuple[int, int, int, Schedule]]:
    """Schedules of many shapes, as (m, k, n, schedule)."""
    for (m, least), n, int8, mapped in itertools.product(SHAPES, (1, 2, 3, 5, 8), modes(block_format), (False, True)):
        k = block_format.blocks(least) * block_format.block_weights
        for alignment, fusible in ((16, True), (1, True), (16, False)):
            yield m, k, n, Schedule.of(block_format, m, k, n, int8, alignment, fusible, mapped, machine)


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
            # As multiply() and dequantize() reckon them: the unit of the block, and the block.
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
        assert tiling.lane_rows % 2 == 0  # dot_pair takes two at once


@each_format
def test_a_ring_has_two_to_eight_stages_whose_barriers_have_room(block_format: Format) -> None:
    for tiling in tilings(block_format):
        assert 2 <= tiling.stages <= 8
    # "full" from 0 on, "empty" from 64 on, of the sums "full" at 128 and 136, "empty" at 144 and 152.
    assert 8 * 8 <= 64
    assert BARRIERS_NBYTES >= 152 + 8


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
    activations = Activations(columns, int8, sums)
    for scale_blocks in (4, 32, 128, 896):
        values = np.empty((scale_blocks, 2, columns, 16), np.int8 if int8 else np.float16)
        scales = np.empty((scale_blocks, columns), np.float32)
        of_runs = np.empty((sums, scale_blocks, columns), np.float32)
        assert activations.nbytes(scale_blocks) == values.nbytes + scales.nbytes + of_runs.nbytes
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
        activations = Activations.of(block_format, columns, int8)
        # multiply(): such a lane looks from `nowhere` on, which is 64 bytes into the zeros; its address does not depend
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
def test_a_block_has_room_for_what_a_schedule_wants(block_format: Format, machine) -> None:
    for m, k, n, schedule in schedules(block_format, machine):
        case = (m, k, n, schedule)
        assert schedule.shared_nbytes(scale_blocks_of(block_format, k)) <= machine.shared_nbytes, case
        assert schedule.tiling.threads <= 1024, case
        assert schedule.tiling.threads * 16 >= ZERO_NBYTES, case  # each thread clears 16 bytes
        assert 1 <= schedule.first_stages <= schedule.tiling.stages, case


@each_format
@each_machine
def test_activations_are_in_shared_memory_or_all_in_global_memory(block_format: Format, machine) -> None:
    for m, k, n, schedule in schedules(block_format, machine):
        case = (m, k, n, schedule)
        assert schedule.activations.columns == next(tile for tile in COLUMN_TILES if tile >= n), case
        assert not (schedule.activations.sums and not schedule.activations.int8), case
        assert schedule.activations.nbytes(scale_blocks_of(block_format, k)) % 16 == 0, case
        if schedule.x_bulk:
            assert schedule.x_shared, case
            assert schedule.bulk, case
            assert not schedule.fused, case
        if schedule.fused:  # quantize_block writes to shared memory
            assert schedule.x_shared, case
            assert schedule.activations.int8 or block_format.plain, case


@each_format
@each_machine
def test_a_dequantization_fits_too(block_format: Format, machine) -> None:
    for alignment in ALIGNMENTS:
        tiling = Tiling.of_dequantization(block_format, alignment, machine)
        assert tiling.shared_nbytes(0) <= machine.shared_nbytes
        assert tiling.row_warps == 1  # dequantize() knows of no other
        assert tiling.threads <= 1024


@each_machine
def test_activations_that_do_not_fit_stay_in_global_memory(machine) -> None:
    for name in ("Q4_K", "Q8_0"):
        schedule = Schedule.of(FORMATS[name], 4096, 65536, 8, True, 16, True, False, machine)
        assert schedule.activations.nbytes(scale_blocks_of(FORMATS[name], 65536)) > machine.shared_nbytes
        assert not schedule.x_shared
        assert not schedule.fused


def test_only_activations_that_may_be_fused_are() -> None:
    q4_k = FORMATS["Q4_K"]
    for machine in (HOPPER, AMPERE):
        fused = [
            Schedule.of(q4_k, 4096, 4096, 1, int8, 16, fusible, False, machine).fused
            for int8, fusible in ((True, True), (True, False), (False, True))
        ]
        assert fused == [True, False, False]


def test_few_rows_take_fewer_at_once() -> None:
    many, few = (Schedule.of(FORMATS["Q8_0"], m, 4096, 8, True, 2, True, False, HOPPER).tiling for m in (14336, 512))
    assert (many.rows, few.rows) == (32, 16)


def test_short_rows_are_taken_several_at_once_where_they_are_many() -> None:
    many, few = (Schedule.of(FORMATS["Q4_K"], m, 768, 1, True, 16, True, False, HOPPER).tiling for m in (262144, 512))
    assert many.row_warps > 1
    assert few.row_warps == 1


def test_mapped_weights_keep_their_place_in_a_line_of_128_bytes() -> None:
    for mapped, line in ((True, LINE_NBYTES), (False, SECTOR_NBYTES)):
        assert Schedule.of(FORMATS["Q6_K"], 4096, 4096, 1, True, 16, True, mapped, HOPPER).tiling.line == line


@each_format
@pytest.mark.parametrize("n", [1, 4, 8])
def test_parts_of_mapped_rows_share_few_sectors(block_format: Format, n: int) -> None:
    schedule = Schedule.of(block_format, 14336, 4096, n, not block_format.plain, 16, True, True, HOPPER)
    row_nbytes = block_format.row_nbytes(4096)
    parts = range(0, row_nbytes, schedule.tiling.chunk_blocks * block_format.block_nbytes)
    shared = sum(part % SECTOR_NBYTES > 0 for part in parts)  # each is read twice
    assert shared * SECTOR_NBYTES <= 0.02 * row_nbytes


def test_equal_arguments_give_the_same_schedule() -> None:
    first, second = (Schedule.of(FORMATS["Q5_0"], 4096, 4096, 3, True, 2, True, False, HOPPER) for _ in range(2))
    assert first is second
    first, second = (Tiling.of_dequantization(FORMATS["Q5_0"], 2, HOPPER) for _ in range(2))
    assert first is second
