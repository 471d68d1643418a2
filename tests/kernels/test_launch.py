"""Launches as a driver gets to see them, and the description of kernels; no kernel is compiled or run."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect

import fake_driver
import pytest
from cuda.bindings import driver
from fake_driver import SHARED_NBYTES, Driver
from ptx_kernels import groups

from qmm.cuda import CudaCallError
from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.fields import FieldAccess, load16
from qmm.kernels.ops.matvec.naive import naive
from qmm.kernels.ops.op import At, LaunchSpec, alignment_of
from qmm.kernels.runtime import build
from qmm.kernels.runtime.kernel import Kernel
from qmm.kernels.runtime.launch import Launch, load


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return fake_driver.install(monkeypatch)


def one(x):
    """A kernel of one parameter."""


def three(x, y, n):
    """A kernel of three."""


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


def test_a_launch_asks_for_what_it_was_made_with(fake: Driver) -> None:
    launch = Launch(fake.kernel(three), 0, 17, {"n": 1 << 62, "x": 1, "y": -2}, 4096)
    assert fake.launches == []  # nothing is queued yet
    launch.queue(0xABC)
    (launched,) = fake.launches
    assert launched.function == b"example"
    assert launched.blocks == (17, 1, 1)
    assert launched.threads == (96, 1, 1)
    assert launched.shared_nbytes == 4096
    assert launched.stream == 0xABC
    assert not launched.early
    assert launched.arguments == (1, -2, 1 << 62)  # in the order of the signature


def test_arguments_may_change_from_launch_to_launch(fake: Driver) -> None:
    launch = Launch(fake.kernel(three), 0, 1, {"x": 1, "y": 2, "n": 3})
    launch.queue(0)
    launch.cell("n").value = -1
    launch.cell("x").value = 1 << 40
    launch.queue(0)
    assert [launched.arguments for launched in fake.launches] == [(1, 2, 3), (1 << 40, 2, -1)]


def test_launches_may_read_an_argument_from_one_array(fake: Driver) -> None:
    launches = [Launch(fake.kernel(three), 0, 1, {"x": 1, "y": 2, "n": 3}) for _ in range(2)]
    shared = (ctypes.c_int64 * 2)(7, 8)
    launches[0].read_from("y", shared, 1)
    launches[1].read_from("x", shared, 1)
    for launch in launches:
        launch.queue(0)
    shared[1] = 1 << 40
    del shared  # the launches keep it
    for launch in launches:
        launch.queue(0)
    assert [launched.arguments for launched in fake.launches] == [
        (1, 8, 3),
        (8, 2, 3),
        (1, 1 << 40, 3),
        (1 << 40, 2, 3),
    ]


def test_launches_of_one_kernel_have_arguments_of_their_own(fake: Driver) -> None:
    kernel = fake.kernel(one)
    first, second = (Launch(kernel, 0, ctas, {"x": ctas}) for ctas in (1, 2))
    first.cell("x").value = 7
    second.queue(0)
    first.queue(0)
    assert [(launched.blocks[0], launched.arguments) for launched in fake.launches] == [(2, (2,)), (1, (7,))]


def test_a_launch_may_move_from_stream_to_stream(fake: Driver) -> None:
    launch = Launch(fake.kernel(one), 0, 1, {"x": 0})
    for stream in (5, 5, 0, 6, 0):
        launch.queue(stream)
    assert [launched.stream for launched in fake.launches] == [5, 5, 0, 6, 0]


def test_only_an_early_launch_may_begin_before_the_kernel_before_it_ends(fake: Driver) -> None:
    kernel = fake.kernel(one)
    for early in (True, False):
        Launch(kernel, 0, 1, {"x": 0}, early=early).queue(0)
    assert [launched.early for launched in fake.launches] == [True, False]


def test_arguments_that_a_kernel_has_not_are_named(fake: Driver) -> None:
    kernel, place = fake.kernel(three), r"example \(.*test_launch.py, line \d+\): arguments that are missing: "
    with pytest.raises(TypeError, match=place + "n; unknown: count, m"):
        Launch(kernel, 0, 1, {"x": 0, "y": 0, "count": 3, "m": 1})
    with pytest.raises(TypeError, match=place + "n, y; unknown: none"):
        LaunchSpec.of(kernel, 1, x=0)


def test_a_refused_launch_names_the_kernel_and_the_error(fake: Driver) -> None:
    launch = Launch(fake.kernel(one), 0, 1, {"x": 0})
    fake.refuses = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CudaCallError, match=r"cuLaunchKernelEx of example returned CUDA_ERROR_INVALID_VALUE \(1\)"):
        launch.queue(0)


@pytest.mark.parametrize("shared", [True, False])
def test_a_kernel_asks_for_all_shared_memory_that_a_cta_may_have(fake: Driver, shared: bool) -> None:
    load(fake.kernel(one, shared=shared), 0)
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert fake.functions == ([(most, SHARED_NBYTES)] if shared else [])


def test_a_kernel_is_loaded_once_for_each_device(fake: Driver) -> None:
    kernel = fake.kernel(one)
    assert load(kernel, 0) is load(kernel, 0)
    assert load(kernel, 1) is not load(kernel, 0)


def test_alignment_is_the_largest_power_of_two_up_to_16() -> None:
    assert [alignment_of(address) for address in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 4096)] == [
        *(16, 1, 2, 1, 4, 2, 8, 4, 16, 8, 16)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Descriptions
# ---------------------------------------------------------------------------------------------------------------------

KERNELS = {spec.kernel() for specs in groups(True).values() for spec in specs}


def used(kernel: Kernel) -> set[str]:
    """The constants that a kernel reads when it is specialized."""

    @dataclasses.dataclass(frozen=True)
    class Noting(Constants):
        def value(self, name: str) -> object:
            read.add(name)
            return kernel.constants.value(name)

    read: set[str] = set()
    build.specialize(kernel.function, Noting(), build.CUDATarget(kernel.fields))
    return read


def test_every_constant_is_read_by_some_kernel() -> None:
    read: dict[type, set[str]] = {}
    for kernel in (
        spec.kernel() for group in ("Q2_K", "F16", "activations", "probes") for spec in groups(False)[group]
    ):
        read.setdefault(type(kernel.constants), set()).update(used(kernel))
    for owner in {base for kind in read for base in kind.__mro__} - {object, Constants}:
        names = set().union(*(names for kind, names in read.items() if issubclass(kind, owner)))
        assert set(owner.__annotations__) - names == set(), owner


def test_every_constant_is_documented() -> None:
    for kind in {base for kernel in KERNELS for base in type(kernel.constants).__mro__} - {object, Constants}:
        source = inspect.getsource(kind)
        for name in kind.__annotations__:
            documented = source.partition(f"    {name}: ")[2].splitlines()[1].strip()
            assert documented.startswith('"""'), (kind, name)


def test_every_kernel_has_whole_warps() -> None:
    for kernel in KERNELS:
        assert kernel.threads % 32 == 0, kernel.name
        if not hasattr(kernel.constants, "WARPS"):
            assert kernel.function is naive, kernel.name  # the one whose threads are no warps that work together
            continue
        extra = kernel.constants.value("PRODUCERS") + 1 if hasattr(kernel.constants, "PRODUCERS") else 0
        assert kernel.threads == 32 * (kernel.constants.value("WARPS") + extra), kernel.name


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
    table = ".global .align 1 .b8 table[2] = {1, 2};\n"
    assert build.bounded(table + TEXT, 640) == table + build.bounded(TEXT, 640)


@pytest.mark.parametrize("text", ["", TEXT.replace(".entry", ".func"), TEXT.partition("{")[0]])
def test_text_without_a_kernel_is_refused(text: str) -> None:
    with pytest.raises(AssertionError, match="entry point"):
        build.bounded(text, 640)


def reads_a_block(x):
    """A kernel that loads a field."""
    load16(x, 0)


def test_a_kernel_that_loads_fields_says_from_where() -> None:
    """Blocks in global memory were once compiled to loads from shared memory, at 32 bits of their addresses."""
    kernel = Kernel("mine", reads_a_block, Constants(), 32)
    with pytest.raises(ValueError, match=r'mine: load16 .* no FieldAccess: .*\(n, "global"\).*\(n, "shared"\)'):
        build.function_of(kernel)
    build.function_of(dataclasses.replace(kernel, fields=FieldAccess(2, "global")))


def test_what_no_gpu_launches_is_refused_by_name() -> None:
    def nothing(x):
        """A kernel that does nothing."""

    for threads in (-32, 0, 100, 1056):
        with pytest.raises(ValueError, match=rf"nothing: threads = {threads}; .*multiple of 32 from 32 to 1024"):
            Kernel("nothing", nothing, Constants(), threads)
    kernel = Kernel("nothing", nothing, Constants(), 1024)
    for ctas in (-1, 0, 1 << 31):
        with pytest.raises(ValueError, match=rf"nothing: ctas = {ctas}; a launch has 1 to 2147483647"):
            LaunchSpec.of(kernel, ctas, x=0)
    with pytest.raises(ValueError, match=r"nothing: x = At\(base='weight', offset=0\); the base is one of weights"):
        LaunchSpec.of(kernel, 1, x=At("weight"))
