"""The executor of ``test_lanes.py`` itself: what its machine refuses, and what the twins of PTX operations do."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import lanes_twins
import numpy as np
import pytest
from lanes_machine import SHARED_WINDOW, Block, LaneError, Memory, Settings
from lanes_twins import MAKERS, TWINS, LaneTarget

from qmm.kernels.formats import FORMATS
from qmm.kernels.lang import primitives, ptx
from qmm.kernels.lang.specialize import specialize
from qmm.kernels.lang.targets.cuda import CUDATarget
from qmm.kernels.ops import dequantize
from qmm.kernels.ops import pipeline as ring
from qmm.kernels.ops import quantize as activations
from qmm.kernels.ops import read as probe
from qmm.kernels.ops.matvec import kernel as matvec
from qmm.kernels.ops.matvec.plan import Machine, Schedule
from qmm.kernels.runtime import launch

# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------

DATA = 1 << 52


def run_lanes(kernel: Callable[[], None], threads: int = 32, shared_nbytes: int = 256, **options: Any) -> Memory:
    """Runs one block in 64 bytes of data and a scratch region of 64; its barriers of shared memory are its own."""
    memory = Memory()
    memory.add("data", DATA, bytes(range(64)), constant=True)
    memory.add("scratch", DATA + 256, 64)
    settled = options.pop("settled", True)
    Block(memory, 0, 1, threads, shared_nbytes, settled, Settings(**options)).run(kernel, ())
    return memory


def of_lane(number: int, action: Callable[[], object]) -> Callable[[], None]:
    """A kernel of which one lane does something."""

    def kernel() -> None:
        if T.thread_index() == number:
            action()

    return kernel


T = SimpleNamespace(**TWINS)
WAIT = MAKERS["waiter"](True)
SHARED = SHARED_WINDOW


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: T.load_float(DATA + 64), "4 bytes at 0x10000000000040 are not within"),
        (lambda: T.load_cached16(DATA - 16), "16 bytes at .* are not within any of .*data"),
        (lambda: T.load_float(DATA + 62), "are not within"),
        (lambda: T.load_float(DATA + 2), "must be at a multiple of 4"),
        (lambda: T.load_past_floats(DATA + 8), "must be at a multiple of 16"),
        (lambda: T.store_float(DATA, np.float32(1)), "must not change"),
        (lambda: T.store_float(DATA + 256 + 62, np.float32(1)), "are not within"),
        (lambda: T.load_shared_float(SHARED + 256), "4 bytes at shared 256 are not within 256"),
        (lambda: T.load_shared16(SHARED - 16), "at shared -16"),
        (lambda: T.store_shared16(SHARED + 8, T.zero_words()), "must be at a multiple of 16"),
        (lambda: T.load_shared_float(SHARED), "nobody has written"),
        (lambda: T.copy16(SHARED + 4, DATA), "must be at a multiple of 16"),
        (lambda: T.copy16(SHARED, DATA + 8), "must be at a multiple of 16"),
        (lambda: T.copy16(SHARED, DATA + 56), "not within"),
        (lambda: T.copy16(SHARED, DATA), "copies that no barrier knew of"),
        (lambda: T.bulk_copy(SHARED, DATA, 24, SHARED + 64), "no multiple of 16"),
        (lambda: T.bulk_copy(SHARED, DATA, 16, SHARED + 64), "no barrier at shared 64"),
        (lambda: T.arrive(SHARED + 8), "no barrier at shared 8"),
        (lambda: T.initialize_barrier(SHARED + 4, 1), "must be at a multiple of 8"),
        (T.synchronize_warp, "waits for ever: 1 lanes of warp 0 at synchronize_warp"),
        (T.synchronize_block, "waits for ever: 1 lanes of warp 0 at barrier 0 of 32 threads"),
    ],
)
def test_accesses_that_are_refused(action: Callable[[], object], message: str) -> None:
    with pytest.raises(LaneError, match=message):
        run_lanes(of_lane(7, action))


def test_messages_name_the_lane() -> None:
    with pytest.raises(LaneError, match="block 0 warp 1 lane 5: 1 bytes"):
        run_lanes(of_lane(37, lambda: T.load_byte(DATA + 100)), threads=64)


def test_fields_are_read_within_shared_memory_words_around_them_too() -> None:
    loads = lanes_twins.field_loads(1)
    run_lanes(of_lane(0, lambda: loads[primitives.load16](SHARED, 239)))
    run_lanes(of_lane(0, lambda: loads[primitives.load1](SHARED, 255)))
    for primitive, offset in ((primitives.load16, 240), (primitives.load4, 252)):
        with pytest.raises(LaneError, match="not within"):
            run_lanes(of_lane(0, functools.partial(loads[primitive], SHARED, offset)))
    with pytest.raises(LaneError, match="multiple of 4"):
        run_lanes(of_lane(0, lambda: lanes_twins.field_loads(4)[primitives.load16](SHARED, 2)))
    with pytest.raises(LaneError, match="multiple of 16"):
        run_lanes(of_lane(0, lambda: lanes_twins.field_loads(16)[primitives.load16](SHARED, 8)))


def test_what_a_kernel_before_may_write_is_not_touched_before_the_wait() -> None:
    store = of_lane(0, lambda: T.store_float(DATA + 256, np.float32(1)))

    def waits() -> None:
        T.wait_for_predecessors()
        store()

    run_lanes(waits, settled=False)
    run_lanes(of_lane(0, lambda: T.load_float(DATA)), settled=False)
    with pytest.raises(LaneError, match="before it waits"):
        run_lanes(store, settled=False)


def test_lanes_at_different_instructions_are_named() -> None:
    def kernel() -> None:
        if T.lane_index() < 16:
            T.largest_of_warp(np.float32(1))
        else:
            T.sum_of_half_warp(1)

    with pytest.raises(LaneError, match=r"largest_of_warp.*sum_of_half_warp|sum_of_half_warp.*largest_of_warp"):
        run_lanes(kernel)


def test_the_same_operation_elsewhere_is_another_instruction() -> None:
    def kernel() -> None:
        if T.lane_index() < 16:
            T.synchronize_warp()
        else:
            T.synchronize_warp()

    with pytest.raises(LaneError, match=r"while .* lanes of its warp are at synchronize_warp"):
        run_lanes(kernel)


def barrier_of(count: int, then: Callable[[int], None]) -> Callable[[], None]:
    """A kernel that makes a barrier at 64 for so many arrivals, and goes on with the number of the thread."""

    def kernel() -> None:
        if T.thread_index() == 0:
            T.initialize_barrier(SHARED + 64, count)
        T.synchronize_block()
        then(T.thread_index())

    return kernel


def test_a_barrier_has_phases() -> None:
    order: list[str] = []

    def then(thread: int) -> None:
        WAIT(SHARED + 64, 1)  # the phase before the first is over
        if thread < 32:
            order.append("arrives")
            T.arrive(SHARED + 64)
        WAIT(SHARED + 64, 0)
        order.append("goes on")

    run_lanes(barrier_of(32, then), threads=64)
    assert order == ["arrives"] * 32 + ["goes on"] * 64


@pytest.mark.parametrize(
    ("count", "then", "message"),
    [
        (33, lambda thread: T.arrive(SHARED + 64) or WAIT(SHARED + 64, 0), "1 of 33 arrivals and 0 bytes to come"),
        (1, lambda thread: T.store_shared_float(SHARED + 68, np.float32(1)), "4 bytes at shared 68: a barrier"),
        (1, lambda thread: T.initialize_barrier(SHARED + 64, 1), "again"),
        (32, lambda thread: T.expect(SHARED + 64, 16) or T.arrive(SHARED + 64) or T.arrive(SHARED + 64), "nobody"),
        (32, lambda thread: WAIT(SHARED + 64, 0), "32 lanes of warp 0 at parity 0 of the barrier at shared 64"),
    ],
)
def test_misuse_of_a_barrier(count: int, then: Callable[[int], None], message: str) -> None:
    with pytest.raises(LaneError, match=message):
        run_lanes(barrier_of(count, then))


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "by 16"])
@pytest.mark.parametrize("late", [True, False], ids=["late", "at once"])
def test_copies_land_before_a_barrier_completes(bulk: bool, late: bool) -> None:
    found: list[list[int]] = []

    def then(thread: int) -> None:
        if thread == 3:
            if bulk:
                T.expect(SHARED + 64, 32)
                T.bulk_copy(SHARED, DATA + 16, 32, SHARED + 64)
                T.arrive(SHARED + 64)
            else:
                T.copy16(SHARED, DATA + 16)
                T.copy16(SHARED + 16, DATA + 32)
                T.arrive_after_copies(SHARED + 64)
        if thread == 20:
            WAIT(SHARED + 64, 0)
            found.append(T.load_shared16(SHARED + 16).view(np.uint8).tolist())

    run_lanes(barrier_of(1, then), late=late)
    assert found == [list(range(32, 48))]


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "ends"])
def test_a_copy_that_is_not_waited_for(reads: bool) -> None:
    def then(thread: int) -> None:
        if thread == 3:
            T.expect(SHARED + 64, 16)
            T.bulk_copy(SHARED, DATA, 16, SHARED + 64)
            T.arrive(SHARED + 64)
            if reads:
                T.load_shared16(SHARED)

    message = "reads 16 bytes at shared 0: the target of a copy under way" if reads else "copies were under way"
    with pytest.raises(LaneError, match=message):
        run_lanes(barrier_of(1, then))


def test_warps_meet_at_barriers_by_number() -> None:
    order: list[str] = []
    arrive, wait = MAKERS["barrier_arrive"](1, 64), MAKERS["barrier_wait"](1, 64)

    def kernel() -> None:
        if T.thread_index() < 32:
            order.append("arrives")
            arrive()
        else:
            wait()
            order.append("goes on")

    run_lanes(kernel, threads=64, slow=0)
    assert order == ["arrives"] * 32 + ["goes on"] * 32
    with pytest.raises(LaneError, match="waits for ever: 32 lanes of warp 0 at barrier 1 of 64 threads"):
        run_lanes(wait)
    with pytest.raises(LaneError, match="warps were expected at barriers"):
        run_lanes(arrive)


# ---------------------------------------------------------------------------------------------------------------------
# The twins
# ---------------------------------------------------------------------------------------------------------------------

KERNELS = (activations, dequantize, matvec, probe, ring)
NO_OPERATIONS = {"COMMON", "VECTORS", "assembly", "quad", "words_of"}


def test_every_operation_of_ptx_has_a_twin() -> None:
    assert set(ptx.__all__) - NO_OPERATIONS == set(TWINS) | set(MAKERS)


@pytest.mark.parametrize("module", KERNELS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_name_that_a_kernel_takes_from_ptx_has_a_twin(module: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(module))
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "qmm.kernels.lang.ptx"
    ]
    names = {alias.name for node in imports for alias in node.names}
    target = LaneTarget(16)
    assert names
    assert all(target.intrinsic(getattr(ptx, name)) is TWINS[name] for name in names)


def test_every_operation_that_a_launch_names_has_a_twin() -> None:
    named: set[str] = set()
    for block_format, int8, bulk in itertools.product(FORMATS.values(), (True, False), (True, False)):
        schedule = Schedule.of(block_format, 64, 512, 8, int8, 4, True, False, Machine(2, 101376, bulk))
        for x_shared in (True, False):
            kernel = launch.matvec_kernel(block_format, replace(schedule, x_shared=x_shared))
            named |= names_in(kernel.key["constants"])
        named |= names_in(launch.dequantize_kernel(block_format, schedule.tiling, bulk).key["constants"])
    for dtype in launch.LOADS:
        named |= names_in(launch.quantize_kernel(dtype, True).key["constants"])
        named |= names_in(launch.cast_kernel(dtype).key["constants"])
    assert named >= {"waiter", "fence", "copy_edge4", "shared_floats", "cached_floats", "load_half", "store_bfloat"}
    assert named <= set(TWINS) | set(MAKERS)


def names_in(constants: dict[str, Any]) -> set[str]:
    return {
        value if isinstance(value, str) else value[0] for value in constants.values() if type(value) in (str, tuple)
    }


def test_every_primitive_of_the_gpu_has_a_twin() -> None:
    target = LaneTarget(2)
    of_gpu = CUDATarget(2)._intrinsics
    assert {primitive.__name__ for primitive in of_gpu} == set(primitives.__all__)
    assert all(target.intrinsic(primitive) is not None for primitive in of_gpu)


def test_a_missing_twin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TWINS, "reciprocal")
    with pytest.raises(LaneError, match=r"ptx\.reciprocal has no twin"):
        specialize(activations.int8_scale, {}, LaneTarget(16))
    for value in ("no_operation", ("no_maker", 1)):
        with pytest.raises(LaneError, match="has no twin"):
            LaneTarget.operation(value)


def by_lane(function: Callable[[int], Any]) -> list[Any]:
    """What each lane of a warp gets."""
    found: list[Any] = [None] * 32

    def kernel() -> None:
        lane = T.lane_index()
        found[lane] = function(lane)

    run_lanes(kernel)
    return found


def test_pairs_of_rows_by_the_tensor_cores(rng: np.random.Generator) -> None:
    a, b, x = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((32, 16), (32, 16), (2, 16)))
    zeros = np.zeros(16, np.int8)

    def lane_words(lane: int) -> Any:
        g, t = lane >> 2, lane & 3
        words = (a[lane], b[lane], x[g % 2] if t == g // 2 else zeros)
        return T.dot_pair(*[side.view(np.uint32) for side in words])

    for lane, got in enumerate(by_lane(lane_words)):
        dots = [int(row.astype(int) @ column.astype(int)) for row in (a[lane], b[lane]) for column in x]
        assert [float(value) - 12582912 for value in got] == dots
        assert {type(value) for value in got} == {np.float32}


def test_short_numbers_by_the_tensor_cores(rng: np.random.Generator) -> None:
    a, b, x = (rng.integers(-1024, 1024, (8, 64)).astype(np.float32) for _ in range(3))

    def lane_sums(lane: int) -> Any:
        g, part = lane >> 2, slice(16 * (lane & 3), 16 * (lane & 3) + 16)
        return T.dot_short(a[g, part], b[g, part], x[g, part], (np.float32(lane), *[np.float32(0)] * 3))

    for lane, got in enumerate(by_lane(lane_sums)):
        g, t = lane >> 2, lane & 3
        expected = [*(a[g] @ x[2 * t : 2 * t + 2].T), *(b[g] @ x[2 * t : 2 * t + 2].T)]
        expected[0] += lane
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(LaneError, match="TF32"):
        by_lane(lambda lane: T.dot_short(*[np.full(16, 1 + 2**-12, np.float32)] * 3, (np.float32(0),) * 4))


def test_exchanges_between_lanes() -> None:
    number = np.float32
    assert by_lane(lambda lane: T.share(number(lane), number(100 * lane), 1, lane & 1)) == [
        (lane & -2) * 2 + 1 if lane % 2 == 0 else 100 * ((lane & -2) * 2 + 1) for lane in range(32)
    ]
    assert by_lane(lambda lane: T.sum_of_half_warp(lane - 7)) == [8] * 16 + [264] * 16
    packed = by_lane(lambda lane: T.sum_of_four_words(np.uint32(0xFF0201FF)))  # -1, 1, 2 and -1, four times
    assert packed == [4.0] * 32
    assert by_lane(lambda lane: T.largest_of_warp(number(-lane))) == [31.0] * 32
    assert by_lane(lambda lane: T.largest_of_eight(number(-lane))) == [lane | 7 for lane in range(32)]
    with_nan = by_lane(lambda lane: T.largest_of_eight(number(np.nan if lane == 9 else 1)))
    assert [lane for lane, value in enumerate(with_nan) if np.isnan(value)] == list(range(8, 16))


def test_arithmetic_is_float32_and_rounds_as_it_should() -> None:
    number = np.float32
    one = T.fused(number(1 + 2**-23), number(1 - 2**-23), number(-1))
    assert (one, type(one)) == (number(-(2**-46)), np.float32)
    assert [T.scaled_byte(number(value), number(0.5)) for value in (1, 3, 5, -3, 254, -256)] == [0, 2, 2, -2, 127, -128]
    assert int(T.scaled_bytes(*map(number, (2, -2, 4, 253)), number(0.5))) == 0x7E02FF01
    assert int(T.two_halves(number(1), number(-2.5))) == 0xC1003C00
    assert T.power_of_two_below(number(1e38)) == 2.0**126
    assert T.power_of_two_below(number(3e38)) == 2.0**126
    assert T.power_of_two_below(number(0.75)) == 0.5
    assert T.reciprocal(number(3)) == number(1) / number(3)
    assert np.isnan(T.largest_of_values(*map(number, (1, np.nan, -5, 2))))
    assert T.largest_of_values(*map(number, (1, -7, 5, 2))) == 7
    assert type(T.dot_floats(np.ones(16, np.float32), np.ones(16, np.float32))) is np.float32


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (1 + 2**-8, 0x3F80),
        (1 + 3 * 2**-8, 0x3F82),
        (np.nan, 0x7FFF),
        (-np.inf, 0xFF80),
        (3.4e38, 0x7F80),
    ],
)
def test_bfloat16_rounds_halves_to_even(value: float, bits: int) -> None:
    memory = run_lanes(of_lane(0, lambda: T.store_bfloat(DATA + 256, np.float32(value))))
    assert int.from_bytes(memory.regions[1].data[:2], "little") == bits
