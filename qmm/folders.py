"""Where qmm keeps files of its own."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Where qmm keeps what can be made again: ``$XDG_CACHE_HOME/qmm``, or ``~/.cache/qmm``.

    Raises:
        RuntimeError: the user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qmm"
