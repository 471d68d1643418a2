"""Measured configs, a file for each kind of GPU, written by ``benchmarks/tune.py``, never by hand.

A file holds the GPU's :class:`qmm.kernels.ops.op.Architecture`, the driver, versions and date of the measurement, and
for each case the fastest config, with its time and the time of the rule's config. It is used for GPUs of the same
architecture only.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from qmm.kernels.ops.op import Architecture

__all__ = ["Key", "Measured", "Tuning", "tuning_for"]

FOLDER = Path(__file__).parent
SIMILAR_DISTANCE = 0.5
"""The largest distance ``|log2 m / m'| + |log2 k / k'|`` at which a case takes the config of a measured one."""


class Key(NamedTuple):
    """What a case and a measured one have in common: all but m and k. Fields as in the files."""

    format: str
    columns: int
    int8: bool
    alignment: int
    fusible: bool
    mapped: bool


class Measured(NamedTuple):
    """A case that was measured.

    Attributes:
        m: rows.
        k: weights a row.
        config: the fastest config, its fields by name.
        us: microseconds of a product, weights in the GPU's memory cold in L2, or mapped.
        rule_us: the same for the rule's config.
    """

    m: int
    k: int
    config: dict[str, Any]
    us: float
    rule_us: float


class Tuning:
    """The measured cases of one GPU, by all fields of a case except m and k."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        self.architecture = Architecture(**content["architecture"])
        self._cases: dict[Key, list[Measured]] = {}
        for case in content["cases"]:
            key = Key(*(case[name] for name in Key._fields))
            measured = Measured(case["m"], case["k"], case["config"], case["us"], case["rule us"])
            self._cases.setdefault(key, []).append(measured)

    def find(self, key: Key, m: int, k: int) -> Measured | None:
        """The measured case with the smallest distance to m and k, None beyond SIMILAR_DISTANCE.

        Args:
            key: of the case.
            m: rows.
            k: weights a row.
        """
        distances = [
            (abs(math.log2(m / measured.m)) + abs(math.log2(k / measured.k)), number)
            for number, measured in enumerate(self._cases.get(key, ()))
        ]
        distance, number = min(distances, default=(math.inf, 0))
        return self._cases[key][number] if distance <= SIMILAR_DISTANCE else None


@functools.cache
def tuning_for(architecture: Architecture) -> Tuning | None:
    """The tuning table of a GPU; None if there is none."""
    tunings = [Tuning(path) for path in sorted(FOLDER.glob("*.json"))]
    return next((tuning for tuning in tunings if tuning.architecture == architecture), None)
