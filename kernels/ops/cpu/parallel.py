"""Rows shared out over threads."""

from __future__ import annotations

import ctypes
import functools
import operator
import os
from collections.abc import Callable
from typing import SupportsIndex

from qmm.children import PerProcess
from qmm.kernels.ops.cpu.threads import Helpers

__all__ = ["available_cpus", "over_rows", "set_threads"]

HELPER_NBYTES = 2 << 20
"""Weight bytes that are worth a further thread: about 0.2 ms of work. With less, waking it costs more than it saves
(Q8_0 2048x640, 1.4 MB, on two cores: 0.10 ms alone, 0.14 ms with a helper)."""
SPANS = 8
"""Spans of rows that a thread takes, one after the other, so that a slow core holds nobody up."""


def available_cpus() -> int:
    """How many CPUs the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Threads:
    """The helpers that a product asks; a forked child has none of its parent's."""

    helpers: PerProcess[Helpers] = PerProcess(functools.partial(Helpers, available_cpus() - 1))


def set_threads(count: SupportsIndex) -> None:
    """Use ``count`` threads for a product or dequantization; at first it is the CPUs that the process may run on.

    Where the system refuses to start a thread, a product does with fewer. Products under way in other threads go on
    with those that they have.

    Raises:
        ValueError: ``count`` is not positive.
        TypeError: ``count`` is no whole number.
    """
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"the number of threads must be a whole number, not {count!r}") from None
    if number < 1:
        raise ValueError(f"a product needs a thread at least, not {number}")
    before = Threads.helpers
    Threads.helpers = PerProcess(functools.partial(Helpers, number - 1))
    before.now.dismiss()


def over_rows(m: int, nbytes: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(span, next_row)`` on one thread or several.

    The caller takes its share at once: a thread that wakes late finds less to do, and one that has not even begun when
    the rows are done is called off, so that a small product never waits for it.

    Args:
        m: how many rows there are.
        nbytes: weight bytes that are multiplied; as many threads take part as they are worth.
        work: takes spans of ``span`` rows off the counter, an int64 at address ``next_row``, until there are none.
    """
    threads = Threads.helpers.now  # which another caller may replace
    helpers = min(threads.most, nbytes // HELPER_NBYTES)
    span = max(1, -(-m // (SPANS * (helpers + 1))))
    next_row = ctypes.c_int64(0)
    address = ctypes.addressof(next_row)
    if helpers:
        threads.run(lambda: work(span, address), helpers)
    else:
        work(span, address)
