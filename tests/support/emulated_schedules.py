"""What schedules of products there are, and a few that differ in as much as they can.

A schedule is everything that a product's kernel is specialized with. There are as many as shapes and GPUs, almost: the
ring has as many stages as fit. They are told apart here by :func:`attributes`, in which numbers of stages from four on
are one. The schedules are those that four GPUs take for nine shapes, for every column tile, with activations as int8
and float16, quantized by the product itself where it may or by another kernel, for weights in device and in host
memory, at every alignment: some 14,000 kinds, all formats together.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Collection
from typing import Any, NamedTuple

from qmm.kernels.formats import Format
from qmm.kernels.ops.matvec.plan import COLUMN_TILES, Machine, Schedule

__all__ = ["MACHINES", "Kind", "Planned", "alignments_of", "attributes", "covering", "schedules_of", "values_of"]

MACHINES = {
    "H100": Machine(132, 232448, True),
    "A100": Machine(108, 166912, False),
    "RTX 4090": Machine(128, 101376, False),
    "RTX 5090": Machine(170, 101376, True),
}
SHAPES = [
    (128256, 4096),
    (65536, 256),
    (20480, 1024),
    (14336, 4096),
    (8192, 28672),
    (4096, 14336),
    (4096, 1024),
    (1024, 2048),
    (256, 768),
]
"""Rows and weights a row, of large models and of small ones."""
Kind = tuple[tuple[str, Any], ...]
"""Attributes by name; of what else is told apart so, likewise."""


class Planned(NamedTuple):
    """A schedule, and the GPU that takes it."""

    schedule: Schedule
    machine: Machine


def attributes(schedule: Schedule) -> Kind:
    """What schedules are told apart by here."""
    tiling = schedule.tiling
    filled = min(schedule.first_stages, 4) if schedule.first_stages < tiling.stages else "all"
    x = "from global memory"
    if schedule.x_shared:
        x = "by a bulk copy" if schedule.x_bulk else "copied by warps"
    if schedule.fused:  # up to two columns are as many as the tile has
        x = "quantized here" if schedule.activations.columns <= 2 else "some columns quantized here"
    return (
        ("warps", tiling.warps),
        ("rows of a lane", tiling.lane_rows),
        ("tiles at once", tiling.row_warps),
        ("units", tiling.units),
        ("line", tiling.line),
        ("alignment", tiling.alignment),
        ("stages", min(tiling.stages, 4)),
        ("filled first", filled),
        ("columns", schedule.activations.columns),
        ("int8", schedule.activations.int8),
        ("x", x),
        ("bulk", schedule.bulk),
    )


def alignments_of(block_format: Format) -> list[int]:
    """What a format's kernels are compiled for; ``general.alignment`` may be 1, so numbers too lie anywhere."""
    return [alignment for alignment in (1, 2, 4, 8, 16) if alignment <= block_format.alignment]


@functools.cache
def schedules_of(block_format: Format) -> dict[Kind, Planned]:
    """One schedule of each kind."""
    found: dict[Kind, Planned] = {}
    modes = (False,) if block_format.plain else (True, False)
    conditions = itertools.product(alignments_of(block_format), (True, False), (False, True), MACHINES.values())
    for (m, k), n, int8, condition in itertools.product(SHAPES, COLUMN_TILES, modes, list(conditions)):
        schedule = Schedule.of(block_format, m, k, n, int8, *condition)
        found.setdefault(attributes(schedule), Planned(schedule, condition[-1]))
    return found


def covering(kinds: Collection[Kind], count: int, most: int, lots: random.Random) -> list[Kind]:
    """Some kinds: ``count``, of which each is the one with the most values of attributes that none before has, and of
    those the one with the most pairs of values; then others by lot, up to ``most`` in all."""
    left = sorted(kinds, key=repr)
    lots.shuffle(left)
    pairs = {kind: frozenset(itertools.combinations(kind, 2)) for kind in left}
    singly: set[Any] = set()
    in_pairs: set[Any] = set()
    taken: list[Kind] = []
    while left and len(taken) < count:
        best = max(left, key=lambda kind: (len(set(kind) - singly), len(pairs[kind] - in_pairs)))
        left.remove(best)
        taken.append(best)
        singly |= set(best)
        in_pairs |= pairs[best]
    return (taken + left)[:most]


def values_of(kinds: Collection[Kind]) -> set[tuple[str, Any]]:
    """Every value of every attribute that these have."""
    return set(itertools.chain.from_iterable(kinds))
