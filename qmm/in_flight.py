"""Calls in flight, in all threads, so that closing waits for them."""

from __future__ import annotations

import threading
from types import TracebackType

from qmm.errors import ClosedError

__all__ = ["InFlight"]


class InFlight:
    """Counts the calls that use a resource, until it is closed. Each call is a ``with`` block; blocks may nest.

    Calls are counted by thread, because KeyboardInterrupt may end one just before it is uncounted: a closing
    thread is in no call, whatever its count.
    """

    def __init__(self, closed: str) -> None:
        """``closed`` is the message of the ClosedError that a call gets after :meth:`end`."""
        self._closed = closed
        self._ended = False
        self._calls: dict[int, int] = {}
        self._lock = (
            threading.Lock()
        )  # held within C code only (Condition's own methods are Python), so an interrupt cannot leave it locked
        self._changed = threading.Condition(self._lock)

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._lock:
            if self._ended:
                raise ClosedError(self._closed)
            self._calls[thread] = self._calls.get(thread, 0) + 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        thread = threading.get_ident()
        with self._lock:
            left = self._calls.pop(thread) - 1
            if left:
                self._calls[thread] = left
            elif self._ended:
                self._changed.notify_all()

    def end(self) -> None:
        """Refuse calls from now on, and wait for those of other threads. May be called again, also after an
        interrupt."""
        with self._lock:
            self._ended = True
            self._calls.pop(threading.get_ident(), None)
            while self._calls:
                self._changed.wait()
