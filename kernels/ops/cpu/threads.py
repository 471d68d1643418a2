"""Threads that help with a product, as many as the system grants.

A product offers shares of its work and does its own at once. A helper that wakes finds what is on offer then, which may
be nothing: the product withdraws what was not begun when its own share is done, and waits for the rest only.

No lock is held while Python code runs: every step is one operation of a list or a queue, which are C. So a finalizer
that multiplies while another product is under way finds no lock held by its own thread, and a product at the end of the
interpreter none by a thread that has ended in the middle.
"""

from __future__ import annotations

import sys
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["Helpers"]


class _Share:
    """One thread's part of a product."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._under_way = allocate_lock()
        self._under_way.acquire()
        self.error: BaseException | None = None

    def do(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error  # the caller raises it
        finally:
            self._under_way.release()

    def wait(self) -> None:
        with self._under_way:
            pass


class Helpers:
    """At most ``most`` threads, started when they are first wanted; they do not hold up the interpreter's exit.

    ``threading.Thread.start`` would wait for the new thread to run, which it may never do while the interpreter ends.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._started: list[None] = []
        self._offered: list[_Share] = []
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._dismissed = False

    def run(self, work: Callable[[], None], helpers: int) -> None:
        """Call ``work()`` here and in up to ``helpers`` threads. When this returns or raises,
        no thread runs it any more.

        Raises:
            BaseException: what ``work`` raised here, or else in a helper.
        """
        shares = [_Share(work) for _ in range(self._start(min(helpers, self.most)))]
        try:
            self._offered.extend(shares)
            for _ in range(len(shares) - self._wakes.qsize()):  # a helper that wakes late for another will do
                self._wakes.put(None)
            work()
        finally:
            begun = [share for share in shares if not self._withdraw(share)]
            for share in begun:
                share.wait()
        errors = [share.error for share in begun if share.error is not None]
        for share in begun:
            share.error = None  # its traceback holds the share
        if errors:
            try:
                raise errors[0]
            finally:
                del errors, shares, begun, share  # the error would hold itself by its traceback, and the arrays with it

    def dismiss(self) -> None:
        """End the threads; a product under way goes on with those that have begun."""
        self._dismissed = True
        for _ in range(len(self._started)):
            self._wakes.put(None)

    def _start(self, wanted: int) -> int:
        """See that there are so many helpers; returns how many there are. One that the system refuses (a limit on
        threads) is tried again for the next product."""
        if sys.is_finalizing():
            return 0  # no other thread runs any more
        while len(self._started) < wanted:
            self._started.append(None)
            try:
                if len(self._started) <= wanted:  # or other callers have started the last ones
                    start_new_thread(self._serve, ())
                    continue
            except (RuntimeError, MemoryError):
                pass
            self._started.pop()
            break
        return min(wanted, len(self._started))

    def _serve(self) -> None:
        while not self._dismissed:
            self._wakes.get()
            while self._offered:
                try:
                    share = self._offered.pop()
                except IndexError:  # another thread took it
                    break
                share.do()
                del share  # and all that the work holds

    def _withdraw(self, share: _Share) -> bool:
        """Whether a share was still on offer, and now is not."""
        try:
            self._offered.remove(share)
        except ValueError:
            return False
        return True
