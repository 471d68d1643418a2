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
from dataclasses import replace
from typing import Any, NamedTuple

from qmm.kernels.formats import Format
from qmm.kernels.ops.layout import COLUMN_TILES
from qmm.kernels.ops.matvec.choose import choose
from qmm.kernels.ops.matvec.config import Case, Schedule, legal
from qmm.kernels.ops.op import Architecture

__all__ = ["GPUS", "Kind", "Planned", "alignments_of", "attributes", "covering", "schedules_of", "values_of"]

GPUS = {
    "H100": Architecture(132, 232448, True),
    "A100": Architecture(108, 166912, False),
    "RTX 4090": Architecture(128, 101376, False),
    "RTX 5090": Architecture(170, 101376, True),
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
    """A schedule, the product that it is for, and the GPU that takes it."""

    case: Case
    schedule: Schedule
    architecture: Architecture

    def fits(self, k: int) -> bool:
        """Whether the same choice is legal for a product with other rows, of which ``k % 4`` may rule out that a CTA
        quantizes the activations."""
        case = replace(self.case, k=k, fusible=self.schedule.fused and k % 4 == 0)
        return not legal(self.schedule.config, case, self.architecture)


def attributes(schedule: Schedule) -> Kind:
    """What schedules are told apart by here."""
    tiling = schedule.tiling
    filled = min(schedule.config.first_stages, 4) if schedule.config.first_stages < tiling.stages else "all"
    x = schedule.config.x
    if schedule.fused and schedule.activations.columns > 2:  # up to two columns are as many as the tile has
        x = "fused, of some columns"
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
    conditions = itertools.product(alignments_of(block_format), (True, False), (False, True), GPUS.values())
    for (m, k), n, int8, condition in itertools.product(SHAPES, COLUMN_TILES, modes, list(conditions)):
        *placed, architecture = condition
        case = Case(block_format, m, k, n, int8, *placed)
        schedule = choose(case, architecture)
        found.setdefault(attributes(schedule), Planned(case, schedule, architecture))
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
