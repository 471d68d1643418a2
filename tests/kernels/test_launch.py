"""Launches as a driver gets to see them, and the description of kernels; no kernel is compiled or run."""

from __future__ import annotations

import ast
import builtins
import inspect
from importlib import import_module
from types import FunctionType

import pytest
from cuda.bindings import driver
from fake_driver import SHARED_NBYTES, Driver
from ptx_compile import GROUPS

from qmm.kernels.runtime import build, launch
from qmm.kernels.runtime.launch import Launch, alignment_of


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(launch, "driver", made)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


def test_a_launch_asks_for_what_it_was_made_with(fake: Driver) -> None:
    made = Launch(fake.kernel(3), 0, 17, (1, -2, 1 << 62), 4096, early=False)
    assert fake.launches == []  # nothing is queued yet
    made.queue(0xABC)
    (launched,) = fake.launches
    assert launched.function == b"example"
    assert launched.blocks == (17, 1, 1)
    assert launched.threads == (96, 1, 1)
    assert launched.shared_nbytes == 4096
    assert launched.stream == 0xABC
    assert not launched.early
    assert launched.arguments == (1, -2, 1 << 62)


def test_arguments_may_change_from_launch_to_launch(fake: Driver) -> None:
    made = Launch(fake.kernel(12), 0, 1, range(12), 0, early=False)
    made.queue(0)
    made.arguments[0] = 1 << 40
    made.arguments[11] = -1
    made.queue(0)
    assert [launched.arguments for launched in fake.launches] == [tuple(range(12)), (1 << 40, *range(1, 11), -1)]


def test_launches_of_one_kernel_have_arguments_of_their_own(fake: Driver) -> None:
    kernel = fake.kernel(2)
    first, second = (Launch(kernel, 0, blocks, (blocks, blocks), 0, early=False) for blocks in (1, 2))
    first.arguments[1] = 7
    second.queue(0)
    first.queue(0)
    assert [(launched.blocks[0], launched.arguments) for launched in fake.launches] == [(2, (2, 2)), (1, (1, 7))]


def test_a_launch_may_move_from_stream_to_stream(fake: Driver) -> None:
    made = Launch(fake.kernel(1), 0, 1, (0,), 0, early=False)
    for stream in (5, 5, 0, 6, 0):
        made.queue(stream)
    assert [launched.stream for launched in fake.launches] == [5, 5, 0, 6, 0]


def test_only_an_early_launch_may_begin_before_the_kernel_before_it_ends(fake: Driver) -> None:
    kernel = fake.kernel(1)
    for early in (True, False):
        Launch(kernel, 0, 1, (0,), 0, early).queue(0)
    assert [launched.early for launched in fake.launches] == [True, False]


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_arguments_is_refused(fake: Driver, count: int) -> None:
    with pytest.raises(TypeError, match=f"example takes 3 arguments, not {count}"):
        Launch(fake.kernel(3), 0, 1, range(count), 0, early=False)


def test_a_refused_launch_names_the_kernel_and_the_error(fake: Driver) -> None:
    made = Launch(fake.kernel(1), 0, 1, (0,), 0, early=False)
    fake.refuses = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="launching example: the driver returned CUDA_ERROR_INVALID_VALUE"):
        made.queue(0)


def test_a_kernel_launches_itself_likewise(fake: Driver) -> None:
    fake.kernel(2).launch(0, 3, 9, 4, 5, shared_nbytes=1024)
    (launched,) = fake.launches
    assert (launched.blocks[0], launched.stream, launched.arguments) == (3, 9, (4, 5))
    assert launched.shared_nbytes == 1024
    assert not launched.early


@pytest.mark.parametrize("shared", [True, False])
def test_a_kernel_asks_for_all_shared_memory_that_a_block_may_have(fake: Driver, shared: bool) -> None:
    fake.kernel(1, shared=shared).launch(0, 1, 0, 0)
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert fake.functions == ([(most, SHARED_NBYTES)] if shared else [])


def test_a_kernel_is_loaded_once(fake: Driver) -> None:
    kernel = fake.kernel(1)
    assert kernel.loaded(0) is kernel.loaded(0)


def test_alignment_is_the_largest_power_of_two_up_to_16() -> None:
    assert [alignment_of(address) for address in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 4096)] == [
        *(16, 1, 2, 1, 4, 2, 8, 4, 16, 8, 16)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions
# ---------------------------------------------------------------------------------------------------------------------

KERNELS = {spec.kernel() for specs in GROUPS.values() for spec in specs}
TEMPLATES = sorted({kernel.key["template"] for kernel in KERNELS})


def reached(template: str) -> dict[FunctionType, set[str]]:
    """The functions of this package's templates that a kernel calls, itself among them, with the names that they read
    and do not define."""
    module, _, name = template.rpartition(".")
    found: dict[FunctionType, set[str]] = {}
    waiting = [getattr(import_module(f"qmm.kernels.ops.{module}"), name)]
    while waiting:
        function = waiting.pop()
        names = [node for node in ast.walk(ast.parse(inspect.getsource(function))) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        found[function] = {node.id for node in names} - own - set(inspect.signature(function).parameters)
        called = [function.__globals__.get(name) for name in found[function]]
        waiting += [one for one in called if isinstance(one, FunctionType) and one not in found and of_a_template(one)]
    return found


def of_a_template(function: FunctionType) -> bool:
    return function.__module__.startswith("qmm.kernels.ops.")


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_kernel_leaves_open_its_description_binds(template: str) -> None:
    for kernel in KERNELS:
        if kernel.key["template"] == template:
            bound = {*kernel.key["constants"], *vars(builtins)}
            for function, names in reached(template).items():
                assert {name for name in names if name not in function.__globals__} <= bound


def test_nothing_is_described_that_no_kernel_reads() -> None:
    read = {name for template in TEMPLATES for names in reached(template).values() for name in names}
    assert {name for kernel in KERNELS for name in kernel.key["constants"]} - read == set()


def test_every_kernel_knows_how_many_threads_and_arguments_it_has() -> None:
    for kernel in KERNELS:
        module, _, function = kernel.key["template"].rpartition(".")
        written = getattr(import_module(f"qmm.kernels.ops.{module}"), function)
        assert len(inspect.signature(written).parameters) == kernel.arguments, kernel.name
        assert kernel.threads % 32 == 0
        warps = kernel.key["constants"]["WARPS"]
        extra = kernel.key["constants"].get("PRODUCERS", -1) + 1
        assert kernel.threads == 32 * (warps + extra), kernel.name


# ---------------------------------------------------------------------------------------------------------------------
# The bound on a kernel's registers
# ---------------------------------------------------------------------------------------------------------------------

TEXT = """.version 8.0
.target sm_80
.visible .entry kernel(
    .param .u64 kernel_param_0
)
{
    { .reg .b64 state; }
    ret;
}
"""


def test_the_threads_of_a_block_are_said_between_a_kernels_head_and_its_body() -> None:
    head, body = TEXT.split("{", 1)
    assert build.bounded(TEXT, 640) == f"{head}.maxntid 640, 1, 1\n.minnctapersm 1\n{{{body}"


@pytest.mark.parametrize("text", ["", TEXT.replace(".entry", ".func"), TEXT.partition("{")[0]])
def test_text_without_a_kernel_is_refused(text: str) -> None:
    with pytest.raises(AssertionError, match="entry point"):
        build.bounded(text, 640)
