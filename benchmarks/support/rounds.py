"""How the GPU benchmarks take time: sides that take turns, round by round.

A side is some work that :attr:`Side.queue` starts on a stream and :attr:`Side.wait` waits for, such as the replay of a
CUDA graph of many products. A round starts it a few times and waits once; its time is wall time, divided by the
products. The wait, and the host's part of the first start, are in it: some 10 to 50 us a round, which is why a round is
made to last ROUND_SECONDS or more. Every side is timed by the same lines of code, and by turns, so clocks and noise are
shared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["Quantiles", "Side", "take_turns"]

ROUND_SECONDS = 3e-3
LEAST_STARTS = 2  # while the GPU works on one, the host prepares the next
MOST_STARTS = 64
WARM_UP = 2


@dataclass(frozen=True)
class Side:
    """One of the competitors: its name, how to start its work, how to wait for it, and the work's items."""

    name: str
    queue: Callable[[], object]
    wait: Callable[[], object]
    items: int = 1

    def seconds(self, starts: int) -> float:
        """Wall time of one item, from one round."""
        begun = time.perf_counter()
        for _ in range(starts):
            self.queue()
        self.wait()
        return (time.perf_counter() - begun) / (starts * self.items)


@dataclass(frozen=True)
class Quantiles:
    """Seconds of one item."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        return cls(*np.quantile(seconds, [0.1, 0.5, 0.9]).tolist())


def starts_for(side: Side) -> int:
    """How often a side's work must be started for a round of ROUND_SECONDS."""
    side.seconds(1)
    once = side.seconds(1) * side.items
    return min(MOST_STARTS, max(LEAST_STARTS, math.ceil(ROUND_SECONDS / once)))


def take_turns(benchmark: BenchmarkFixture | None, sides: Sequence[Side], rounds: int) -> dict[str, Quantiles]:
    """Times the sides, one round of each after the other; ``benchmark`` is told of the first one's.

    Returns:
        By name, the time of one item.
    """
    starts = max(starts_for(side) for side in sides)
    first, *others = sides
    times: dict[str, list[float]] = {side.name: [] for side in sides}

    def round_of_others() -> None:
        for side in others:
            times[side.name].append(side.seconds(starts))

    def round_of_first() -> None:
        times[first.name].append(first.seconds(starts))

    if benchmark is not None:
        benchmark.pedantic(round_of_first, setup=round_of_others, rounds=rounds, warmup_rounds=WARM_UP)
    else:
        for _ in range(WARM_UP + rounds):
            round_of_others()
            round_of_first()
    return {name: Quantiles.of(seconds[-rounds:]) for name, seconds in times.items()}
