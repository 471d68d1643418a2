"""Each operation: what it means in Python, that its results have the declared types, and that it compiles.

The kernels of ``operation_cases.py`` are run by the emulator here, and by a GPU in ``tests/gpu/test_operations.py``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import FunctionType

import numpy as np
import pytest
from operation_cases import CASES
from ptx_compile import GROUPS, assemble, retarget, without_gpu

from qmm.kernels import lang
from qmm.kernels.lang.fields import FieldAccess, load1, load2, load4, load16
from qmm.kernels.lang.operation import Operation
from qmm.kernels.runtime.launch import CUDAKernel

cases = pytest.mark.parametrize("name", CASES)


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
        if isinstance(value, FunctionType) and value.__module__ == kernel.__module__:
            yield from called_by(value)


def kernels() -> list[CUDAKernel]:
    return [spec.kernel() for specs in GROUPS.values() for spec in specs]


def test_every_operation_of_gpus_has_a_case() -> None:
    called = {value for case in CASES.values() for value in called_by(case.kernel) if isinstance(value, Operation)}
    assert {operation for operation in OPERATIONS.values() if "cuda" in operation.lowerings} == called


def test_fields_are_loaded_at_each_alignment_that_kernels_use() -> None:
    loads = {load1, load2, load4, load16}
    found = {case.fields for case in CASES.values() if loads <= set(called_by(case.kernel))}
    assert found == {FieldAccess(alignment, space) for alignment in (1, 2, 4, 8, 16) for space in ("shared", "global")}
    assert {kernel.key["alignment"] for kernel in kernels()} <= {alignment for alignment, _ in found}


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
        text = case.on_gpu().ptx((9, 0))
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
