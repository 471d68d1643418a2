"""The CUDA kernels' own source, run lane by lane on the CPU, in memory that refuses what lies outside a tensor.

What runs is what Numba gets to compile, with the twins of ``lanes_twins.py`` for the operations in PTX; what the
machine refuses, ``lanes_machine.py`` says.
"""

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
from gguf_files import random_blocks
from lanes import LaneGPU, Outcome, expected_reads, run_dequantization, run_product
from lanes_machine import SHARED_WINDOW, Block, LaneError, Memory, Settings
from lanes_twins import MAKERS, TWINS, LaneTarget

from qmm.arrays import View
from qmm.gpu import NOTHING
from qmm.kernels import activations, dequantize, launch, matvec, primitives, probe, ptx, ring
from qmm.kernels.cuda_target import CUDATarget
from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.specialize import specialize
from qmm.kernels.staging import WARPS, Machine, Schedule, Tiling

HOPPER = Machine(2, 232448, True)
AMPERE = Machine(2, 166912, False)
ADA = Machine(2, 101376, False)
AT_ONCE = Settings(late=False)

formats = pytest.mark.parametrize("name", FORMATS)


def depth(block_format: Format, which: str) -> int:
    """Weights of a row: one block, some that are less than a chunk, more than one chunk."""
    if block_format.plain:
        return {"one": 5, "short": 37, "deep": 1100}[which]
    blocks = {"one": 1, "short": 3, "deep": 19}[which]
    return block_format.block_weights * (blocks if block_format.block_weights == 256 else 4 * blocks - 3)


# Machine, m, k, n, and what run_product is told besides. Where there is one multiprocessor only, a block takes more
# chunks than the ring has stages.
CASES: dict[str, tuple[Machine, int, str, int, dict[str, Any]]] = {
    "fused": (replace(HOPPER, multiprocessors=1), 70, "deep", 1, {}),
    "mapped": (HOPPER, 20, "short", 2, {"int8": False, "mapped": True, "shift": 13, "settings": Settings(slow=0)}),
    "not fused": (HOPPER, 70, "short", 3, {"x_shift": 4, "shift": 2, "settings": Settings(late=False, slow=5)}),
    "eight": (HOPPER, 37, "short", 8, {"settings": Settings(seed=1)}),
    "eight, f16": (HOPPER, 20, "one", 8, {"int8": False, "settings": Settings(seed=2)}),
    "many rows": (replace(HOPPER, multiprocessors=1), 130, "one", 1, {"shift": 6, "settings": Settings(slow=3)}),
    "copied by 16": (replace(AMPERE, multiprocessors=1), 70, "deep", 1, {"mapped": True, "shift": 13}),
    "one block": (AMPERE, 5, "one", 3, {"int8": False, "settings": AT_ONCE}),
    "three, small": (ADA, 37, "short", 3, {"shift": 8, "settings": Settings(slow=8)}),
    "eight, small": (ADA, 13, "deep", 8, {"shift": 4, "settings": Settings(late=False, slow=2)}),
    "eight, small, bulk copies": (replace(ADA, bulk=True), 21, "deep", 8, {"shift": 6, "settings": Settings(slow=7)}),
    "few rows": (replace(HOPPER, multiprocessors=8), 40, "deep", 8, {"shift": 2}),
    "eight, in turn": (replace(AMPERE, multiprocessors=1), 70, "deep", 8, {"shift": 13, "settings": Settings(slow=4)}),
}


def run_case(name: str, case: str) -> Outcome:
    machine, m, which, n, options = CASES[case]
    block_format = FORMATS[name]
    shift = options.get("shift", 0)
    if block_format.plain and shift % min(4, block_format.alignment):
        shift = 8  # numbers lie at multiples of their size
    return run_product(name, m, depth(block_format, which), n, machine=machine, **{**options, "shift": shift})


@formats
@pytest.mark.parametrize("case", CASES)
def test_products(name: str, case: str, schedules: dict[tuple[str, str], Schedule]) -> None:
    schedules[name, case] = run_case(name, case).schedule


@pytest.fixture(scope="module")
def schedules() -> dict[tuple[str, str], Schedule]:
    """What the products ran with, by format and case."""
    return {}


def test_the_products_differ_in_what_schedules_differ_in(
    schedules: dict[tuple[str, str], Schedule], request: pytest.FixtureRequest
) -> None:
    if len(schedules) < len(FORMATS) * len(CASES):
        pytest.skip("not all products were run")
    found = {
        "fused": {schedule.fused for schedule in schedules.values()},
        "x shared": {(schedule.x_shared, schedule.x_bulk, schedule.bulk) for schedule in schedules.values()},
        "warps": {schedule.tiling.warps for schedule in schedules.values()},
        "rows": {(schedule.tiling.lane_rows, schedule.tiling.row_warps) for schedule in schedules.values()},
        "units": {schedule.tiling.units for schedule in schedules.values()},
        "line": {schedule.tiling.line for schedule in schedules.values()},
        "alignment": {schedule.tiling.alignment for schedule in schedules.values()},
        "columns": {schedule.activations.columns for schedule in schedules.values()},
        "filled first": {schedule.first_stages < schedule.tiling.stages for schedule in schedules.values()},
    }
    assert found == {
        "fused": {False, True},
        "x shared": {
            (False, False, False),
            (True, False, False),
            (False, False, True),
            (True, False, True),
            (True, True, True),
        },
        "warps": {4, 8, 16},
        "rows": {(2, 1), (4, 1), (2, 2), (2, 4)},
        "units": {1, 2},
        "line": {32, 128},
        "alignment": {1, 2, 4, 8, 16},
        "columns": {1, 2, 4, 8},
        "filled first": {False, True},
    }
    for (name, case), schedule in schedules.items():
        machine, m, which, _, _ = CASES[case]
        if machine.multiprocessors == 1 and which == "deep":
            blocks = FORMATS[name].blocks(depth(FORMATS[name], which))
            chunks = -(-m // schedule.tiling.rows) * -(-blocks // schedule.tiling.chunk_blocks)
            assert chunks > schedule.tiling.stages, (name, case)


@formats
@pytest.mark.parametrize("machine", [HOPPER, replace(ADA, multiprocessors=1)], ids=["bulk", "by 16"])
def test_dequantization(name: str, machine: Machine) -> None:
    block_format = FORMATS[name]
    run_dequantization(name, 37, depth(block_format, "short"), machine=machine)
    shift = 4 if block_format.plain else 13
    run_dequantization(name, 20, depth(block_format, "deep"), machine=machine, shift=shift, settings=AT_ONCE)


def test_aligned_rows_are_read_exactly_once() -> None:
    for machine in (HOPPER, AMPERE):
        outcome = run_product("Q4_K", 37, 512, 3, machine=machine)
        assert set(outcome.reads) == {1}


@pytest.mark.parametrize("machine", [HOPPER, AMPERE], ids=["bulk", "by 16"])
@pytest.mark.parametrize(("name", "k", "shift"), [("F16", 3, 4), ("BF16", 5, 10), ("F32", 1, 12), ("Q4_0", 32, 15)])
def test_tensors_of_a_few_bytes(name: str, k: int, shift: int, machine: Machine) -> None:
    run_product(name, 1, k, 1, machine=machine, shift=shift)
    run_dequantization(name, 1, k, machine=machine, shift=shift)


@pytest.mark.parametrize("machine", [HOPPER, AMPERE], ids=["bulk", "by 16"])
def test_tensors_that_start_and_end_anywhere(machine: Machine) -> None:
    for shift in range(16):
        run_dequantization("Q4_0", 1, 32, machine=machine, shift=shift)
        run_dequantization("Q8_0", 3, 32, machine=machine, shift=shift)


def test_expected_reads_by_hand() -> None:
    # Rows of 34 bytes from byte 2 of 16 on: 2..36, 36..70. The 16 bytes from 32 on are read for both.
    tiling = Tiling.of(FORMATS["Q8_0"], 2, 1 << 17)
    reads = expected_reads(FORMATS["Q8_0"], tiling, 256 + 2, 2, 32)
    assert reads.tolist() == [1] * 30 + [2] * 16 + [1] * 22


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_in_and_out(dtype: str) -> None:
    for int8 in (True, False):
        run_product("Q5_1", 20, 96, 3, dtype=dtype, int8=int8)


def test_more_columns_than_a_product_takes() -> None:
    for machine in (HOPPER, AMPERE):
        run_product("Q6_K", 5, 256, 9, machine=machine)
        run_product("Q4_0", 5, 64, 9, machine=machine, x_shift=8)


@pytest.mark.parametrize(
    ("mapped", "most"), [(False, 1 << 20), (False, 2000), (True, 1 << 20)], ids=["all", "some", "mapped"]
)
def test_what_comes_next_is_brought_in_and_nothing_else(mapped: bool, most: int, rng: np.random.Generator) -> None:
    sizes = [("Q8_0", 37, 96, 1), ("Q4_K", 20, 512, 8), ("Q6_K", 3, 256, 12), ("Q5_0", 51, 32, 2)]
    with LaneGPU(HOPPER, mapped=mapped) as gpu:
        gpu._next_nbytes = most
        weights, products, expected = [], [], []
        for i, (name, m, k, n) in enumerate(sizes):
            weight = gpu.add(name, random_blocks(name, (m, k), rng), constant=True, shift=(0, 2, 6, 16)[i])
            x = rng.standard_normal((n, k)).astype(np.float32)
            source, target = gpu.add("x", x.tobytes()), gpu.add("y", 4 * n * m)
            expected.append(gpu.matmul_host(FORMATS[name], weight.start, m, k, x, True, 0))
            x_view = View((n, k), (4 * k, 4), "float32", source.start, 0)
            y_view = View((n, m), (4 * m, 4), "float32", target.start, 0)
            weights.append(weight)
            products.append((gpu.prepare(FORMATS[name], weight.start, m, k, x_view, y_view, True), x_view, y_view))
        scratch = gpu.allocate(max(product.scratch_nbytes for product, _, _ in products), "scratch")
        gpu.sequence([(product, x.address, y.address) for product, x, y in products], 0, scratch)
        for (_, _, y), values in zip(products, expected, strict=True):
            got = np.frombuffer(gpu.memory.find(y.address, 4).data, np.float32)
            np.testing.assert_array_equal(got, values.ravel())
    assert not any(weights[0].brought)
    for weight, (name, m, k, _), (product, _, _) in zip(weights[1:], sizes[1:], products[1:], strict=True):
        row_nbytes = FORMATS[name].row_nbytes(k)
        start, pitch, count, nbytes = product.opening
        if mapped:
            assert product.opening == NOTHING
        else:
            assert (start, pitch % row_nbytes) == (weight.start, 0)
        assert count * pitch <= m * row_nbytes
        assert nbytes == pitch or nbytes < row_nbytes
        assert count * nbytes <= most
        brought = bytearray(len(weight.data))
        for i in range(count):
            first, last = -(-(start + i * pitch) // 16), (start + i * pitch + nbytes) // 16
            brought[16 * first - weight.start : 16 * last - weight.start] = b"\1" * (16 * (last - first))
        assert any(brought) or mapped
        assert weight.brought == brought


def weights_of(gpu: LaneGPU, name: str, m: int, k: int, rng: np.random.Generator) -> int:
    data = random_blocks(name, (m, k), rng)
    return gpu.add("weights", data, constant=True, shift=2).start


def test_views_of_any_strides(rng: np.random.Generator) -> None:
    m, k = 7, 96
    memory = rng.standard_normal((3, 4, 2 * k)).astype(np.float32)
    x = memory[:, ::2, ::2]
    spaced = np.zeros((3, 2, 2 * m), np.float32)[..., ::2]
    with LaneGPU(HOPPER) as gpu:
        weights = weights_of(gpu, "Q5_0", m, k, rng)
        source = gpu.add("x", memory.tobytes())
        target = gpu.add("y", bytes(2 * 4 * 6 * m))
        expected = gpu.matmul_host(FORMATS["Q5_0"], weights, m, k, np.ascontiguousarray(x).reshape(6, k), True, 0)
        x_view = View(x.shape, x.strides, "float32", source.start, 0)
        y_view = View(spaced.shape, spaced.strides, "float32", target.start, 0)
        gpu.matmul(FORMATS["Q5_0"], weights, m, k, x_view, y_view, True, 0)
    outputs = np.frombuffer(target.data, np.float32).reshape(6, 2 * m)
    np.testing.assert_array_equal(outputs[:, ::2], expected)
    assert (outputs[:, 1::2] == 0).all()


@pytest.mark.parametrize("k", [37, 40])
def test_rows_of_any_length_that_begin_at_multiples_of_16(k: int, rng: np.random.Generator) -> None:
    m, spaced = 7, np.full((2, 44), np.nan, np.float32)
    x = spaced[:, :k] = rng.standard_normal((2, k)).astype(np.float32)
    with LaneGPU(HOPPER) as gpu:
        weights = weights_of(gpu, "F16", m, k, rng)
        source = gpu.add("x", spaced.tobytes()[: 4 * (44 + k)])
        target = gpu.add("y", bytes(4 * 2 * m))
        expected = gpu.matmul_host(FORMATS["F16"], weights, m, k, x, False, 0)
        x_view = View((2, k), (4 * 44, 4), "float32", source.start, 0)
        gpu.matmul(
            FORMATS["F16"], weights, m, k, x_view, View((2, m), (4 * m, 4), "float32", target.start, 0), False, 0
        )
    np.testing.assert_array_equal(np.frombuffer(target.data, np.float32).reshape(2, m), expected)


@pytest.mark.parametrize("name", ["Q8_0", "BF16"])
def test_results_may_take_the_place_of_the_activations(name: str, rng: np.random.Generator) -> None:
    size = 96
    int8 = not FORMATS[name].plain
    x = rng.standard_normal((1, size)).astype(np.float32)
    with LaneGPU(HOPPER) as gpu:
        weights = weights_of(gpu, name, size, size, rng)
        expected = gpu.matmul_host(FORMATS[name], weights, size, size, x, int8, 0)
        both = gpu.add("x, then y", x.tobytes())
        view = View((1, size), (4 * size, 4), "float32", both.start, 0)
        assert gpu.prepare(FORMATS[name], weights, size, size, view, view, int8).meet(both.start, both.start)
        gpu.matmul(FORMATS[name], weights, size, size, view, view, int8, 0)
    np.testing.assert_array_equal(np.frombuffer(both.data, np.float32), expected[0])


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
def test_what_is_not_finite_is_not_lost(int8: bool, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 512)).astype(np.float32)
    x[1, 300] = np.nan
    x[2, 7] = np.inf
    with LaneGPU(HOPPER) as gpu:
        weights = weights_of(gpu, "Q4_K", 5, 512, rng)
        y = gpu.matmul_host(FORMATS["Q4_K"], weights, 5, 512, x, int8, 0)
        clean = gpu.matmul_host(FORMATS["Q4_K"], weights, 5, 512, x[[0, 3]], int8, 0)
    assert not np.isfinite(y[1:3]).any()
    np.testing.assert_allclose(y[[0, 3]], clean, rtol=1e-5)


def test_bytes_are_read_where_they_lie(rng: np.random.Generator) -> None:
    data = rng.bytes(2000)
    with LaneGPU(HOPPER) as gpu:
        source = gpu.add("file", data, constant=True, shift=3)
        assert gpu.read_bytes(source.start, len(data), 0) == data
    assert set(source.reads) == {1}


@pytest.mark.parametrize("nbytes", [0, 15, 16, 100_000])
def test_the_checksum_takes_in_each_piece(nbytes: int, rng: np.random.Generator) -> None:
    data = np.frombuffer(rng.bytes(nbytes), np.uint8)
    with LaneGPU(HOPPER) as gpu:
        source = gpu.add("file", data.tobytes(), constant=True)
        target = gpu.add("sums", 3 * 32 * WARPS * 4)
        launch.checksum_kernel(8).launch(0, 3, 0, source.start, nbytes, target.start)
    whole = nbytes // 16 * 16
    assert set(source.reads[:whole]) <= {1}
    assert not source.reads[whole:].any()
    sums = np.frombuffer(target.data, np.uint32)
    assert np.bitwise_xor.reduce(sums) == np.bitwise_xor.reduce(data[:whole].view(np.uint32), initial=np.uint32(0))


# ---------------------------------------------------------------------------------------------------------------------
# What would not go unnoticed: the machine made faulty on purpose
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [HOPPER, AMPERE], ids=["bulk", "by 16"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("edges", "not within any of"),
        ("waits", "target of a copy under way|nobody has written"),
        ("warps", "target of a copy under way|arrives where nobody is expected"),
    ],
)
def test_faults_of_a_product_are_found(fault: str, message: str, machine: Machine) -> None:
    machine = replace(machine, multiprocessors=1)
    run = functools.partial(run_product, "Q8_0", 70, 2144, 1, machine=machine, shift=2)
    with pytest.raises(LaneError, match=message):
        run(settings=Settings(faults=frozenset({fault})))


def test_activations_read_too_early_are_found() -> None:
    settings = Settings(faults=frozenset({"predecessors"}))
    for x_shift in (0, 4):  # by the product, and by the kernel that quantizes
        with pytest.raises(LaneError, match="before it waits for the kernels that may write it"):
            run_product("Q8_0", 5, 64, 1, x_shift=x_shift, settings=settings)


@pytest.mark.parametrize(("fault", "message"), [("edges", "not within any of"), ("waits", "copy under way")])
def test_faults_of_a_dequantization_are_found(fault: str, message: str) -> None:
    with pytest.raises(LaneError, match=message):
        run_dequantization("Q6_K", 5, 512, shift=2, settings=Settings(faults=frozenset({fault})))


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
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "qmm.kernels.ptx"]
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
