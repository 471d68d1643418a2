"""Configs that were measured, a file for each kind of GPU: written by ``benchmarks/tune.py``, never by hand.

A file holds what tells the GPU (:class:`qmm.kernels.ops.op.Architecture`), the driver, versions and date of the
measurement, and for each case the config that was fastest, with its time and that of the rule's choice. It serves GPUs
of the same architecture only: a schedule tuned on one is not tuned on another.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from qmm.kernels.ops.op import Architecture

__all__ = ["Measured", "Tuning", "tuning_for"]

FOLDER = Path(__file__).parent
NEAR = 0.5
"""How far, in powers of two of m and k together, a case may be from one that was measured to take its config."""


class Measured(NamedTuple):
    """A case that was measured.

    Attributes:
        m: rows.
        k: weights a row.
        config: what was fastest, by the names of its fields.
        us: microseconds of a product, weights in the GPU's memory cold in L2, or mapped.
        rule_us: the same of the rule's config.
    """

    m: int
    k: int
    config: dict[str, Any]
    us: float
    rule_us: float


class Tuning:
    """The measured cases of one GPU, by everything that a case has but m and k."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text())
        self.architecture = Architecture(**content["architecture"])
        self._cases: dict[tuple[Any, ...], list[Measured]] = {}
        for case in content["cases"]:
            key = tuple(case[name] for name in ("format", "columns", "int8", "alignment", "fusible", "mapped"))
            measured = Measured(case["m"], case["k"], case["config"], case["us"], case["rule us"])
            self._cases.setdefault(key, []).append(measured)

    def find(self, key: tuple[Any, ...], m: int, k: int) -> Measured | None:
        """The measured case that is nearest to m and k, if one is near.

        Args:
            key: the format's name, columns, int8, alignment, fusible, mapped.
            m: rows.
            k: weights a row.
        """
        distances = [
            (abs(math.log2(m / measured.m)) + abs(math.log2(k / measured.k)), number)
            for number, measured in enumerate(self._cases.get(key, ()))
        ]
        distance, number = min(distances, default=(math.inf, 0))
        return self._cases[key][number] if distance <= NEAR else None


@functools.cache
def tuning_for(architecture: Architecture) -> Tuning | None:
    """The file that serves a GPU; None if there is none."""
    tunings = [Tuning(path) for path in sorted(FOLDER.glob("*.json"))]
    return next((tuning for tuning in tunings if tuning.architecture == architecture), None)
