"""The context-manager half of what has a ``close``."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from qmm.errors import QmmError

__all__ = ["Closing"]


class Closing:
    """Closes itself at the end of a ``with`` block."""

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
