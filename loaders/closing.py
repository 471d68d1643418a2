"""The end of what has a ``close``: with its ``with`` block, or when nobody holds it any more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn, Self

from qmm.errors import CopyError, QmmError

__all__ = ["Closing", "undisturbed"]


class Closing:
    """Closes itself at the end of a ``with`` block, or else when it is dropped.

    It cannot be pickled, nor copied where a class does not say how: the copy would use what only the original holds.
    """

    def close(self) -> None:
        """Give up what is held. Twice is harmless."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except QmmError:
            if kind is None:  # otherwise the error that ended the block is the one to show
                raise

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """What copy and pickle call.

        Raises:
            CopyError: always.
        """
        raise CopyError(f"{self!r} cannot be {self._why_not_copied()}")

    def _why_not_copied(self) -> str:
        return "copied or pickled: it stands for memory of this process. Make another one where it is needed."

    def __del__(self) -> None:
        try:
            _dropped.append(self)
            _close_dropped()
        except Exception:  # the interpreter ends, and this module is gone
            return


# The garbage collector may drop things in the middle of any statement: where a lock is held that closing takes, or a
# stream is captured, which waiting for the device would end.
_dropped: deque[Closing] = deque()
_thread = threading.local()


@contextmanager
def undisturbed() -> Iterator[None]:
    """In this block nothing that is dropped in this thread is closed; it is at the end of the block."""
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1
        _close_dropped()


def _close_dropped() -> None:
    while _dropped and not getattr(_thread, "depth", 0):
        try:
            _dropped.popleft().close()
        except Exception:  # nobody is left to tell, and CUDA may be shutting down
            continue
