"""Child processes: Python in a new process, for work that may hang or crash; and values that a fork must not
inherit."""

from __future__ import annotations

import errno
import os
import signal
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

__all__ = ["PerProcess", "ending", "no_start", "process", "python"]

T = TypeVar("T")


def python(code: str) -> list[str]:
    """The command of a child that runs ``code`` with this process's ``sys.path``; ``sys`` is imported."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]


def ending(status: int) -> str:
    """The end of a child, in words, from its return code."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def no_start(reason: OSError) -> str:
    """Why a child could not be started, in words, from the error."""
    hint = " Allow more processes (`ulimit -u`, a container's limit on pids)." if reason.errno == errno.EAGAIN else ""
    return f"could not be started ({reason}).{hint}"


class PerProcess(Generic[T]):
    """A value of one process, created anew in a forked child. This is the one place where a fork is noticed.

    It is for locks, which a thread of the parent may hold at the fork; for threads, of which the child has one; and for
    tables of the parent's CUDA resources.

    Attributes:
        now: the value in this process.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.now = make()
        _values.add(self)

    def renew(self) -> None:
        """Create the value anew."""
        self.now = self._make()


_values: weakref.WeakSet[PerProcess[Any]] = weakref.WeakSet()


def _renew_all() -> None:
    for value in list(_values):
        value.renew()


os.register_at_fork(after_in_child=_renew_all)

process: Final = PerProcess(os.getpid)
"""The number of this process; ``process.now`` takes no system call."""
