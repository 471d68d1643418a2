"""Each operation: what it means in Python, that its results have the declared types, and that it compiles.

The kernels of ``operation_cases.py`` are run by the emulator here, and by a GPU in ``tests/gpu/test_operations.py``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from arithmetic_kernels import FEW, MANY, ROWS_OF_EIGHT, ROWS_OF_FOUR, SIGNED, SIXTEEN
from cpu_operation_kernels import CPU_CASES, CPUCase
from numba.core import errors
from numba.cuda import types
from operation_cases import CASES, Case
from ptx_compile import assemble, compile_kernel, retarget, without_gpu
from ptx_kernels import groups

from qmm.kernels import lang, ops
from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.fields import FieldAccess, load1, load2, load4, load16
from qmm.kernels.lang.operation import Operation, operation
from qmm.kernels.lang.primitives import half
from qmm.kernels.lang.ptx.arithmetic import reciprocal
from qmm.kernels.lang.ptx.barrier import mbarrier_arrive, sync_cta, sync_warp
from qmm.kernels.lang.ptx.global_memory import load_global_half
from qmm.kernels.lang.ptx.grid import cta_index
from qmm.kernels.lang.ptx.warp import shuffle_xor_add
from qmm.kernels.lang.simd import sum_floats
from qmm.kernels.lang.specialize import specialize
from qmm.kernels.lang.tables import table
from qmm.kernels.lang.targets.cuda import CUDATarget
from qmm.kernels.lang.targets.emulator import EmulatorError, EmulatorTarget
from qmm.kernels.runtime.cache import key_of
from qmm.kernels.runtime.cpu import CPUKernel
from qmm.kernels.runtime.kernel import Kernel
from qmm.kernels.runtime.launch import ptx

ROOT = Path(__file__).parents[2]
cases = pytest.mark.parametrize("name", CASES)
PYTHON_TYPES = {"int64": int, "float32": np.float32, "Word": np.uint32}
ARRAY_TYPES = {"Words": (np.uint32, 4), "Floats": (np.float32, 16), "Partial": (np.float32, 8)}


def operations() -> dict[str, Operation]:
    """All operations of the language, by module and name."""
    found = {}
    for module in pkgutil.walk_packages(lang.__path__, f"{lang.__name__}."):
        if ".targets." not in module.name:
            values = vars(importlib.import_module(module.name)).values()
            found |= {f"{value.__module__}.{value.name}": value for value in values if isinstance(value, Operation)}
    return found


OPERATIONS = operations()


def called_by(kernel: Callable[..., None]) -> Iterator[object]:
    """What a kernel calls, itself or through its helpers."""
    for value in inspect.getclosurevars(kernel).globals.values():
        yield value
        if isinstance(value, FunctionType) and value.__module__.endswith("_kernels"):
            yield from called_by(value)


def kernels() -> list[Kernel]:
    return [spec.kernel() for specs in groups(True).values() for spec in specs]


def operations_of(kernels: Iterable[Callable[..., None]]) -> set[Operation]:
    return {value for kernel in kernels for value in called_by(kernel) if isinstance(value, Operation)}


@pytest.mark.parametrize(("target", "cases"), [("cuda", CASES), ("cpu", CPU_CASES)])
def test_every_operation_of_a_target_has_a_case(target: str, cases: dict[str, Case] | dict[str, CPUCase]) -> None:
    having = {operation for operation in OPERATIONS.values() if target in operation.lowerings}
    tables = {SIXTEEN, FEW, MANY, ROWS_OF_FOUR, ROWS_OF_EIGHT}
    assert operations_of(case.function for case in cases.values()) == having | tables


# ---------------------------------------------------------------------------------------------------------------------
# Meanings
# ---------------------------------------------------------------------------------------------------------------------


def require_type(operation: Operation, kind: str, value: object) -> None:
    """A value must be of a declared type, exactly: what is near it would make other results further on."""
    if kind == "literal":
        return
    if kind == "None":
        assert value is None, operation
    elif kind.startswith("float32["):
        assert type(value) is tuple, operation
        assert {type(number) for number in value} == {np.float32}, operation
    elif kind in PYTHON_TYPES:
        assert type(value) is PYTHON_TYPES[kind], f"{operation}: {value!r} is a {type(value)}"
    else:
        assert isinstance(value, np.ndarray), operation
        assert (value.dtype, value.size) in [ARRAY_TYPES[name] for name in kind.split(" | ")], operation


class TypedEmulator(EmulatorTarget):
    """Runs operations that see to the types of their arguments and results."""

    def intrinsic(self, value: object) -> object | None:
        if not isinstance(value, Operation) or value.name in ("named_barrier_arrive", "named_barrier_wait", "sync_cta"):
            return super().intrinsic(value)  # without results, and barriers look at who calls them
        lanes = 32 if value.of_warp else None

        @functools.wraps(value.__wrapped__)
        def typed(*arguments: Any) -> Any:
            result = value.__wrapped__(*arguments)
            for kind, argument in zip(value.arguments, arguments, strict=True):
                for one in [argument] if lanes is None or kind == "literal" else argument:
                    require_type(value, kind, one)
            for one in [result] if lanes is None or result is None else result:
                require_type(value, value.result, one)
            return result

        return Operation(typed, value.declaration, value.of_warp).meaning


@cases
def test_arguments_and_results_have_the_declared_types(name: str) -> None:
    case = CASES[name]
    np.testing.assert_array_equal(case.emulated(TypedEmulator()), case.emulated())


@pytest.mark.parametrize("name", CPU_CASES)
def test_the_cpu_makes_what_python_makes(name: str) -> None:
    case = CPU_CASES[name]
    results = []
    compiled_kernel = CPUKernel.of(name, case.function, Constants())
    for kernel in (specialize(case.function, Constants(), TypedEmulator()), compiled_kernel):
        results.append(np.zeros(case.target_nbytes, np.uint8))
        with np.errstate(all="ignore"):
            kernel(case.source.ctypes.data, results[-1].ctypes.data)
    assert results[0].any()
    python, compiled = (result.view(case.dtype) for result in results)
    np.testing.assert_array_equal(compiled, python)


def test_a_declaration_that_means_nothing_is_refused() -> None:
    for declaration in ("(int64) -> Floats16", "(int) -> None", "int64 -> None", "(int64, int64) -> None", "(int64)"):
        with pytest.raises(TypeError, match=r"store\(address\) cannot be declared as"):

            @operation(declaration)
            def store(address):
                """Nothing."""


def test_tables_are_what_numpy_takes() -> None:
    indices = np.arange(16, dtype=np.uint8)
    words = indices.view(np.uint32)
    np.testing.assert_array_equal(SIXTEEN(words).view(np.int8), SIGNED[:16])
    np.testing.assert_array_equal(MANY(words + np.uint32(0xF0F0F0F0)).view(np.int8), SIGNED[indices + 0xF0])
    np.testing.assert_array_equal(ROWS_OF_FOUR(63, 0, 1, 2).view(np.int8), SIGNED.reshape(64, 4)[[63, 0, 1, 2]].ravel())
    np.testing.assert_array_equal(ROWS_OF_EIGHT(31, 5).view(np.int8), SIGNED.reshape(32, 8)[[31, 5]].ravel())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 3)), r"not \(4, 3\)"),
        (np.zeros(0), r"not \(0,\)"),
        (np.zeros(257, int), "257 entries"),
        ([0, 0.5], "signed bytes, not float64"),
        ([True, False], "signed bytes, not bool"),
        ([-129, 0], "from -129 to 0"),
        ([1, 200], "from 1 to 200"),
    ],
)
def test_tables_of_what_is_no_signed_byte_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(values)


def test_a_target_without_the_operation_says_so() -> None:
    with pytest.raises(TypeError, match=r"<operation sum_floats\(Floats\) -> float32> has no lowering for .* 'cuda'"):
        CUDATarget().intrinsic(sum_floats)


def test_a_literal_must_be_a_constant_of_the_source() -> None:
    function = specialize(shuffle_by_a_variable, Constants(), CUDATarget())
    with without_gpu(), pytest.raises(errors.TypingError, match="shuffle_xor_add: distance must be a constant"):
        compile_kernel(function, types.void(types.int64), "shuffle_by_a_variable", 32)


def shuffle_by_a_variable(distance):
    shuffle_xor_add(1.0, 2.0, distance, 0)


def test_operations_of_a_gpu_are_refused_outside_of_the_emulator() -> None:
    for action in (lambda: load_global_half(1 << 20), cta_index, sync_cta, lambda: mbarrier_arrive(0), sync_warp):
        with pytest.raises(EmulatorError, match=r"run that with .*emulate\(\)"):
            action()


def test_declaring_operations_and_running_them_imports_no_compiler() -> None:
    found = pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")
    kernels = [module.name for module in found if not module.name.startswith("qmm.kernels.ops.cpu.")]
    modules = sorted({operation.__module__ for operation in OPERATIONS.values()})
    names = ", ".join([*modules, *kernels, "qmm.kernels.lang.targets.emulator"])
    code = f"import sys, {names}; sys.exit(str([m for m in ('numba', 'llvmlite', 'cuda') if m in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_what_tells_kernels_apart_has_an_operation_of_ones_own_whole_and_ours_by_name() -> None:
    def key_with(lowering: Callable[..., Any] | None, used: Operation) -> str | None:
        @operation("(float32) -> float32")
        def double(value):
            """Twice a number."""
            return value + value

        if lowering is not None:
            double.cuda(lowering)

        def kernel(x):
            return used(double(x))

        return key_of("kernel", {"load": kernel}, (9, 0))

    def fast(e, value):
        return e.fadd(value, value)

    def slow(e, value):
        return e.fmul(value, e.constant(e.f32, 2.0))

    keys = [key_with(fast, reciprocal), key_with(slow, reciprocal), key_with(None, reciprocal), key_with(fast, half)]
    assert None not in keys
    assert len(set(keys)) == 4
    assert '"qmm.kernels.lang.ptx.arithmetic:reciprocal"' in str(keys[0])
    assert "rcp.rn" not in str(keys[0])
    assert "e.fadd(value, value)" in str(keys[0])


# ---------------------------------------------------------------------------------------------------------------------
# Cases of GPUs
# ---------------------------------------------------------------------------------------------------------------------


def test_fields_are_loaded_at_each_alignment_that_kernels_use() -> None:
    loads = {load1, load2, load4, load16}
    found = {case.fields for case in CASES.values() if loads <= set(called_by(case.function))}
    assert found == {FieldAccess(alignment, space) for alignment in (1, 2, 4, 8, 16) for space in ("shared", "global")}
    assert {kernel.fields.alignment for kernel in kernels() if kernel.fields} <= {alignment for alignment, _ in found}


@cases
def test_other_results_than_the_emulators_are_refused(name: str) -> None:
    case = CASES[name]
    made = case.emulated()
    case.compare(case, made, made)
    for other in (~made, case.before()):
        with pytest.raises(AssertionError):
            case.compare(case, other, made)


@cases
def test_kernels_compile(name: str) -> None:
    case = CASES[name]
    with without_gpu():
        text = ptx(case.kernel, (9, 0))
    assemble(text, "sm_90")
    if case.hopper:
        with pytest.raises(AssertionError, match=r"requires \.target sm_90"):
            assemble(retarget(text, "sm_80"), "sm_80")
    else:
        assemble(retarget(text, "sm_80"), "sm_80")


def test_a_not_a_number_is_any_and_a_zero_has_its_sign() -> None:
    case = CASES["floats"]
    made = np.array([np.nan, 0, 1], np.float32)
    case.compare(case, np.array([-np.nan, 0, 1], np.float32).view(np.uint8), made.view(np.uint8))
    for other in ([0, 0, 1], [np.nan, -0.0, 1], [np.nan, 0, 1 + 2**-23]):
        with pytest.raises(AssertionError):
            case.compare(case, np.array(other, np.float32).view(np.uint8), made.view(np.uint8))


def test_a_fused_sum_may_be_the_other_number_beside_its_tie_and_no_other() -> None:
    case = CASES["fma"]
    made = case.emulated().view(np.float32)
    a, b, c = case.source.astype(np.float64).T
    beside = np.nextafter(made, np.where(a * b + c > made, np.inf, -np.inf).astype(np.float32))
    for item, allowed in ((200, True), (300, False)):  # of to_fma: the first that is rounded from a tie, any number
        other = made.copy()
        other[item] = beside[item]
        with nullcontext() if allowed else pytest.raises(AssertionError):
            case.compare(case, other.view(np.uint8), made.view(np.uint8))
        other[item] = np.nextafter(beside[item], 2 * beside[item] - made[item])
        with pytest.raises(AssertionError):
            case.compare(case, other.view(np.uint8), made.view(np.uint8))


@pytest.mark.parametrize(
    ("name", "bits"), [("dots of floats", 19), ("dots of short floats", 16), ("dots of subnormals", 16)]
)
def test_a_sum_is_held_to_its_bound(name: str, bits: int) -> None:
    # No sum exceeds the magnitudes of its terms, and some come near them.
    case = CASES[name]
    made = case.emulated().view(np.float32)
    case.compare(case, (made * np.float32(1 + 2.0**-bits / 2)).view(np.uint8), made.view(np.uint8))
    with pytest.raises(AssertionError):
        case.compare(case, (made * np.float32(1 + 2.0**-bits * 4)).view(np.uint8), made.view(np.uint8))
