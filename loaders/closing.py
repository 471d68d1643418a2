"""Base classes of what has a ``close``."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self

from qmm.errors import CopyError, QmmError

__all__ = ["Closing", "Resource", "close_later"]


class Closing:
    """A context manager that closes itself at the end of its ``with`` block.

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


class Resource(Closing):
    """Holds what outlives its Python object: device memory, locked pages, queued work.

    If it is dropped before it was closed, it emits a ResourceWarning and closes itself. The garbage collector may do
    that in the middle of any statement, of any thread, so this is a last resort. If this thread is just using what it
    holds, it is kept, and closed later.
    """

    @property
    def closed(self) -> bool:
        """Whether nothing is left to close. Asked of an object whose constructor failed, too."""
        raise NotImplementedError

    @property
    def _in_use(self) -> bool:
        """Whether this very thread is in the middle of using what it holds."""
        return False

    def __del__(self, warn: Callable[..., Any] = warnings.warn) -> None:
        if self.closed:
            return
        try:
            warn(f"{self!r} was dropped before it was closed", ResourceWarning, source=self)
        finally:
            self._close_dropped()

    def _close_dropped(self) -> None:
        try:
            if self._in_use:
                close_later(self)
            else:
                self.close()
        except Exception:  # nobody is left to tell; and at the interpreter's exit, modules and CUDA may be gone
            return


_later: list[Resource] = []


def close_later(resource: Resource) -> None:
    """Close something after the next collection of garbage, or once it can be closed."""
    if not any(resource is other for other in _later):
        _later.append(resource)
    if _collected not in gc.callbacks:
        gc.callbacks.append(_collected)


def _collected(phase: str, _: object, later: list[Resource] = _later) -> None:
    """What Python calls when it collects garbage; at the interpreter's exit, without this module's names."""
    if phase == "stop":
        for _ in later[:]:
            if later:  # another thread may have taken it
                later.pop(0)._close_dropped()
