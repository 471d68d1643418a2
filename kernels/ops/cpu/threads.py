"""Helper threads of products on the CPU, and of copies to a GPU (:mod:`qmm.upload`).

A product puts shares of its work in a queue and starts at once itself. When its rows are done it withdraws the shares
that no helper has begun and waits for the others: a helper that wakes late does not delay a small product.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["Helpers"]


class _Share:
    """One helper's part of a product."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._begun = False
        self._lock = threading.Lock()
        self._under_way = threading.Lock()
        self._under_way.acquire()
        self.error: BaseException | None = None

    def do(self) -> None:
        """Called by a helper: do the work, unless it was withdrawn."""
        with self._lock:
            work, self._work = self._work, None
            self._begun = work is not None
        if work is None:
            return
        try:
            work()
        except BaseException as error:
            self.error = error  # the product raises it
        finally:
            self._under_way.release()

    def finish(self) -> None:
        """Withdraw the work, or wait for the helper that has begun it. May be called again after an interrupt."""
        with self._lock:
            self._work = None
        if self._begun:
            with self._under_way:
                pass


class Helpers:
    """Up to ``most`` daemon threads, started when first needed."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._offered: SimpleQueue[_Share | None] = SimpleQueue()

    def run(self, work: Callable[[], None], helpers: int) -> None:
        """Call ``work()`` here and in up to ``helpers`` threads. When this returns or raises,
        no thread runs it any more.

        Raises:
            BaseException: what ``work`` raised here, or else in a helper.
        """
        shares = [_Share(work) for _ in range(self._start(min(helpers, self.most)))]
        unfinished = shares.copy()
        interrupt: BaseException | None = None
        try:
            for share in shares:
                self._offered.put(share)
            work()
        finally:
            # Even after a KeyboardInterrupt: a thread that still runs would use memory that the caller frees.
            while unfinished:
                try:
                    while unfinished:
                        unfinished[-1].finish()
                        unfinished.pop()
                except BaseException as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt
        for share in shares:
            failure, share.error = share.error, None  # the helper remembers the share
            if failure is not None:
                try:
                    raise failure
                finally:
                    del failure  # its traceback refers to this frame, and so to all that its callers hold

    def dismiss(self) -> None:
        """End the threads once they have done the shares in the queue."""
        self._offered.put(None)

    def _start(self, wanted: int) -> int:
        """Start threads until there are ``wanted``; returns how many there are. If the system refuses one (a limit on
        threads), the next product tries again."""
        if sys.is_finalizing():
            return 0  # no other thread runs any more
        # If another product is starting some, or this product runs in a finalizer that interrupted that, do with those
        # that exist.
        if len(self._threads) < wanted and self._starting.acquire(blocking=False):
            try:
                while len(self._threads) < wanted:
                    thread = threading.Thread(target=self._serve, name="qmm helper", daemon=True)
                    thread.start()
                    self._threads.append(thread)
            except (RuntimeError, MemoryError):  # the product uses fewer
                pass
            finally:
                self._starting.release()
        return min(wanted, len(self._threads))

    def _serve(self) -> None:
        while (share := self._offered.get()) is not None:
            share.do()
        self._offered.put(None)  # for the next thread
