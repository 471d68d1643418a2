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
from operation_kernels import (
    ITEMS,
    THREADS,
    CaseConstants,
    as_bfloats,
    as_bytes,
    as_halves,
    copied,
    copied_in_bulk,
    counted,
    dots_of_bytes,
    dots_of_floats,
    dots_of_short_floats,
    exchanged,
    fields,
    fma_once,
    global_fields,
    largest,
    looked_up,
    met,
    of_floats,
    of_runs,
    of_words,
    places,
    sums,
    through_global,
    through_shared,
    widened,
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


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
EDGES = np.array(
    [
        *(0.0, 1.0, np.inf, np.nan),
        *(2.0**-149, 2.0**-126 - 2.0**-149, 2.0**-126, 2.0**126, 2.0**127, 2.0**128 - 2.0**104),
        *(65504.0, 65519.996, 65520.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24),  # as halves: the largest, and subnormals
        *(2.0**128 - 2.0**119, 2.0**128 - 2.0**119 - 2.0**104),  # as bfloats: the tie with infinity, and what is below
        *(2.0**-134, 1.5 * 2.0**-133),  # as bfloats: ties of subnormals
    ],
    np.float32,
)
EDGES = np.concatenate([EDGES, -EDGES])


def random_bytes(*shape: int) -> np.ndarray:
    """Bytes, the extremes of a signed one among them in whole rows."""
    made = RNG.integers(0, 256, shape, np.uint8)
    for i, value in enumerate((0x80, 0x7F, 0xFF, 0)):
        made[64 * i : 64 * i + 32] = value
    return made


def quiet(values: np.ndarray) -> np.ndarray:
    """Numbers whose NaNs are quiet: others do not pass through Python's floats unchanged."""
    return np.where(np.isnan(values), (values.view(np.uint32) | 0x400000).view(np.float32), values)


def any_floats(*shape: int) -> np.ndarray:
    """Edges, random bits, and ordinary numbers; in another order each time."""
    count = int(np.prod(shape))
    random_bits = RNG.integers(0, 1 << 32, count // 2, np.uint32).view(np.float32)
    made = np.concatenate([EDGES, quiet(random_bits), RNG.standard_normal(count, np.float32)])[:count]
    return RNG.permutation(made).reshape(shape)


def ties(exponents: range, dropped: int) -> np.ndarray:
    """Numbers half way between two that are shorter by so many bits, and those just beside: 3 * 64 for each exponent,
    of both signs."""
    middles = (RNG.integers(0, 1 << 23 - dropped, (len(exponents), 64)) << dropped) + (1 << dropped - 1)
    middles += ((np.array(exponents) + 127) << 23)[:, None] + (RNG.integers(0, 2, middles.shape) << 31)
    return np.concatenate([middles - 1, middles, middles + 1]).astype(np.uint32).view(np.float32).ravel()


def to_halves() -> np.ndarray:
    """Ties of normal halves; ties of subnormal ones, which are multiples of 2**-24; others."""
    subnormal = ((np.arange(512) + 0.5) * 2.0**-24).astype(np.float32)
    beside = [subnormal, np.nextafter(subnormal, np.float32(0)), -np.nextafter(subnormal, np.float32(1))]
    made = np.concatenate([ties(range(-14, 16, 3), 13), *beside])
    return np.concatenate([made, any_floats(ITEMS * 8 - len(made))])


def to_bfloats() -> np.ndarray:
    made = ties(range(-126, 128, 20), 16)
    return np.concatenate([made, any_floats(ITEMS * 8 - len(made))])


def to_bytes() -> np.ndarray:
    """Four values and a factor whose products round to signed bytes: ties, numbers just beside, random ones as the
    quantization makes them, and values that vanish."""
    factors = 2.0 ** RNG.integers(-100, 100, 128)
    middles = np.resize(np.arange(-128, 127) + 0.5, (128, 4))
    middles = RNG.permuted(middles, axis=None).astype(np.float32)
    beside = [middles, *(np.nextafter(middles, np.float32(end)) for end in (-128, 127))]
    rows = [np.column_stack([values / factors[:, None], factors]) for values in beside]
    values = RNG.standard_normal((ITEMS - 384, 4), np.float32) * RNG.lognormal(0, 20, (ITEMS - 384, 1))
    values = values.astype(np.float32)
    values[:8] = RNG.choice([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126], (8, 4))
    inverse = np.float32(127) / np.maximum(np.abs(values).max(1, keepdims=True), np.float32(2.0**-100))
    return np.concatenate([*rows, np.column_stack([values, inverse])]).astype(np.float32)


def to_floats() -> np.ndarray:
    """Any number, and a normal positive one."""
    normal = RNG.integers(0x00800000, 0x7F800000, ITEMS, np.uint32)
    normal[:4] = 0x00800000, 0x7F7FFFFF, 0x7E800000, 0x7F000000
    normal[4:64] &= 0x7F800000
    return np.column_stack([any_floats(ITEMS), normal.view(np.float32)])


def to_runs() -> np.ndarray:
    """Sixteen bytes, sixteen numbers, a scale and a minimum."""
    made = any_floats(ITEMS, 24)
    made[:, :4] = random_bytes(ITEMS, 16).view(np.float32)
    made[100:, 20:22] = RNG.standard_normal((ITEMS - 100, 2), np.float32)
    return made


def to_fma() -> np.ndarray:
    """Any numbers; sums that cancel; sums a little beside a tie, which float64 takes for the tie; zeros."""
    made = any_floats(ITEMS, 3)
    made[100:200, :2] = RNG.standard_normal((100, 2), np.float32)
    made[100:200, 2] = -made[100:200, 0] * made[100:200, 1]
    made[200:300, :2] = 1 + 2.0**-12 * (1 + 2 * RNG.integers(0, 2, (100, 1)))
    made[200:300, 2] = 2.0**-80 * RNG.choice([1, -1], 100)
    made[300:400] = RNG.standard_normal((100, 3), np.float32)
    made[400:404] = (1, 1, -1), (-1, 1, 1), (0, -1, -0.0), (0, 1, -0.0)
    return made


def to_dots() -> np.ndarray:
    """Twice sixteen numbers, of like and of unlike magnitudes, some of them not finite."""
    made = RNG.standard_normal((ITEMS, 32), np.float32)
    made[:200] *= 2.0 ** RNG.integers(-30, 30, (200, 32))
    made[200:220] *= 2.0**-70  # products below the smallest normal number
    made[220:240, :16] = RNG.permuted(np.resize(EDGES[np.abs(EDGES) < 1], (20, 16)), axis=1)
    made[240:260, 5] = np.inf
    made[250:260, 16 + 5] = np.resize([-1, 0], 10)
    made[255:260, 6] = np.inf
    made[260:270, 31] = np.nan
    return made


def to_dots_of_bytes() -> np.ndarray:
    """Six times sixteen bytes; every other warp has what :func:`mma_s8` is meant for, a diagonal of x."""
    made = random_bytes(ITEMS, 96)
    made[32:64] = 0x80
    lane = np.arange(ITEMS) & 31
    beside = ((lane & 3) != lane >> 3) & (np.arange(ITEMS) & 32 != 0)
    made.reshape(ITEMS, 6, 16)[beside, 2::3] = 0
    return made


def to_short_dots() -> np.ndarray:
    """Three times sixteen numbers of 11 bits, of like and of unlike magnitudes, some not finite; and four totals."""
    made = RNG.standard_normal((ITEMS, 52), np.float32)
    made[128:256] *= 2.0 ** RNG.integers(-15, 15, (128, 52))
    made[260, 3] = made[261, 48] = np.inf
    made[295, 20] = -np.inf
    made[300, 40] = np.nan
    made[325, 35] = 0
    made[320:352, 3] = np.inf
    return shortened(made)


def to_short_dots_of_subnormals() -> np.ndarray:
    """The same with weights below the smallest normal number, as those of bfloat16 may be, and products above it."""
    made = RNG.standard_normal((ITEMS, 52), np.float32)
    made[:, :32] *= 2.0**-129
    made[:, 32:48] *= 2.0**24
    made[:, 48:] *= 2.0**-103
    return shortened(made)


def shortened(made: np.ndarray) -> np.ndarray:
    """With the last 13 bits of all but the totals 0, as the tensor cores' TF32 leaves them out."""
    made.view(np.uint32)[:, :48] &= 0xFFFFE000
    return made


CASES = {
    "places": Case(places, np.zeros(16, np.uint8), 3 * 32 * THREADS, ctas=3, shared_nbytes=16),
    "through global memory": Case(through_global, any_floats(ITEMS, 8), 144 * ITEMS),
    "through shared memory": Case(through_shared, any_floats(ITEMS, 8), 96 * ITEMS, shared_nbytes=32 * THREADS),
    **{
        f"fields at multiples of {alignment}": Case(
            fields,
            random_bytes(2 * THREADS, 16),
            32 * THREADS,
            fields=FieldAccess(alignment),
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
