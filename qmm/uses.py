"""Calls that are under way, so that closing waits for them."""

from __future__ import annotations

import threading
from types import TracebackType

__all__ = ["Uses"]


class Uses:
    """A count of ``with`` blocks that are under way in all threads.

    The parent's blocks do not end in a forked child, which therefore needs one of its own.
    """

    def __init__(self) -> None:
        self._count = 0
        self._ended = self._done = False
        self._changed = threading.Condition(threading.Lock())

    def __enter__(self) -> bool:
        """Whether what is used still is there: :meth:`end` was not called."""
        with self._changed:
            self._count += 1
            return not self._ended

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def end(self) -> bool:
        """Let no new block begin well, and wait for those under way.

        Returns:
            True once, whichever thread it is that then does what remains to be done.
        """
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: self._count == 0)
            done, self._done = self._done, True
            return not done
