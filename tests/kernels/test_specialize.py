"""What the specializer writes, read as text, and that it computes what the plain Python function computes.

Nothing is compiled here: the target of these tests leaves functions as they are.
"""

from __future__ import annotations

import enum
import functools
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.primitives import half
from qmm.kernels.lang.specialize import registers, specialize, unroll

SCALE = 3
HALF = 0.5
ROOT = np.sqrt(np.float64(2))
SIDE = enum.IntEnum("SIDE", {"LEFT": 1, "RIGHT": 2})
LEFT = SIDE.LEFT


class Knobs(Constants):
    """Whatever constants a test wants."""

    COUNT: int
    ROWS: int
    COLUMNS: int
    MODE: int
    FLAG: bool
    OFF: bool
    SIGNED: bool
    SHIFT: int
    ZERO: int
    chosen: Callable[..., Any]

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


c = Knobs.placeholder()


class PythonTarget:
    """Compiles nothing and notes what it was asked for; ``intrinsics`` stand in for primitives."""

    name = "python"

    def __init__(
        self, intrinsics: dict[object, object] | None = None, absent_masks: frozenset[str] = frozenset()
    ) -> None:
        self.intrinsics = intrinsics or {}
        self.absent_masks = absent_masks
        self.device_functions: list[str] = []

    def intrinsic(self, primitive: object) -> object | None:
        return self.intrinsics.get(primitive)

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.device_functions.append(function.__name__)
        return function


def flat(function: Callable[..., Any], **constants: Any) -> Callable[..., Any]:
    return specialize(function, Knobs(**constants), PythonTarget())


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
    for i in unroll(c.COUNT):
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
    for i in unroll(6 // min(c.COUNT, 3)):
        for j in unroll(range(0, max(c.COUNT, 2), min(c.COUNT, 2))):
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
    with pytest.raises(SyntaxError, match=r"test_specialize.py, line \d+, in unknown_count: .* 'n' is not known"):
        flat(unknown_count)


# ---------------------------------------------------------------------------------------------------------------------
# Registers
# ---------------------------------------------------------------------------------------------------------------------


def in_registers(x, y):
    total = registers(c.ROWS * c.COLUMNS, x)
    for r in unroll(c.ROWS):
        for column in unroll(c.COLUMNS):
            total[r * c.COLUMNS + column] += r * y
            total[r * c.COLUMNS + column] = total[r * c.COLUMNS + column] * (column + 1)
    return total[0], total[c.ROWS * c.COLUMNS - 1]


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


def negated(x):
    return -x


def branches(x):
    if c.MODE == 0:
        return x
    elif c.MODE == 1:
        return negated(x)
    elif x > 0:
        return -x
    return x * x


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (0, "return x\nreturn x * x"),
        (1, "return negated(x)\nreturn x * x"),
        (2, "if x > 0:\n    return -x\nreturn x * x"),
    ],
)
def test_a_known_if_is_decided(mode: int, expected: str) -> None:
    assert body(flat(branches, MODE=mode)) == expected


def of_numbers_that_python_writes_otherwise(x, side=SIDE.RIGHT):
    return x * ROOT + LEFT + side


def test_numbers_of_numpy_and_of_enumerations_are_literals() -> None:
    written = flat(of_numbers_that_python_writes_otherwise)
    assert written.__source__.splitlines()[0].endswith("side=2):")
    assert body(written) == f"return x * float32({float(ROOT)!r}) + 1 + side"


def emptied(x):
    if x > 0:
        if c.FLAG:
            x = 0
    elif not c.FLAG:
        x = 1
    while x > 5:
        if c.FLAG:
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
        x if c.FLAG else y,
        c.FLAG and x,
        x and c.FLAG and y,
        c.FLAG or x,
        x > y if x else y,
        not c.FLAG,
        -c.COUNT + 2 * c.COUNT,
        1 < c.COUNT <= 4,
        x + c.COUNT,
    )


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (True, "return (x, x, x and y, True, x > y if x else y, False, 4, True, x + 4)"),
        (False, "return (y, False, x and False, x, x > y if x else y, True, 4, True, x + 4)"),
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


def with_shadows(x, SCALE):
    return x * SCALE


def test_an_argument_hides_a_global() -> None:
    written = flat(with_shadows)
    assert body(written) == "return x * SCALE"
    assert written(2, 5) == 10


def test_a_constant_that_nobody_gave_is_named() -> None:
    message = r"^sum_of_products \(.*test_specialize.py:\d+\): there is no constant COUNT; there are FLAG, ROWS$"
    with pytest.raises(AttributeError, match=message):
        flat(sum_of_products, FLAG=True, ROWS=2)


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
        return x / c.ZERO

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
    for i in unroll(c.COUNT):
        total[i % 2] += primitive(i)
    return total[0] * total[1]


def middle(x):
    return inner(x) + inner(x + 1)


def outer(x, *more):
    return middle(x) + inner(*more) + c.chosen(x)


def chosen_one(x):
    return 1000 * x * c.COUNT


def test_called_functions_are_specialized_once_each() -> None:
    target = PythonTarget()
    written = specialize(outer, Knobs(COUNT=3, chosen=chosen_one), target)
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
    written = specialize(inner, Knobs(COUNT=2), target)
    assert target.device_functions == []
    assert written(1) == (1 + 0) * (1 + 100)


def use_the_unhashable(x):
    return UNHASHABLE[x]


UNHASHABLE = [10, 20]


def test_a_global_of_another_kind_is_passed_on() -> None:
    assert flat(use_the_unhashable)(1) == 20


# ---------------------------------------------------------------------------------------------------------------------
# Helpers that take registers
# ---------------------------------------------------------------------------------------------------------------------


def add_to(total, x, offset):
    """Adds to each register; `step` is its own variable, whatever the caller has under that name."""
    step = x + offset
    for i in unroll(c.COUNT):
        total[i] += step * i


def weighted(values, scale):
    scale = scale * 2  # an argument that changes is a variable of its own
    partial = registers(c.COUNT, 0)
    add_to(partial, scale, 1)
    for i in unroll(c.COUNT):
        partial[i] += values[i] * scale
    return partial[0], partial[c.COUNT - 1]


def with_helpers(x, step):
    total = registers(c.COUNT, x)
    add_to(total, step, SCALE)
    add_to(total, x + 1, step)
    first, last = weighted(total, step)
    return first * 1000 + last + step


def test_a_helper_works_on_the_registers_of_its_caller() -> None:
    written = flat(with_helpers, COUNT=3)
    assert "add_to(" not in body(written)
    assert "weighted(" not in body(written)
    assert "[" not in body(written)
    assert body(written).splitlines()[3:5] == ["add_to_1_step = step + 3", "total_0 += add_to_1_step * 0"]
    plain = {**globals(), "c": Knobs(COUNT=3)}
    for helper in (add_to, weighted, with_helpers):
        plain[helper.__name__] = type(helper)(helper.__code__, plain)
    assert written(5, 7) == plain["with_helpers"](5, 7)


def test_what_a_helper_is_given_that_is_known_is_known_in_it() -> None:
    def decide(total, wide):
        if wide:
            total[0] += 1
        else:
            total[1] += not_even_a_name  # noqa: F821

    def kernel(x):
        total = registers(2, x)
        decide(total, True)
        c.chosen(total, *(x, False))
        return total[0] + total[1]

    written = flat(kernel, chosen=lambda_like)
    assert body(written) == "total_0 = x\ntotal_1 = x\ntotal_0 += 1\ntotal_1 = x\nreturn total_0 + total_1"


def lambda_like(total, x, double):
    total[1] = 2 * x if double else x


def the_same_name(total):
    total[0] *= HALF_OF_ANOTHER_MODULE["HALF"]


def test_a_helper_sees_the_globals_of_its_own_module() -> None:
    elsewhere: dict[str, Any] = {"HALF_OF_ANOTHER_MODULE": {"HALF": 7}}
    moved = type(the_same_name)(the_same_name.__code__, elsewhere)

    def kernel(x):
        total = registers(1, x)
        the_same_name(total)
        c.chosen(total)
        return total[0]

    assert flat(kernel, chosen=moved)(2) == 2 * 0.5 * 7


HALF_OF_ANOTHER_MODULE = {"HALF": 0.5}


def calls_itself(total):
    calls_itself(total)


def returns_early(total, x):
    if x > 0:
        return total[0]
    return x


def given_itself(x):
    total = registers(1, x)
    calls_itself(total)


def given_early(x):
    total = registers(1, x)
    y = returns_early(total, x)
    return y


def given_too_little(x):
    total = registers(1, x)
    add_to(total, x)


def as_a_whole(x):
    total = registers(1, x)
    return max(total)


def by_a_variable(x):
    total = registers(4, x)
    for i in range(4):
        total[i] += 1
    return total[0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (given_itself, "calls_itself, which calls itself"),
        (given_early, "returns_early, which returns before its end"),
        (given_too_little, "2 arguments for the 3 of add_to"),
        (as_a_whole, "registers total as a whole"),
        (by_a_variable, "registers total indexed by a variable: 'i' is not known when the kernel is compiled"),
    ],
)
def test_registers_that_could_not_stay_registers_are_refused(function, message) -> None:
    with pytest.raises(SyntaxError, match=f"test_specialize.py, line .*{message}"):
        flat(function, COUNT=2)


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def product(x, y, n):
    """Something like a kernel: rows of c.COUNT running sums, a decided mode, a helper, floats and a loop that stays."""
    total = registers(c.COUNT, 0.0)
    best = 0.25
    for step in range(n):
        for i in unroll(c.COUNT):
            part = weigh(x[step], i)
            if c.SIGNED and part < 0:
                total[i] -= part * y[step]
            else:
                total[i] += part * (y[step] if not c.SIGNED or i % 2 == 0 else 1.5)
            best = max(best, total[i])
    result = best
    for i in unroll(c.COUNT):
        result = result * 0.5 + total[i]
    return result


def weigh(value, i):
    if i == 0:
        return value
    return value * c.SHIFT + i


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
    plain = {**product.__globals__, "c": Knobs(**constants)}
    plain["weigh"] = type(weigh)(weigh.__code__, plain)
    expected = type(product)(product.__code__, plain)(x, y, len(x))
    # Every intermediate is a whole multiple of 2**-7 below 2**14: float32 and float64 agree on each bit.
    assert flat(product, **constants)(x, y, len(x)) == expected


def keeps_to_its_rows(n, m):
    first = mask("first", max(n, 0), n)
    if mask("rows", n < m) and mask("known", c.COUNT == 3, False):
        return first
    return -1


def test_a_mask_is_its_value_and_costs_nothing() -> None:
    written = flat(keeps_to_its_rows, COUNT=3)
    assert body(written) == "first = max(n, 0)\nif n < m:\n    return first\nreturn -1"
    assert (written(-2, 4), written(5, 4)) == (0, -1)


def test_a_mask_that_is_left_out_is_what_stands_there_without_it() -> None:
    def without(*names: str) -> str:
        return body(specialize(keeps_to_its_rows, Knobs(COUNT=3), PythonTarget(absent_masks=frozenset(names))))

    assert without("first") == "first = n\nif n < m:\n    return first\nreturn -1"
    assert without("rows") == "first = max(n, 0)\nreturn first\nreturn -1"
    assert without("known") == "first = max(n, 0)\nreturn -1"


def masks_by_a_variable(n, m):
    return mask(n, n < m)


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


def gives_a_known_number_a_new_value(n):
    for i in unroll(3):
        i = n
    return i


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (leaves_an_unrolled_loop, "break or continue"),
        (has_an_else, "else of a loop"),
        (masks_by_a_variable, "a mask without a name of its own"),
        (gives_a_known_number_a_new_value, "new value for i"),
    ],
)
def test_what_would_change_its_meaning_is_refused(function, message) -> None:
    with pytest.raises(SyntaxError, match=message):
        specialize(function, Knobs(COUNT=3), PythonTarget())


# ---------------------------------------------------------------------------------------------------------------------
# What would mean something else than its Python
# ---------------------------------------------------------------------------------------------------------------------


def either_or_both(x):
    return c.COUNT or 8, c.COUNT and 7, x or c.COUNT, x and c.COUNT, c.COUNT and x, x or (c.COUNT and 7)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("x", [0, 5])
def test_and_and_or_are_one_of_their_operands(count: int, x: int) -> None:
    expected = (count or 8, count and 7, x or count, x and count, count and x, x or (count and 7))
    assert flat(either_or_both, COUNT=count)(x) == expected


def only_their_truth(x):
    if x and not (x or c.FLAG):
        return 1
    while (x and c.FLAG) or c.COUNT:
        return 2 if x or c.COUNT else 3
    return 4


def test_a_test_is_decided_by_the_truth_of_its_operands() -> None:
    assert body(flat(only_their_truth, COUNT=3, FLAG=True)) == "while True:\n    return 2\nreturn 4"


calls: list[int] = []


def called(x):
    calls.append(x)
    return x


def returns_a_call(total, x):
    total[0] += x
    return called(x)


def calls_in_tests(x, y):
    if called(x) and c.OFF:
        not_even_a_name(x)  # noqa: F821
    if y and called(x + 1) and y and c.OFF and called(x + 2):
        return 0
    elif called(x + 3) > 0 or not c.OFF:
        y += 1
    while called(x + 4) > 0 and c.OFF:
        y += 2
    y += 4 if called(x + 5) and c.OFF else 8
    y += (called(x + 6) > 0 and c.OFF) + (not (called(x + 7) or c.COUNT))
    if (z := x) and c.OFF:
        return 0
    total = registers(1, z)
    returns_a_call(total, x + 8)
    return y + total[0]


@pytest.mark.parametrize("x", [0, 5])
@pytest.mark.parametrize("y", [0, 7])
def test_a_call_whose_truth_does_not_matter_is_still_made(x: int, y: int) -> None:
    """It may store something."""
    plain = type(calls_in_tests)(calls_in_tests.__code__, {**globals(), "c": Knobs(OFF=False, COUNT=3)})
    expected = plain(x, y), [*calls]
    calls.clear()
    found = flat(calls_in_tests, OFF=False, COUNT=3)(x, y), [*calls]
    calls.clear()
    assert found == expected


def adds_one_and(total, value):
    total[0] += 1
    total[1] += value


def given_its_own_register(x):
    total = registers(2, x)
    adds_one_and(total, total[0])
    return total[1]


def test_a_register_given_by_value_keeps_it() -> None:
    assert flat(given_its_own_register)(1) == given_its_own_register(1) == 2


def reads_after_the_loop(x, i):
    for i in unroll(2):
        x += i
    for j in unroll((5, 7)):
        x *= j
    for k in unroll(2):
        for k in unroll(4):  # noqa: B007
            pass
        x += k
    return x + 100 * i + 1000 * j


def test_the_variable_of_an_unrolled_loop_keeps_its_last_value() -> None:
    assert flat(reads_after_the_loop)(3, 9) == reads_after_the_loop(3, 9)


def two_of_a_name(x):
    total_0 = 7
    total = registers(2, x)
    return total_0 + total[0]


def argument_of_a_name(x, total_1):
    total = registers(2, x)
    return total_1 + total[0]


def helper_of_a_name(x):
    adds_to_1_step = 5
    total = registers(1, x)
    adds_to(total)
    return total[0] + adds_to_1_step


def adds_to(total):
    step = 2
    total[0] += step


GLOBAL_0 = [1]


def global_of_a_name(x):
    GLOBAL = registers(1, x)
    return GLOBAL[0] + GLOBAL_0[0]


def past_the_end(x):
    total = registers(2, x)
    return total[c.COUNT]


def before_the_start(x):
    total = registers(2, x)
    return total[-1]


def by_a_slice(x):
    total = registers(2, x)
    return total[0:1]


def half_an_index(x):
    total = registers(2, x)
    return total[c.COUNT / 2]


def half_a_round(x):
    for i in unroll(2.5):
        x += i
    return x


def divides_by_zero(x):
    return x + 1 // c.ZERO


def two_names_at_once(x):
    a = b = registers(2, x)
    return a[0] + b[0]


def new_value_for_registers(x):
    total = registers(2, x)
    total = 5
    return total


def with_a_lambda(x):
    return max(x, 1, key=lambda y: y + x)


def with_a_comprehension(x):
    return max([x + i for i in (1, 2)])


def with_a_function_inside(x):
    def inside(y):
        return y + 1

    return inside(x)


def of_32_bits(x):
    return np.uint32(x) * np.uint32(x)


def of_an_unknown_name(x):
    return x + not_even_a_name  # noqa: F821


def helper_in_a_circle(x):
    return x and helper_in_a_circle(x - 1)


def operation_by_keyword(x):
    return half(bits=x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (with_a_lambda, "a lambda, a comprehension or a def inside a kernel"),
        (with_a_comprehension, "a lambda, a comprehension or a def inside a kernel"),
        (with_a_function_inside, "a lambda, a comprehension or a def inside a kernel"),
        (of_32_bits, "np.uint32: integers of compiled kernels have 64 bits"),
        (of_an_unknown_name, "not_even_a_name, which is not defined"),
        (helper_in_a_circle, "it calls itself"),
        (operation_by_keyword, r"half\(bits=x\): operations take arguments by position"),
        (two_of_a_name, "a variable total_0: specialize has its own of such names"),
        (argument_of_a_name, "a variable total_1: specialize has its own of such names"),
        (helper_of_a_name, "a variable adds_to_1_step: specialize has its own of such names"),
        (global_of_a_name, "GLOBAL_0, both a variable and a global or a constant"),
        (past_the_end, "register 3 of total, which has 2"),
        (before_the_start, "register -1 of total, which has 2"),
        (by_a_slice, "registers total indexed: "),
        (half_a_round, "how often to unroll: 'float' object is not iterable"),
        (divides_by_zero, "1 // 0: integer division or modulo by zero"),
        (two_names_at_once, r"registers but as name = registers\(count, value\)"),
        (half_an_index, "registers total indexed: 'float' object cannot be interpreted as an integer"),
        (new_value_for_registers, "registers total as a whole"),
    ],
)
def test_what_means_something_else_is_refused_with_its_place(function, message) -> None:
    with pytest.raises(SyntaxError, match=rf"test_specialize.py, line \d+, in {function.__name__}: .*{message}"):
        flat(function, COUNT=3, ZERO=0)


def test_what_a_target_says_of_an_operation_is_heard() -> None:
    class WithoutIt(PythonTarget):
        def intrinsic(self, primitive: object) -> object | None:
            raise TypeError(f"{primitive} has no lowering for the target 'python'")

    with pytest.raises(TypeError, match="has no lowering for the target 'python'"):
        specialize(inner, Knobs(COUNT=2), WithoutIt())


def named_like_an_attribute(x):
    total = registers(1, x)
    adds_a_real(total, x + 1)
    return total[0]


real = 100


def adds_a_real(total, real):
    total[0] += real.real


def test_an_argument_named_like_an_attribute_hides_a_global() -> None:
    assert flat(named_like_an_attribute)(1) == named_like_an_attribute(1) == 3


SHAPE = (2, 3)


def numbers_of_numpy(x):
    for i in unroll(c.COUNT):
        x = x * 10 + i
    for i in unroll(SHAPE):
        x = x * 10 + i
    for i in unroll(SHAPE[c.ROWS]):
        x = x * 10 + i
    return x


def test_numbers_of_numpy_and_tuples_are_known() -> None:
    written = flat(numbers_of_numpy, COUNT=np.int64(2), ROWS=np.int8(1))
    assert "for" not in body(written)
    assert written(0) == 123012


this = sys.modules[__name__]


def through_a_module(x):
    total = this.registers(2, x)
    for i in this.unroll(this.c.COUNT):
        total[i] += this.mask("rows", i, 7)
    this.adds_one_and(total, SCALE)
    return total[0] + total[1]


def test_the_language_is_known_through_a_module_too() -> None:
    written = flat(through_a_module, COUNT=2)
    assert "this" not in body(written)
    assert written(5) == 5 + 5 + 0 + 1 + 1 + 3


def calls_through_a_module(x):
    return this.primitive(x) + this.inner(x) * this.SCALE + int(np.int64(this.this.HALF))


def test_what_a_module_names_is_what_its_name_names() -> None:
    target = PythonTarget({primitive: lambda x: 100 * x})
    written = specialize(calls_through_a_module, Knobs(COUNT=2), target)
    assert body(written) == "return primitive(x) + inner(x) * 3 + int(np.int64(float32(0.5)))"
    assert target.device_functions == ["inner"]
    assert written(1) == 100 + (1 + 0) * (1 + 100) * 3


def a_name_that_a_module_lacks(x):
    return this.nonesuch(x)


def test_a_name_that_a_module_lacks_is_refused() -> None:
    message = (
        r"test_specialize.py, line \d+, in a_name_that_a_module_lacks: .* this.nonesuch: the module has no such name"
    )
    with pytest.raises(SyntaxError, match=message):
        flat(a_name_that_a_module_lacks)


def with_defaults(x, scale=SCALE * 2, values=SHAPE, *, half=-HALF, nothing=None):
    return x * scale + values[0] + half if nothing is None else x


def uses_defaults(x):
    return with_defaults(x) + with_defaults(x, half=4)


def test_the_defaults_of_a_function_are_the_values_it_has() -> None:
    written = flat(uses_defaults)
    assert written(1) == uses_defaults(1)
    assert written.__globals__["with_defaults"].__source__.startswith(
        "def with_defaults(x, scale=6, values=default, *, half=float32(-0.5), nothing=None):"
    )


def a_variable_named_float32(x):
    float32 = x * 0.5
    return float32 + 0.25


def float32(x):
    return 10 * x


def a_function_named_float32(x):
    return float32(x) + 0.25


@pytest.mark.parametrize("function", [a_variable_named_float32, a_function_named_float32])
def test_a_name_float32_of_ones_own_is_not_the_type_of_literals(function: Callable[[int], float]) -> None:
    written = flat(function)
    assert written(3) == function(3)
    assert "float32_(0.25)" in body(written)


def test_a_source_that_cannot_be_read_has_a_place() -> None:
    namespace: dict[str, Any] = {}
    exec(compile("\n\ndef typed_in(x):\n    return x", "<input>", "exec"), namespace)
    with pytest.raises(SyntaxError, match=r"^<input>, line 3, in typed_in: its source cannot be read"):
        flat(namespace["typed_in"])
    with pytest.raises(SyntaxError, match=r"test_specialize.py, line \d+, in <lambda>: a kernel is defined by def"):
        flat(lambda x: x)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("def second(x):\n    return 2\n\n\ndef first(x):\n    return 1\n", "there is second instead"),
        ("def first(x:\n    return 1\n", "in a file as it was imported"),
        ("# nothing\n", "in a file as it was imported"),
    ],
)
def test_a_file_that_has_changed_gives_no_other_function(
    changed: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file_that_changes.py"
    path.write_text("def first(x):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = importlib.import_module(path.stem).first
    del sys.modules[path.stem]
    assert flat(first)(0) == 1
    path.write_text(changed)
    with pytest.raises(SyntaxError, match=f"file_that_changes.py, line 1, in first: .*{message}"):
        flat(first)


def test_what_a_decorator_has_replaced_is_refused() -> None:
    @functools.wraps(primitive)
    def twice(x: int) -> int:
        return 2 * int(primitive(x))

    with pytest.raises(SyntaxError, match=r"in primitive: there is primitive instead: .* a decorator"):
        flat(twice)
