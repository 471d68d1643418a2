"""Calls that are under way, so that closing waits for them."""

from __future__ import annotations

import time

from qmm.errors import ClosedError

__all__ = ["Uses"]


class Uses:
    """Counts the calls in all threads that use something, until it is closed.

    A call holds a view of a bytearray, which refuses to change its size meanwhile: Python counts views itself, and lets
    go of one however its ``with`` block ends. A count of ours could be left one too high by a Ctrl-C right before it
    was changed, and closing would wait for ever.
    """

    def __init__(self, closed: str) -> None:
        """``closed`` is what is said to calls that come too late."""
        self._closed = closed
        self._viewed = bytearray()
        self._ended = False
        self._remaining = [None]

    def begin(self) -> memoryview:
        """What a call holds in a ``with`` block.

        Raises:
            ClosedError: :meth:`end` was called.
        """
        view = memoryview(self._viewed)
        if self._ended:
            raise ClosedError(self._closed)
        return view

    def end(self) -> None:
        """Let no call begin any more, and wait for those under way. A Ctrl-C may end the wait; call it again."""
        self._ended = True
        while True:
            try:
                self._viewed.append(0)
            except BufferError:
                time.sleep(0.001)
            else:
                return

    def last(self) -> bool:
        """True once, to whichever thread then does what remains to be done."""
        try:
            self._remaining.pop()
        except IndexError:
            return False
        return True
