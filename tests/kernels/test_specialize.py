"""What the specializer writes, read as text, and that it computes what the plain Python function computes.

Nothing is compiled here: the target of these tests leaves functions as they are.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmm.kernels.lang.specialize import registers, specialize, unroll

SCALE = 3
HALF = 0.5


class PythonTarget:
    """Compiles nothing and notes what it was asked for; ``intrinsics`` stand in for primitives."""

    name = "python"

    def __init__(self, intrinsics: dict[object, object] | None = None) -> None:
        self.intrinsics = intrinsics or {}
        self.device_functions: list[str] = []

    def intrinsic(self, primitive: object) -> object | None:
        return self.intrinsics.get(primitive)

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.device_functions.append(function.__name__)
        return function


def flat(function: Callable[..., Any], **constants: Any) -> Callable[..., Any]:
    return specialize(function, constants, PythonTarget())


def body(function: Callable[..., Any]) -> str:
    """The lines below ``def``, without their indentation."""
    first, *lines = function.__source__.splitlines()
    assert first.startswith("def ")
    return "\n".join(line[4:] for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Loops
# ---------------------------------------------------------------------------------------------------------------------


def sum_of_products(x):
    total = 0
    for i in unroll(COUNT):  # noqa: F821
        total += i * x
    return total


def test_an_unrolled_loop_is_written_out() -> None:
    written = flat(sum_of_products, COUNT=3)
    assert body(written) == "total = 0\ntotal += 0 * x\ntotal += 1 * x\ntotal += 2 * x\nreturn total"
    assert written(5) == 15


def test_a_loop_of_no_rounds_vanishes() -> None:
    assert body(flat(sum_of_products, COUNT=0)) == "total = 0\nreturn total"


def nested(x):
    total = 0
    for i in unroll(range(1, 6, 2)):
        for j in unroll(i):
            total = total * 2 + x * (10 * i + j)
    return total


def test_an_inner_loop_may_use_the_outer_variable() -> None:
    written = flat(nested)
    assert body(written).splitlines()[1:4] == [
        "total = total * 2 + x * 10",
        "total = total * 2 + x * 30",
        "total = total * 2 + x * 31",
    ]
    assert written(7) == nested(7)


def over_values(x):
    total = 0
    for i in unroll((4, -1)):
        total = total * 10 + i * x
    return total


def test_a_loop_may_run_over_values() -> None:
    assert flat(over_values)(3) == over_values(3) == 117


def counted(x, n):
    total = 0
    for i in range(n):
        total += x[i]
    while total > 10:
        total -= 10
    return total


def test_other_loops_stay_loops() -> None:
    written = flat(counted)
    assert body(written) == (
        "total = 0\nfor i in range(n):\n    total += x[i]\nwhile total > 10:\n    total -= 10\nreturn total"
    )
    assert written([9, 8, 7], 3) == counted([9, 8, 7], 3) == 4


def clipped(x):
    total = 0
    for i in unroll(6 // min(COUNT, 3)):  # noqa: F821
        for j in unroll(range(0, max(COUNT, 2), min(COUNT, 2))):  # noqa: F821
            total = total * 10 + i + j * x
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_count_may_be_the_smaller_or_larger_of_two(count: int) -> None:
    total = 0
    for i in range(6 // min(count, 3)):
        for j in range(0, max(count, 2), min(count, 2)):
            total = total * 10 + i + j * 7
    written = flat(clipped, COUNT=count)
    assert "for" not in body(written)
    assert written(7) == total


def unknown_count(n):
    for i in unroll(n):
        n += i
    return n


def test_a_count_that_is_not_known_cannot_be_unrolled() -> None:
    with pytest.raises(NameError, match="'n'"):
        flat(unknown_count)


# ---------------------------------------------------------------------------------------------------------------------
# Registers
# ---------------------------------------------------------------------------------------------------------------------


def in_registers(x, y):
    total = registers(ROWS * COLUMNS, x)  # noqa: F821
    for r in unroll(ROWS):  # noqa: F821
        for c in unroll(COLUMNS):  # noqa: F821
            total[r * COLUMNS + c] += r * y  # noqa: F821
            total[r * COLUMNS + c] = total[r * COLUMNS + c] * (c + 1)  # noqa: F821
    return total[0], total[ROWS * COLUMNS - 1]  # noqa: F821


def test_registers_become_variables() -> None:
    written = flat(in_registers, ROWS=2, COLUMNS=2)
    lines = body(written).splitlines()
    assert lines[:4] == ["total_0 = x", "total_1 = x", "total_2 = x", "total_3 = x"]
    assert lines[-3:] == ["total_3 += 1 * y", "total_3 = total_3 * 2", "return (total_0, total_3)"]
    assert "[" not in body(written)
    assert written(5, 7) == (5, 24)


def made_anew(x):
    values = registers(2, [])
    values[0].append(x)
    return values[1]


def test_each_register_gets_a_value_of_its_own() -> None:
    # Where plain Python shares one list. Kernels start registers with numbers or vectors, which cannot be changed.
    assert body(flat(made_anew)).startswith("values_0 = []\nvalues_1 = []\n")


# ---------------------------------------------------------------------------------------------------------------------
# Decisions
# ---------------------------------------------------------------------------------------------------------------------


def branches(x):
    if MODE == 0:  # noqa: F821
        return x
    elif MODE == 1:  # noqa: F821
        return not_even_a_name(x)  # noqa: F821
    elif x > 0:
        return -x
    return x * x


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (0, "return x\nreturn x * x"),
        (1, "return not_even_a_name(x)\nreturn x * x"),
        (2, "if x > 0:\n    return -x\nreturn x * x"),
    ],
)
def test_a_known_if_is_decided(mode: int, expected: str) -> None:
    assert body(flat(branches, MODE=mode)) == expected


def emptied(x):
    if x > 0:
        if FLAG:  # noqa: F821
            x = 0
    elif not FLAG:  # noqa: F821
        x = 1
    while x > 5:
        if FLAG:  # noqa: F821
            x -= 5
        x -= 1
    return x


@pytest.mark.parametrize("flag", [False, True])
def test_a_branch_that_becomes_empty_still_parses(flag: bool) -> None:
    written = flat(emptied, FLAG=flag)
    assert "FLAG" not in written.__source__
    assert written(-1) == (-1 if flag else 1)
    assert written(9) == (0 if flag else 5)


def expressions(x, y):
    return (
        x if FLAG else y,  # noqa: F821
        FLAG and x,  # noqa: F821
        x and FLAG and y,  # noqa: F821
        FLAG or x,  # noqa: F821
        x > y if x else y,
        not FLAG,  # noqa: F821
        -COUNT + 2 * COUNT,  # noqa: F821
        1 < COUNT <= 4,  # noqa: F821
        x + COUNT,  # noqa: F821
    )


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (True, "return (x, x, x and y, True, x > y if x else y, False, 4, True, x + 4)"),
        (False, "return (y, False, False, x, x > y if x else y, True, 4, True, x + 4)"),
    ],
)
def test_known_expressions_are_folded(flag: bool, expected: str) -> None:
    assert body(flat(expressions, FLAG=flag, COUNT=4)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def with_globals(x):
    """Its docstring is left out."""
    return x * SCALE + HALF


def test_numbers_become_literals_and_floats_single() -> None:
    written = flat(with_globals)
    assert body(written) == "return x * 3 + float32(0.5)"
    assert type(written(np.float32(1))) is np.float32


def test_constants_go_before_globals() -> None:
    assert body(flat(with_globals, SCALE=8)) == "return x * 8 + float32(0.5)"


def with_shadows(x, SCALE):
    return x * SCALE


def test_an_argument_hides_a_constant_and_a_global() -> None:
    written = flat(with_shadows, SCALE=100, x=7)
    assert body(written) == "return x * SCALE"
    assert written(2, 5) == 10


def test_closures_are_seen() -> None:
    factor = 11

    def multiply(x: int) -> int:
        return x * factor

    assert body(flat(multiply)) == "return x * 11"


def annotated(x: int, *rest: Undefined, y: Undefined = 4) -> Undefined:  # noqa: F821
    return x + y + len(rest)


def test_annotations_are_left_out() -> None:
    written = flat(annotated)
    assert written.__source__.startswith("def annotated(x, *rest, y=4):")
    assert written(1, 0, 0, y=2) == 5


def test_the_source_is_there_for_tracebacks() -> None:
    def fails(x: int) -> float:
        return x / ZERO  # noqa: F821

    written = flat(fails, ZERO=0)
    with pytest.raises(ZeroDivisionError) as caught:
        written(1)
    assert "return x / 0" in "".join(traceback.format_tb(caught.value.__traceback__))
    assert written.__name__ == "fails"
    assert written.__module__ == __name__


# ---------------------------------------------------------------------------------------------------------------------
# Functions that kernels call
# ---------------------------------------------------------------------------------------------------------------------


def primitive(x):
    return x + 1


def inner(x):
    total = registers(2, x)
    for i in unroll(COUNT):  # noqa: F821
        total[i % 2] += primitive(i)
    return total[0] * total[1]


def middle(x):
    return inner(x) + inner(x + 1)


def outer(x, *more):
    return middle(x) + inner(*more) + chosen(x)  # noqa: F821


def chosen_one(x):
    return 1000 * x * COUNT  # noqa: F821


def test_called_functions_are_specialized_once_each() -> None:
    target = PythonTarget()
    written = specialize(outer, {"COUNT": 3, "chosen": chosen_one}, target)
    # Innermost first; `inner`, called from two functions, once; the kernel itself is left to the caller.
    assert sorted(target.device_functions) == ["chosen_one", "inner", "middle", "primitive"]
    assert target.device_functions.index("inner") < target.device_functions.index("middle")
    assert "middle(x) + inner(*more) + chosen(x)" in body(written)
    called = written.__globals__["inner"]
    assert "total_0 += primitive(2)" in body(called)
    # inner: 3 rounds add 1 + 3 to one register and 2 to the other.
    assert written(5, 6) == (9 * 7 + 10 * 8) + 10 * 8 + 15000


def test_primitives_are_exchanged_and_not_specialized() -> None:
    target = PythonTarget({primitive: lambda x: 100 * x})
    written = specialize(inner, {"COUNT": 2}, target)
    assert target.device_functions == []
    assert written(1) == (1 + 0) * (1 + 100)


def use_the_unhashable(x):
    return UNHASHABLE[x]


UNHASHABLE = [10, 20]


def test_a_global_of_another_kind_is_passed_on() -> None:
    assert flat(use_the_unhashable)(1) == 20


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def product(x, y, n):
    """Something like a kernel: rows of COUNT running sums, a decided mode, a helper, floats and a loop that stays."""
    total = registers(COUNT, 0.0)  # noqa: F821
    best = 0.25
    for step in range(n):
        for i in unroll(COUNT):  # noqa: F821
            part = weigh(x[step], i)
            if SIGNED and part < 0:  # noqa: F821
                total[i] -= part * y[step]
            else:
                total[i] += part * (y[step] if not SIGNED or i % 2 == 0 else 1.5)  # noqa: F821
            best = max(best, total[i])
    result = best
    for i in unroll(COUNT):  # noqa: F821
        result = result * 0.5 + total[i]
    return result


def weigh(value, i):
    if i == 0:
        return value
    return value * SHIFT + i  # noqa: F821


@given(
    st.integers(1, 5),
    st.booleans(),
    st.integers(-3, 3),
    st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=6),
)
def test_a_specialized_function_computes_what_the_plain_one_does(
    count: int, signed: bool, shift: int, values: list[tuple[int, int]]
) -> None:
    constants = {"COUNT": count, "SIGNED": signed, "SHIFT": shift}
    x, y = [a for a, _ in values], [b for _, b in values]
    plain = {**product.__globals__, **constants}
    plain["weigh"] = type(weigh)(weigh.__code__, plain)
    expected = type(product)(product.__code__, plain)(x, y, len(x))
    # Every intermediate is a whole multiple of 2**-7 below 2**14: float32 and float64 agree on each bit.
    assert specialize(product, constants, PythonTarget())(x, y, len(x)) == expected


def leaves_an_unrolled_loop(n):
    for i in unroll(4):
        if i == n:
            break
    return i


def has_an_else(n):
    for _ in range(n):
        n += 1
    else:  # noqa: PLW0120  (this is what is refused)
        n = 0
    return n


def gives_a_constant_a_new_value(n):
    COUNT = n
    return COUNT


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (leaves_an_unrolled_loop, "break or continue"),
        (has_an_else, "else of a loop"),
        (gives_a_constant_a_new_value, "new value for COUNT"),
    ],
)
def test_what_would_change_its_meaning_is_refused(function, message) -> None:
    with pytest.raises(SyntaxError, match=message):
        specialize(function, {"COUNT": 3}, PythonTarget())
