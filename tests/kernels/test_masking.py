"""A kernel reads a byte only if it belongs to its tensor, and each byte of a weight as often as it should.

The kernels' own source, run as in ``test_emulated_kernels.py``, over shapes that hypothesis draws
(``emulated_cases.py``). Memory begins with the weight's first byte and ends with its last: nothing else is near, and a
read of anything outside is an EmulatorError. ``run_product`` and ``run_dequantization`` assert that, compare what comes
out with float64 and with gguf, and count how often each byte of the weight was read: once for each part of a row that
shares its 16 bytes, so exactly once where all parts begin at multiples of 16.

*Every schedule.* A product is run with one of the schedules that real GPUs take for real shapes
(``emulated_schedules.py``), on a GPU of one to three SMs and with rows just long enough. Of some 14,000 kinds the usual
run takes SCHEDULES of each format of TELLING, chosen so that every value of every attribute is among them (the test
asserts it) and as many pairs of values as can be. Each is run with a drawn shape, the same in each run. Then there are
products of every format as the host plans them for small shapes, and dequantizations.

``--all`` takes the schedules of every format. ``--draws=N`` takes N times as many, the further ones by lot, and draws
anew in each run; with ``--all``, 240 and more take all of them, which is some four hours. What fails names its Case, to
be run again alone.

*Masks.* The last tests leave one mask of the kernels out (:mod:`qmm.kernels.lang.masks`) and have the same properties
fail: with one format each in the usual run, with all formats by ``--all``.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import random
from collections import Counter
from dataclasses import replace

import pytest
import tiers
from emulated_cases import (
    REACHES,
    Case,
    Reach,
    depths_of_product,
    dequantizations,
    products,
    usual_products,
    work_of,
)
from emulated_schedules import GPUS, Kind, Planned, alignments_of, attributes, covering, schedules_of, values_of
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from qmm.kernels import ops
from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.lang.masks import masks_of
from qmm.kernels.lang.targets.emulator import EmulatorError
from qmm.kernels.ops.layout import COLUMN_TILES
from qmm.kernels.ops.matvec.config import Schedule
from qmm.kernels.ops.tiling import Tiling

FACTOR = max(1, round(tiers.draws))
SCHEDULES = 8
USUAL_PRODUCTS = 3
DEQUANTIZATIONS = 5
WORK = 1200
"""The most of a case, as work_of() has it: about a second."""

formats = pytest.mark.parametrize("name", FORMATS)
TELLING = ("F32", "Q8_0", "Q4_K", "Q6_K")
"""One format of each kind of block, whose schedules the usual run takes."""
drawn = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate])  # but for the seeds below


# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


def require(
    cases: st.SearchStrategy[Case], take: slice, lots: random.Random, mask: str | None = None
) -> list[tuple[Case, Schedule | Tiling]]:
    """Run some of the cases that hypothesis draws, of which the first is the simplest: one column more than half of a
    tile, one row more than a tile, and so on. With a mask, kernels lack it. Which they were, and how each was cut."""
    faults = frozenset() if mask is None else frozenset({mask})
    found: list[Case] = []

    @seed(lots.getrandbits(32))
    @settings(drawn, max_examples=take.stop)
    @given(cases)
    def draw(case: Case) -> None:
        found.append(replace(case, settings=replace(case.settings, faults=faults)))

    draw()
    return [(case, run(case)) for case in found[take]]


def run(case: Case) -> Schedule | Tiling:
    """Run a case; what fails names it."""
    try:
        return case.run()
    except (EmulatorError, AssertionError) as error:
        error.add_note(repr(case))
        raise


def in_turn(number: int) -> slice:
    """Of every other kind of product or dequantization the simplest case, of those between a drawn one."""
    return slice(0, 1) if number % 2 == 0 else slice(1, 2)


def lots_of(name: str) -> random.Random:
    """What schedules and shapes are drawn by."""
    return random.Random(name if tiers.draws == 1 else None)


Products = list[tuple[Case, Schedule]]
"""Products that were run, and with which schedule each."""


def require_products(name: str, lots: random.Random, mask: str | None = None) -> tuple[Products, Counter[str]]:
    """Run the products of a format; which they were, and how often what was reached."""
    planned = schedules_of(FORMATS[name])
    kinds = covering(planned, SCHEDULES, SCHEDULES * FACTOR, lots)
    ran: Products = []
    met: Counter[str] = Counter()
    for number, kind in enumerate(kinds):
        columns = columns_for(planned[kind].schedule, met)
        reach = reach_for(FORMATS[name], planned[kind], columns, met)
        # Not every kind can begin where tensors do in files: from the first that does on, every other pair is asked to.
        in_file = number // 2 % 2 == 0 or not met["in a file"]
        ran += require(products(planned[kind], reach, columns, in_file), in_turn(number), lots, mask)
        met["in a file"] += ran[-1][0].start % 32 == 0
    return ran, met


def require_usual_products(name: str, lots: random.Random, mask: str | None = None) -> None:
    """Run products as the host plans them."""
    require(usual_products(name), slice(0, USUAL_PRODUCTS * FACTOR), lots, mask)


def columns_for(schedule: Schedule, met: Counter[str]) -> range:
    """Columns that a schedule is for: those of its tile; of the last tile, in turn, more than a launch takes."""
    columns = schedule.activations.columns
    if columns < COLUMN_TILES[-1]:
        return range(columns // 2 + 1, columns + 1)
    met["last tile"] += 1
    return range(columns + 1, columns + 5) if met["last tile"] % 2 else range(columns // 2 + 1, columns + 1)


def reach_for(block_format: Format, planned: Planned, columns: range, met: Counter[str]) -> Reach:
    """The reach that was met least of those that are possible and not too much work; it is met now."""
    possible = [name for name, reach in REACHES.items() if depths_of_product(planned, reach)]
    within = [name for name in possible if work_of(block_format, planned.schedule, columns, REACHES[name]) <= WORK]
    least = min(within or possible[-1:], key=lambda name: met[name])
    met[least] += 1
    return REACHES[least]


def require_dequantizations(name: str, lots: random.Random, mask: str | None = None) -> list[Kind]:
    """Run the dequantizations of a format; what was run."""
    every = itertools.product(alignments_of(FORMATS[name]), GPUS, REACHES)
    named = [tuple(zip(("alignment", "machine", "reach"), values, strict=True)) for values in every]
    kinds = covering(named, DEQUANTIZATIONS, DEQUANTIZATIONS * FACTOR, lots)
    for number, ((_, alignment), (_, machine), (_, reach)) in enumerate(kinds):
        require(dequantizations(name, alignment, GPUS[machine], REACHES[reach]), in_turn(number), lots, mask)
    return kinds


@pytest.mark.parametrize("name", FORMATS if tiers.every else TELLING)
def test_products_of_every_schedule(name: str) -> None:
    ran, met = require_products(name, lots_of(name))
    kinds = {attributes(schedule) for _, schedule in ran}
    assert values_of(kinds) == values_of(schedules_of(FORMATS[name]))
    assert len(ran) == len(kinds)
    assert all(met[reach] for reach in REACHES)
    assert {case.n > COLUMN_TILES[-1] for case, _ in ran} == {False, True}
    assert {case.start % 32 == 0 for case, _ in ran} == {False, True}


@formats
def test_products_as_the_host_plans_them(name: str) -> None:
    require_usual_products(name, lots_of(name))


@formats
def test_dequantizations(name: str) -> None:
    kinds = require_dequantizations(name, lots_of(name))
    assert len(values_of(kinds)) == len(alignments_of(FORMATS[name])) + len(GPUS) + len(REACHES)


# ---------------------------------------------------------------------------------------------------------------------
# What would not go unnoticed: each mask taken away
# ---------------------------------------------------------------------------------------------------------------------

OUTSIDE = r"bytes at .* are not within any of \[zeros"
COUNTED = "how often each byte of the weights was read"
WRONG = "NMSE"
MISPLACED = r"the target of a copy in flight|bytes at shared \d+ are not within"
NOT_THERE = "nobody has written|are not within .* of its CTA|" + OUTSIDE
PLAIN = [name for name in FORMATS if FORMATS[name].plain]
QUANTIZED = [name for name in FORMATS if name not in PLAIN]
SHORT = [name for name in FORMATS if FORMATS[name].short]
LONG = [name for name in PLAIN if name not in SHORT]

FOUND = {
    "rows, bulk": (OUTSIDE + "|" + COUNTED, list(FORMATS)),
    "rows, by 16": (OUTSIDE + "|" + COUNTED, list(FORMATS)),  # only rows at multiples of 16 are copied from outside
    "lines, bulk": (COUNTED + "|" + WRONG + "|" + MISPLACED, list(FORMATS)),
    "depth, bulk": (OUTSIDE + "|" + COUNTED, list(FORMATS)),
    "depth, by 16": (OUTSIDE + "|" + COUNTED, list(FORMATS)),
    "first piece, bulk": (OUTSIDE, list(FORMATS)),
    "last piece, bulk": (OUTSIDE, list(FORMATS)),
    "only piece, bulk": (COUNTED, PLAIN),
    "first piece, by 16": (OUTSIDE, list(FORMATS)),
    "last piece, by 16": (OUTSIDE, list(FORMATS)),
    "edge before": (OUTSIDE, list(FORMATS)),
    "edge after": (OUTSIDE, list(FORMATS)),
    "blocks": (WRONG, QUANTIZED),
    "groups": (NOT_THERE, list(FORMATS)),
    "tail": (WRONG, LONG),
    "tail, short": (WRONG, SHORT),
    "columns, short": (NOT_THERE, SHORT),
    "sums, short": (WRONG, SHORT),
    "rows of results": (OUTSIDE, list(FORMATS)),
    "columns of results": (OUTSIDE, list(FORMATS)),
    "copy of activations, read": (NOT_THERE, list(FORMATS)),
    "copy of activations, written": (NOT_THERE, list(FORMATS)),
    "columns of x": (OUTSIDE, list(FORMATS)),
    "tail of x": (OUTSIDE, list(FORMATS)),
    "columns of x, fused": (OUTSIDE, list(FORMATS)),
    "tail of x, fused": (OUTSIDE, list(FORMATS)),
    "blocks of weights": (OUTSIDE, QUANTIZED),
    "rows of weights": (OUTSIDE, list(FORMATS)),
    "tail of weights": (OUTSIDE, PLAIN),
}
"""What the absence of a mask shows as, in which formats."""
ELSEWHERE = {"prefetch, first piece", "prefetch, last piece", "results, naive"}
"""Masks of what a product prefetches to L2 for the next one, and of the naive product: test_emulated_kernels.py."""


def masks() -> list[tuple[str, str]]:
    """Masks, each with a format, by turns; or with all of them."""
    pairs = []
    for number, (mask, (_, names)) in enumerate(FOUND.items()):
        pairs += [(mask, name) for name in (names if tiers.every else [names[(5 * number + 5) % len(names)]])]
    return pairs


@pytest.mark.parametrize(("mask", "name"), masks())
def test_without_a_mask_the_same_fails(mask: str, name: str) -> None:
    require = require_dequantizations if mask.endswith("of weights") else require_both_products
    lots = lots_of(f"{name} without {mask}")
    with pytest.raises((EmulatorError, AssertionError), match=FOUND[mask][0]):
        require(name, lots, mask)


def require_both_products(name: str, lots: random.Random, mask: str) -> None:
    """Run what takes little time first, and then so much that no mask is missed for the lots drawn."""
    require_usual_products(name, lots, mask)
    for _ in range(4):
        require_products(name, lots, mask)


def test_every_mask_of_the_kernels_is_left_out_here() -> None:
    modules = [
        importlib.import_module(module.name) for module in pkgutil.walk_packages(ops.__path__, "qmm.kernels.ops.")
    ]
    names = [name for module in modules for name in masks_of(module)]
    assert len(names) == len(set(names))
    assert set(FOUND) | ELSEWHERE == set(names)
