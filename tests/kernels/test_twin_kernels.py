"""The cases of ``tests/gpu/test_twins.py`` leave nothing out, run lane by lane, and compile. No GPU is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from lanes_twins import MAKERS, TWINS
from ptx_compile import GROUPS, assemble, retarget, without_gpu
from twin_cases import CASES

from qmm.kernels.lang import primitives, ptx
from qmm.kernels.runtime.launch import CUDAKernel

cases = pytest.mark.parametrize("name", CASES)


def called_by(kernel: Callable[..., None]) -> Iterator[object]:
    """What a kernel calls, itself or through its helpers."""
    for value in inspect.getclosurevars(kernel).globals.values():
        yield value
        if isinstance(value, FunctionType) and value.__module__ == kernel.__module__:
            yield from called_by(value)


def made_for(constants: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The operations that constants have made, as maker and arguments; but how many threads meet at a barrier is the
    block's affair."""
    for value in constants.values():
        if isinstance(value, tuple) and isinstance(value[0], str):
            yield value[:2]


def kernels() -> list[CUDAKernel]:
    return [spec.kernel() for specs in GROUPS.values() for spec in specs]


def test_every_operation_with_a_twin_and_every_primitive_has_a_case() -> None:
    called = {id(value) for case in CASES.values() for value in called_by(case.kernel)}
    named = {name: getattr(ptx, name) for name in TWINS}
    named |= {name: getattr(primitives, name) for name in primitives.__all__}
    assert [name for name, value in named.items() if id(value) not in called] == []


def test_every_maker_has_a_case_with_each_argument_that_kernels_use() -> None:
    made = {value for case in CASES.values() for value in made_for(case.constants)}
    assert {name for name, _ in made} == set(MAKERS)
    assert {value for kernel in kernels() for value in made_for(kernel.key["constants"])} <= made


def test_fields_are_loaded_at_each_alignment_that_kernels_use() -> None:
    loads = {primitives.load1, primitives.load2, primitives.load4, primitives.load16}
    found = {case.alignment for case in CASES.values() if loads <= set(called_by(case.kernel))}
    assert found == {kernel.key["alignment"] for kernel in kernels()} == {1, 2, 4, 8, 16}


@cases
def test_twins_run_and_other_results_are_refused(name: str) -> None:
    case = CASES[name]
    made = case.on_lanes()
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
    case = CASES["fused"]
    made = case.on_lanes().view(np.float32)
    a, b, c = case.source.astype(np.float64).T
    beside = np.nextafter(made, np.where(a * b + c > made, np.inf, -np.inf).astype(np.float32))
    for item, allowed in ((200, True), (300, False)):  # of to_fused: the first that is rounded from a tie, any number
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
    made = case.on_lanes().view(np.float32)
    case.compare(case, (made * np.float32(1 + 2.0**-bits / 2)).view(np.uint8), made.view(np.uint8))
    with pytest.raises(AssertionError):
        case.compare(case, (made * np.float32(1 + 2.0**-bits * 4)).view(np.uint8), made.view(np.uint8))
