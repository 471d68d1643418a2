"""Rows distributed over threads."""

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
"""Weight bytes that are worth another thread: about 0.2 ms of work. With less, waking it costs more than it saves
(Q8_0 2048x640, 1.4 MB, on two cores: 0.10 ms alone, 0.14 ms with a helper)."""
SPANS = 8
"""Spans of rows that a thread takes, one after the other, so that a slow core does not delay the others."""


def available_cpus() -> int:
    """How many CPUs the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Threads:
    """The helper threads of products; a forked child has none of its parent's."""

    helpers: PerProcess[Helpers] = PerProcess(functools.partial(Helpers, available_cpus() - 1))


def set_threads(count: SupportsIndex) -> None:
    """Use ``count`` threads for a product or dequantization. The default is the number of CPUs that the process may
    use.

    If the system refuses to start a thread, a product uses fewer. Products that are running in other threads keep
    their helpers.

    Raises:
        ValueError: ``count`` is not positive.
        TypeError: ``count`` is not an integer.
    """
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"the number of threads must be an integer, not {count!r}") from None
    if number < 1:
        raise ValueError(f"a product needs at least one thread, not {number}")
    before = Threads.helpers
    Threads.helpers = PerProcess(functools.partial(Helpers, number - 1))
    before.now.dismiss()


def over_rows(m: int, nbytes: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(span, next_row)`` on one thread or several.

    The caller starts at once. A helper that wakes late finds fewer rows left, and its share is withdrawn if it has not
    begun when the rows are done, so that a small product never waits for it.

    Args:
        m: how many rows there are.
        nbytes: weight bytes that are multiplied; they decide how many threads take part.
        work: takes spans of ``span`` rows from the counter, an int64 at address ``next_row``, until none are left.
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
