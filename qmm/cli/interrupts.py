"""Ctrl-C in a command: it ends with the exit code 130, even if its KeyboardInterrupt is lost.

Where C code calls Python, an exception may be lost: while Numba is imported it becomes an ImportError, and in a
callback of LLVM it is printed and dropped. So the handler also notes that it was called, and a command calls
:func:`check` at each of its steps.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["INTERRUPTED", "check", "was_interrupted", "watch"]

INTERRUPTED = 130
"""The exit code: as a shell shows SIGINT."""
_times: list[int] = []


def watch() -> None:
    """Note each Ctrl-C from now on, and do not print exceptions that are dropped after it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores the signal
        signal.signal(signal.SIGINT, _note)
        sys.unraisablehook = _print


def was_interrupted() -> bool:
    """Whether there was a Ctrl-C."""
    return bool(_times)


def check() -> None:
    """Raise KeyboardInterrupt if there was a Ctrl-C."""
    if _times:
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    _times.append(number)
    raise KeyboardInterrupt


def _print(unraisable: sys.UnraisableHookArgs) -> None:
    if not _times:
        sys.__unraisablehook__(unraisable)
