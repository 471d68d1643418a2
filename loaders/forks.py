"""What a forked child must not take over from its parent."""

from __future__ import annotations

import os
import threading

__all__ = ["ProcessLock"]


class ProcessLock:
    """A lock of this process: a forked child has a free one, whichever thread of the parent held the parent's.

    Attributes:
        now: the lock. ``with process_lock.now`` ends in C, so that no Ctrl-C can leave it held.
    """

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.now = threading.Lock()
