"""Signals in the middle of what an exception must not leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["handlers_held"]

RAISING = [getattr(signal, name) for name in ("SIGTERM", "SIGALRM", "SIGINT") if hasattr(signal, name)]
"""Signals whose handlers commonly raise: a polite kill, timeouts, and Ctrl-C."""


@contextmanager
def handlers_held() -> Iterator[None]:
    """Call the handlers of RAISING at the end of this block, if their signals come meanwhile.

    They are then given no frame: it may be this function's own, which would keep itself until the collector comes. In
    other threads than the main one, where Python calls no handlers and lets none be set, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: handler for number in RAISING if callable(handler := signal.getsignal(number))}
    noted: list[int] = []
    holding = True

    def note(number: int, frame: FrameType | None) -> None:
        if holding:
            noted.append(number)
        else:
            usual[number](number, frame)

    try:
        for number in usual:
            signal.signal(number, note)
        yield
    finally:
        try:
            for number, handler in usual.items():
                signal.signal(number, handler)
        finally:
            holding = False  # a handler that is back may have raised, and left the others to `note`
        for number in noted:
            usual[number](number, None)
