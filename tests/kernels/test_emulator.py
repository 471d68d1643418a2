"""What the emulator refuses, and how it runs lanes, warps, barriers and copies."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qmm.kernels.lang import simd
from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.fields import DEFAULT_FIELDS, FieldAccess, load1, load4, load16
from qmm.kernels.lang.masks import mask, masks_of
from qmm.kernels.lang.ptx.arithmetic import fma, zero_words
from qmm.kernels.lang.ptx.barrier import (
    mbarrier_arrive,
    mbarrier_arrive_after_copies,
    mbarrier_expect_tx,
    mbarrier_init,
    mbarrier_wait,
    named_barrier_arrive,
    named_barrier_wait,
    sync_cta,
    sync_warp,
)
from qmm.kernels.lang.ptx.copy import bulk_copy, copy16
from qmm.kernels.lang.ptx.global_memory import (
    load_global16,
    load_global_byte,
    load_global_float,
    load_global_floats_l2,
    store_global_float,
)
from qmm.kernels.lang.ptx.grid import lane_index, thread_index, wait_for_predecessors
from qmm.kernels.lang.ptx.shared_memory import load_shared16, load_shared_float, store_shared16, store_shared_float
from qmm.kernels.lang.ptx.warp import max_magnitude_of_warp, sum_of_half_warp
from qmm.kernels.lang.simd import store_float
from qmm.kernels.lang.specialize import registers, unroll
from qmm.kernels.lang.targets.emulator import EmulatorError, Memory, Region, Settings, emulate, launch
from qmm.kernels.lang.targets.emulator.memory import SHARED_START as SHARED
from qmm.kernels.runtime.kernel import Kernel

# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------

DATA = 1 << 52


def run_lanes(
    kernel: Callable[[], None],
    threads: int = 32,
    shared_nbytes: int = 256,
    fields: FieldAccess | None = DEFAULT_FIELDS,
    after_predecessors: bool = True,
    **options: Any,
) -> Memory:
    """Runs one CTA in 64 bytes of data and a scratch region of 64; its barriers of shared memory are its own."""
    memory = Memory()
    memory.add("data", bytes(range(64)), constant=True, address=DATA)
    memory.add("scratch", 64, address=DATA + 256)
    launch(
        kernel,
        {},
        memory=memory,
        grid=1,
        threads=threads,
        shared_nbytes=shared_nbytes,
        fields=fields,
        settings=Settings(**options),
        after_predecessors=after_predecessors,
    )
    return memory


def of_lane(number: int, action: Callable[[], object]) -> Callable[[], None]:
    """A kernel of which one lane does something."""

    def kernel() -> None:
        if thread_index() == number:
            action()

    return kernel


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: load_global_float(DATA + 64), "4 bytes at 0x10000000000040 are not within"),
        (lambda: load_global16(DATA - 16), "16 bytes at .* are not within any of .*data"),
        (lambda: load_global_float(DATA + 62), "are not within"),
        (lambda: load_global_float(DATA + 2), "must be at a multiple of 4"),
        (lambda: load_global_floats_l2(DATA + 8), "must be at a multiple of 16"),
        (lambda: store_global_float(DATA, np.float32(1)), "must not change"),
        (lambda: store_global_float(DATA + 256 + 62, np.float32(1)), "are not within"),
        (lambda: load_shared_float(SHARED + 256), "4 bytes at shared 256 are not within 256"),
        (lambda: load_shared16(SHARED - 16), "at shared -16"),
        (lambda: store_shared16(SHARED + 8, zero_words()), "must be at a multiple of 16"),
        (lambda: load_shared_float(SHARED), "nobody has written"),
        (lambda: copy16(SHARED + 4, DATA), "must be at a multiple of 16"),
        (lambda: copy16(SHARED, DATA + 8), "must be at a multiple of 16"),
        (lambda: copy16(SHARED, DATA + 56), "not within"),
        (lambda: copy16(SHARED, DATA), "copies that no barrier knew of"),
        (lambda: bulk_copy(SHARED, DATA, 24, SHARED + 64), "no multiple of 16"),
        (lambda: bulk_copy(SHARED, DATA, 16, SHARED + 64), "no barrier at shared 64"),
        (lambda: mbarrier_arrive(SHARED + 8), "no barrier at shared 8"),
        (lambda: mbarrier_init(SHARED + 4, 1), "must be at a multiple of 8"),
        (sync_warp, "waits for ever: 1 lanes of warp 0 at sync_warp"),
        (sync_cta, "waits for ever: 1 lanes of warp 0 at barrier 0 of 32 threads"),
    ],
)
def test_accesses_that_are_refused(action: Callable[[], object], message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run_lanes(of_lane(7, action))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: load_global_float(DATA + 61), "the read ends 1 bytes past the end of data"),
        (lambda: load_global_float(DATA - 2), "the read begins 2 bytes before data"),
        (lambda: store_global_float(DATA + 254, np.float32(1)), "the write begins 2 bytes before scratch"),
        (lambda: load1(8, 0), "the read begins .* bytes before data"),
    ],
)
def test_messages_say_what_and_where(action: Callable[[], object], message: str) -> None:
    with pytest.raises(EmulatorError, match=f"are not within any of .*; {message}$"):
        run_lanes(of_lane(5, action), fields=FieldAccess(1, "global"))


def test_messages_name_the_lane() -> None:
    with pytest.raises(EmulatorError, match="CTA 0 warp 1 lane 5: 1 bytes"):
        run_lanes(of_lane(37, lambda: load_global_byte(DATA + 100)), threads=64)


def test_fields_are_read_within_shared_memory_words_around_them_too() -> None:
    run_lanes(of_lane(0, lambda: load16(SHARED, 239)))
    run_lanes(of_lane(0, lambda: load1(SHARED, 255)))
    for load, offset in ((load16, 240), (load4, 252)):
        with pytest.raises(EmulatorError, match="not within"):
            run_lanes(of_lane(0, lambda load=load, offset=offset: load(SHARED, offset)))
    with pytest.raises(EmulatorError, match="multiple of 4"):
        run_lanes(of_lane(0, lambda: load16(SHARED, 2)), fields=FieldAccess(4, "shared"))
    with pytest.raises(EmulatorError, match="multiple of 4"):
        run_lanes(of_lane(0, lambda: load16(SHARED, 10)), fields=FieldAccess(8, "shared"))
    with pytest.raises(EmulatorError, match="multiple of 16"):
        run_lanes(of_lane(0, lambda: load16(SHARED, 8)), fields=FieldAccess(16, "shared"))


def test_what_a_kernel_before_may_write_is_not_touched_before_the_wait() -> None:
    store = of_lane(0, lambda: store_global_float(DATA + 256, np.float32(1)))

    def waits() -> None:
        wait_for_predecessors()
        store()

    run_lanes(waits, after_predecessors=False)
    run_lanes(of_lane(0, lambda: load_global_float(DATA)), after_predecessors=False)
    with pytest.raises(EmulatorError, match="before it waits"):
        run_lanes(store, after_predecessors=False)


def test_lanes_at_different_instructions_are_named() -> None:
    def kernel() -> None:
        if lane_index() < 16:
            max_magnitude_of_warp(np.float32(1))
        else:
            sum_of_half_warp(1)

    with pytest.raises(
        EmulatorError, match=r"max_magnitude_of_warp.*sum_of_half_warp|sum_of_half_warp.*max_magnitude_of_warp"
    ):
        run_lanes(kernel)


def test_the_same_operation_elsewhere_is_another_instruction() -> None:
    def kernel() -> None:
        if lane_index() < 16:
            sync_warp()
        else:
            sync_warp()

    with pytest.raises(EmulatorError, match=r"while .* lanes of its warp are at sync_warp"):
        run_lanes(kernel)


def barrier_of(count: int, then: Callable[[int], None]) -> Callable[[], None]:
    """A kernel that makes a barrier at 64 for so many arrivals, and goes on with the number of the thread."""

    def kernel() -> None:
        if thread_index() == 0:
            mbarrier_init(SHARED + 64, count)
        sync_cta()
        then(thread_index())

    return kernel


def test_a_barrier_has_phases() -> None:
    order: list[str] = []

    def then(thread: int) -> None:
        mbarrier_wait(SHARED + 64, 1, True)  # the phase before the first is over
        if thread < 32:
            order.append("arrives")
            mbarrier_arrive(SHARED + 64)
        mbarrier_wait(SHARED + 64, 0, True)
        order.append("goes on")

    run_lanes(barrier_of(32, then), threads=64)
    assert order == ["arrives"] * 32 + ["goes on"] * 64


@pytest.mark.parametrize(
    ("count", "then", "message"),
    [
        (
            33,
            lambda thread: mbarrier_arrive(SHARED + 64) or mbarrier_wait(SHARED + 64, 0, True),
            "1 of 33 arrivals and 0 bytes to come",
        ),
        (1, lambda thread: store_shared_float(SHARED + 68, np.float32(1)), "4 bytes at shared 68: a barrier"),
        (1, lambda thread: mbarrier_init(SHARED + 64, 1), "again"),
        (
            32,
            lambda thread: (
                mbarrier_expect_tx(SHARED + 64, 16) or mbarrier_arrive(SHARED + 64) or mbarrier_arrive(SHARED + 64)
            ),
            "nobody",
        ),
        (
            32,
            lambda thread: mbarrier_wait(SHARED + 64, 0, True),
            "32 lanes of warp 0 at parity 0 of the barrier at shared 64",
        ),
    ],
)
def test_misuse_of_a_barrier(count: int, then: Callable[[int], None], message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        run_lanes(barrier_of(count, then))


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "by 16"])
@pytest.mark.parametrize("late", [True, False], ids=["late", "at once"])
def test_copies_land_before_a_barrier_completes(bulk: bool, late: bool) -> None:
    found: list[list[int]] = []

    def then(thread: int) -> None:
        if thread == 3:
            if bulk:
                mbarrier_expect_tx(SHARED + 64, 32)
                bulk_copy(SHARED, DATA + 16, 32, SHARED + 64)
                mbarrier_arrive(SHARED + 64)
            else:
                copy16(SHARED, DATA + 16)
                copy16(SHARED + 16, DATA + 32)
                mbarrier_arrive_after_copies(SHARED + 64)
        if thread == 20:
            mbarrier_wait(SHARED + 64, 0, True)
            found.append(load_shared16(SHARED + 16).view(np.uint8).tolist())

    run_lanes(barrier_of(1, then), late=late)
    assert found == [list(range(32, 48))]


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "ends"])
def test_a_copy_that_is_not_waited_for(reads: bool) -> None:
    def then(thread: int) -> None:
        if thread == 3:
            mbarrier_expect_tx(SHARED + 64, 16)
            bulk_copy(SHARED, DATA, 16, SHARED + 64)
            mbarrier_arrive(SHARED + 64)
            if reads:
                load_shared16(SHARED)

    message = "reads 16 bytes at shared 0: the target of a copy in flight" if reads else "copies were in flight"
    with pytest.raises(EmulatorError, match=message):
        run_lanes(barrier_of(1, then))


def test_warps_meet_at_barriers_by_number() -> None:
    order: list[str] = []

    def kernel() -> None:
        if thread_index() < 32:
            order.append("arrives")
            named_barrier_arrive(1, 64)
        else:
            named_barrier_wait(1, 64)
            order.append("goes on")

    run_lanes(kernel, threads=64, slow=0)
    assert order == ["arrives"] * 32 + ["goes on"] * 32
    with pytest.raises(EmulatorError, match="waits for ever: 32 lanes of warp 0 at barrier 1 of 64 threads"):
        run_lanes(lambda: named_barrier_wait(1, 64))
    with pytest.raises(EmulatorError, match="warps were expected at barriers"):
        run_lanes(lambda: named_barrier_arrive(1, 64))


# ---------------------------------------------------------------------------------------------------------------------
# A kernel of one's own
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes(Constants):
    """What the kernel below may name."""

    COLUMNS: int
    load: Callable[..., Any]


c = Sizes.placeholder()


def products(weights, x, y, m, k):
    """``y[m] = W[m, k] @ x[k]`` by one CTA, a row a thread, of numbers that ``load`` reads."""
    row = thread_index()
    if mask("rows", row < m):
        total = registers(c.COLUMNS, 0.0)
        for i in range(0, k, c.COLUMNS):
            for j in unroll(c.COLUMNS):
                total[j] = fma(c.load(weights + (row * k + i + j) * 4), load_global_float(x + (i + j) * 4), total[j])
        for j in unroll(range(1, c.COLUMNS)):
            total[0] += total[j]
        store_global_float(y + row * 4, total[0])


def run_products(m: int, k: int, faults: frozenset[str] = frozenset(), **other: Any) -> dict[str, Region]:
    memory = Memory()
    numbers = {"weights": np.arange(m * k, dtype=np.float32), "x": np.arange(k, dtype=np.float32)}
    regions = {name: memory.add(name, values.tobytes(), constant=True) for name, values in numbers.items()}
    regions["y"] = memory.add("y", 4 * m)
    arguments = {**regions, "m": m, "k": k, **other}
    constants = Sizes(COLUMNS=4, load=load_global_float)
    emulate(products, memory=memory, constants=constants, settings=Settings(faults=faults), **arguments)
    return regions


def test_a_kernel_of_ones_own_runs_over_regions_and_says_what_it_read() -> None:
    regions = run_products(5, 12)
    matrix = np.arange(60, dtype=np.float32).reshape(5, 12)
    np.testing.assert_array_equal(regions["y"].array(np.float32), matrix @ np.arange(12, dtype=np.float32))
    assert set(regions["weights"].reads) == {1}
    assert set(regions["x"].reads) == {5}
    assert regions["y"].unwritten() == 0


def test_a_mask_of_ones_own_can_be_left_out() -> None:
    assert masks_of(sys.modules[__name__]) == ["rows"]
    with pytest.raises(EmulatorError, match=r"CTA 0 warp 0 lane \d+: 4 bytes at 0x\w+ are not within any of \[weights"):
        run_products(5, 12, frozenset({"rows"}))


MASKED = """
from qmm.kernels.lang import masks
from qmm.kernels.lang.masks import mask, mask as within
keep = masks.mask

def kernel(n, m):
    if within("by an alias", n < m) and masks.mask("by its module", n > 0):
        return keep("by assignment", n) + mask("by its name", n)
"""


def module_of(tmp_path: Path, source: str) -> ModuleType:
    (tmp_path / "masked.py").write_text(source)
    spec = importlib.util.spec_from_file_location("masked", tmp_path / "masked.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_masks_are_found_whatever_they_are_called(tmp_path: Path) -> None:
    assert set(masks_of(module_of(tmp_path, MASKED))) == {
        "by an alias", "by its module", "by assignment", "by its name"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("    own = masks.mask", "line 9: mask can only be called"),
        ("    return mask(n, n < m)", "line 9: a mask without a name"),
    ],
)
def test_masks_that_cannot_be_found_are_refused(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"masked.py, {message}"):
        masks_of(module_of(tmp_path, MASKED + line))


def test_fields_are_not_loaded_without_saying_from_where() -> None:
    load = of_lane(3, lambda: load4(DATA, 0))
    with pytest.raises(
        EmulatorError, match=r'lane 3 loads a field .* no FieldAccess: .*\(n, "global"\).*\(n, "shared"\)'
    ):
        run_lanes(load, fields=None)
    with pytest.raises(EmulatorError, match=r'lane 3 loads 4 bytes .* global memory.*FieldAccess\(2, "global"\)'):
        run_lanes(load, fields=FieldAccess(2, "shared"))


def test_arguments_that_a_kernel_has_not_are_refused() -> None:
    place = r"^products \(.*test_emulator.py, line \d+\): "
    with pytest.raises(TypeError, match=f"{place}.*unexpected keyword argument 'n'"):
        run_products(5, 12, n=1)
    with pytest.raises(TypeError, match=f"{place}missing a required argument: 'x'"):
        emulate(products, memory=Memory(), weights=0)
    with pytest.raises(TypeError, match=f"{place}k must be an integer or a Region, not a float: 1.5"):
        emulate(products, memory=Memory(), k=1.5)  # type: ignore[arg-type]
    for threads in (0, 48, 2048):
        with pytest.raises(TypeError, match=f"whole warps of 32, not {threads}"):
            run_lanes(lambda: None, threads=threads)


def test_a_kernel_has_its_own_threads_fields_and_constants() -> None:
    fields = FieldAccess(4, "global")
    kernel = Kernel("products", products, Sizes(COLUMNS=4, load=load_global_float), threads=64, fields=fields)
    memory = Memory()
    ones = {name: memory.add(name, np.ones(160, np.float32).tobytes(), constant=True) for name in ("weights", "x")}
    y = memory.add("y", 4 * 40)
    emulate(kernel, memory=memory, y=y, m=40, k=4, **ones)
    assert set(y.array(np.float32)) == {4.0}  # of more rows than a warp has lanes
    place = r"^products \(.*test_emulator.py, line \d+\): "
    for given in ({"threads": 64}, {"fields": fields}, {"constants": kernel.constants}):
        with pytest.raises(TypeError, match=f"{place}threads, fields and constants are those of the Kernel"):
            emulate(kernel, memory=memory, **given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=f"{place}shared memory needs"):
        emulate(kernel, memory=memory, shared_nbytes=16)
    with pytest.raises(TypeError, match=f"{place}missing a required argument: 'y'"):
        emulate(kernel, memory=memory, m=40, k=4, **ones)


def test_regions_do_not_overlap() -> None:
    memory = Memory()
    first = memory.add("first", 100, shift=4)
    second = memory.add("second", b"abc")
    assert first.start % 4096 == 4
    assert second.start > first.end + 4096
    with pytest.raises(ValueError, match=r"third \[.*\) overlaps one of \[first .*, second"):
        memory.add("third", 16, address=first.end - 1)


def test_the_examples_of_emulate_run() -> None:
    found = doctest.DocTestFinder().find(emulate, globs={})
    ran = [doctest.DocTestRunner().run(examples) for examples in found]
    assert [result.failed for result in ran] == [0]
    assert ran[0].attempted > 5


def by_name(target):
    store_float(target, 0, 0.5)


def by_module(target):
    simd.store_float(target, 0, 0.5)


@pytest.mark.parametrize("kernel", [by_name, by_module])
def test_an_operation_of_the_cpu_is_refused_by_name(kernel: Callable[[int], None]) -> None:
    """It would write at the emulator's addresses in this process."""
    memory = Memory()
    with pytest.raises(
        EmulatorError, match=r"store_float\(.*\) -> None> of qmm.kernels.lang.simd has no lowering for GPUs"
    ):
        emulate(kernel, memory=memory, target=memory.add("target", 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, "globl"), r"the space is one of \('shared', 'global'\), not 'globl'"),
        ((3, "global"), r"the alignment is one of \(1, 2, 4, 8, 16\), not 3"),
        ((0, "global"), "not 0"),
        ((32, "global"), "not 32"),
    ],
)
def test_how_fields_are_read_is_checked(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"FieldAccess: .*{message}"):
        FieldAccess(*arguments)
