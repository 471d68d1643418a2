"""Every operation of GPUs with inputs for it: for a GPU and for the emulator.

From the same bytes both must make the same bytes; where an operation's meaning is said to differ in the last bit, a
bound is derived beside the comparison. :data:`CASES` is the table of kernels, with inputs that each operation is made
for: random ones, and the edges of what its docstring allows. ``tests/kernels/test_operations.py`` checks the table
without a GPU, ``tests/gpu/test_operations.py`` compares with one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from arithmetic_kernels import (
    as_bfloats,
    as_bytes,
    as_halves,
    dots_of_bytes,
    dots_of_floats,
    dots_of_short_floats,
    exchanged,
    fma_once,
    largest,
    looked_up,
    of_floats,
    of_runs,
    of_words,
    sums,
    widened,
)
from operation_inputs import (
    any_floats,
    random_bytes,
    to_bfloats,
    to_bytes,
    to_dots,
    to_dots_of_bytes,
    to_floats,
    to_fma,
    to_halves,
    to_runs,
    to_short_dots,
    to_short_dots_of_subnormals,
)
from operation_kernels import (
    ITEMS,
    THREADS,
    CaseConstants,
    copied,
    copied_in_bulk,
    counted,
    fields,
    global_fields,
    met,
    places,
    through_global,
    through_shared,
)

from qmm.kernels.lang.fields import DEFAULT_FIELDS, FieldAccess
from qmm.kernels.lang.specialize import specialize
from qmm.kernels.lang.targets import emulator
from qmm.kernels.lang.targets.emulator import EmulatorTarget, Memory
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["CASES", "Case"]

EMULATOR = EmulatorTarget()


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons
# ---------------------------------------------------------------------------------------------------------------------

Comparison = Callable[["Case", np.ndarray, np.ndarray], None]
"""Requires that what a GPU made agrees with what the emulator made, both as bytes."""


def bits(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(got, expected)


def numbers(dtype: type) -> Comparison:
    """The same bits; but a NaN is a NaN, since which one an operation makes is the machine's choice."""
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")

    def compare(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
        both = [np.where(np.isnan(made.view(dtype)), dtype("nan"), made.view(dtype)) for made in (got, expected)]
        np.testing.assert_array_equal(*[made.view(unsigned) for made in both])

    return compare


floats, halves = numbers(np.float32), numbers(np.float16)


def once_rounded(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
    """The same float32; where the emulator's sum of float64 ended on a tie, the number on its other side will do too.
    The product is exact there, the sum is rounded to 53 bits, and that to 24: two roundings give another result than
    one only if what lay beside a tie was first rounded to it."""
    got, expected = got.view(np.float32), expected.view(np.float32)
    a, b, c = case.source.astype(np.float64).T
    with np.errstate(invalid="ignore"):
        total = a * b + c
        beside = np.nextafter(expected, np.where(total > expected, np.inf, -np.inf).astype(np.float32))
        on_tie = (expected.astype(np.float64) + beside) / 2 == total
    floats(case, np.where(on_tie & (got == beside), expected, got).view(np.uint8), expected.view(np.uint8))


def sums_of_terms(error: float) -> Comparison:
    """Sums of products that differ by up to ``error`` parts of what their terms amount to, added up as magnitudes; and
    by 2**-145, which is what 16 products and 16 sums lose below the smallest normal number, 2**-150 each."""

    def compare(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
        magnitude = replace(case, source=np.abs(case.source)).emulated().view(np.float32).astype(np.float64)
        got, expected = (made.view(np.float32).astype(np.float64) for made in (got, expected))
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(got[~finite], expected[~finite])
        apart = np.abs(got[finite] - expected[finite])
        bound = error * magnitude[finite] + 2.0**-145
        worst = np.argmax(apart / bound)
        assert (apart <= bound).all(), f"{apart[worst]} apart, {bound[worst]} allowed"

    return compare


OF_FLOATS = 26 * 2.0**-24
"""The GPU makes eight fused products in each of two chains, and adds these: a term is rounded nine times at most. The
emulator's order is NumPy's: 16 times at most, the product included. Each takes 2**-24 at most; one is for the rest."""
OF_SHORT = 97 * 2.0**-23
"""Each of eight instructions adds eight products, exact, to a total. Of a tensor core's sums no more is promised than
single precision, in any order: it may cut off all that lies 24 bits below the largest term, four products at a time.
So two times five terms and their sum lose 2**-23 each, 96 in all. The emulator's sum is rounded once."""


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A kernel and what it is run with.

    Attributes:
        function: a kernel with the parameters ``source`` and ``target``, two addresses.
        source: its inputs.
        target: the bytes that it finds at its target, or how many, all 0xFF.
        compare: how results agree.
        bulk: whether its barriers are for bulk copies.
        fields: how it reads block fields.
        ctas: of a launch, THREADS threads each.
        shared_nbytes: shared memory of a CTA.
        launches: how often it runs; if more than once, each time it may start before the time before has ended.
        hopper: whether it needs compute capability 9.0.
    """

    function: Callable[..., None]
    source: np.ndarray
    target: np.ndarray | int
    compare: Comparison = bits
    bulk: bool = False
    fields: FieldAccess = DEFAULT_FIELDS
    ctas: int = 1
    shared_nbytes: int = 0
    launches: int = 1
    hopper: bool = False

    @functools.cached_property
    def kernel(self) -> Kernel:
        """The kernel, not yet compiled."""
        constants = CaseConstants(self.fields.alignment, self.bulk)
        shared = self.shared_nbytes > 0
        return Kernel(self.function.__name__, self.function, constants, THREADS, self.fields, shared)

    def emulated(self, target: EmulatorTarget = EMULATOR) -> np.ndarray:
        """What the emulator makes of it: the bytes at its target."""
        function = specialize(self.function, self.kernel.constants, target)
        memory = Memory()
        source = memory.add("source", self.source.tobytes(), constant=True)
        results = memory.add("target", self.before().tobytes())
        for _ in range(self.launches):
            emulator.launch(
                function,
                {"source": source.start, "target": results.start},
                memory=memory,
                grid=self.ctas,
                threads=THREADS,
                shared_nbytes=self.shared_nbytes,
                fields=self.fields,
                after_predecessors=self.launches == 1,
            )
        return results.array(np.uint8)

    def before(self) -> np.ndarray:
        """The bytes at its target."""
        return np.full(self.target, 0xFF, np.uint8) if isinstance(self.target, int) else self.target


CASES = {
    "places": Case(places, np.zeros(16, np.uint8), 3 * 32 * THREADS, ctas=3, shared_nbytes=16),
    "through global memory": Case(through_global, any_floats(ITEMS, 8), 144 * ITEMS),
    "through shared memory": Case(through_shared, any_floats(ITEMS, 8), 96 * ITEMS, shared_nbytes=32 * THREADS),
    **{
        f"fields at multiples of {alignment}": Case(
            fields,
            random_bytes(2 * THREADS, 16),
            32 * THREADS,
            fields=FieldAccess(alignment, "shared"),
            shared_nbytes=32 * THREADS,
        )
        for alignment in (1, 2, 4, 8, 16)
    },
    **{
        f"global fields at multiples of {alignment}": Case(
            global_fields,
            random_bytes(THREADS + 4, 16),
            32 * THREADS,
            fields=FieldAccess(alignment, "global"),
        )
        for alignment in (1, 2, 4, 8, 16)
    },
    "copied": Case(copied, random_bytes(3 * THREADS, 32), 96 * THREADS, shared_nbytes=16 + 32 * THREADS),
    "copied in bulk": Case(
        copied_in_bulk,
        random_bytes(2 * THREADS, 64),
        128 * THREADS,
        bulk=True,
        shared_nbytes=128 + 128 * THREADS,
        hopper=True,
    ),
    "met": Case(met, random_bytes(96, 16), 2 * 16 * 96, shared_nbytes=16 * 96),
    "counted": Case(counted, np.zeros(256, np.uint8), np.zeros(16 * THREADS, np.uint8), launches=20, hopper=True),
    "words": Case(of_words, random_bytes(ITEMS, 32), 288 * ITEMS),
    "looked up": Case(looked_up, random_bytes(ITEMS, 16), 80 * ITEMS),
    "widened": Case(widened, np.arange(65536, dtype=np.uint16), 1120 * ITEMS, floats),
    "as bfloats": Case(as_bfloats, to_bfloats(), 16 * ITEMS),
    "as halves": Case(as_halves, to_halves(), 32 * ITEMS, halves),
    "as bytes": Case(as_bytes, to_bytes(), 8 * ITEMS),
    "floats": Case(of_floats, to_floats(), 8 * ITEMS, floats),
    "runs": Case(of_runs, to_runs(), 320 * ITEMS, floats),
    "fma": Case(fma_once, to_fma(), 4 * ITEMS, once_rounded),
    "dots of floats": Case(dots_of_floats, to_dots(), 4 * ITEMS, sums_of_terms(OF_FLOATS)),
    "sums": Case(sums, random_bytes(ITEMS, 16), 16 * ITEMS),
    "largest": Case(largest, any_floats(ITEMS, 8), 16 * ITEMS),
    "exchanged": Case(exchanged, any_floats(ITEMS, 2), 40 * ITEMS, floats),
    "dots of bytes": Case(dots_of_bytes, to_dots_of_bytes(), 32 * ITEMS),
    "dots of short floats": Case(dots_of_short_floats, to_short_dots(), 16 * ITEMS, sums_of_terms(OF_SHORT)),
    "dots of subnormals": Case(
        dots_of_short_floats, to_short_dots_of_subnormals(), 16 * ITEMS, sums_of_terms(OF_SHORT)
    ),
}
