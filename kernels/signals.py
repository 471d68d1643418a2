"""Signals in the middle of what an exception must not leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["handlers_held"]

RAISING = [getattr(signal, name) for name in ("SIGINT", "SIGALRM", "SIGTERM") if hasattr(signal, name)]
"""Signals whose handlers commonly raise: Ctrl-C, timeouts, and a polite kill."""


@contextmanager
def handlers_held() -> Iterator[None]:
    """Call the handlers of RAISING at the end of this block, if their signals come meanwhile.

    Python calls handlers in its main thread alone, and sets the signals of the whole process: elsewhere this does
    nothing, and need not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: handler for number in RAISING if callable(handler := signal.getsignal(number))}
    noted: list[tuple[int, FrameType | None]] = []
    holding = True

    def note(number: int, frame: FrameType | None) -> None:
        if holding:
            noted.append((number, frame))
        else:
            usual[number](number, frame)

    try:
        for number in usual:
            signal.signal(number, note)
        yield
    finally:
        left, raised = list(usual.items()), None
        while left:
            try:
                while left:
                    signal.signal(*left[-1])
                    left.pop()
            except BaseException as error:  # of a handler that is back, whose signal came just now
                raised = error
        holding = False
        if raised is not None:
            raise raised
        for number, frame in noted:
            usual[number](number, frame)
