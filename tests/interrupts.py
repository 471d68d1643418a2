"""Ctrl-C at a chosen time, in children: a timer can send an alarm, and nothing else."""

from __future__ import annotations

import signal
from collections.abc import Callable

__all__ = ["interrupted"]


def interrupted(work: Callable[[], object], seconds: float, times: int) -> bool:
    """Whether an alarm after so many seconds, which raises what Ctrl-C would, ends ``times`` calls of ``work``.

    It does not if it comes too late, or where Python calls something because an object dies: what is raised there is
    printed and forgotten.
    """
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # may be over before it returns
        for _ in range(times):
            work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False
