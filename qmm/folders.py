"""The folders of qmm's own files."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "named_cache_folder"]


def cache_folder() -> Path:
    """The folder of files that can be recreated: ``$XDG_CACHE_HOME/qmm``, or ``~/.cache/qmm``.

    Raises:
        RuntimeError: the user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "qmm"


def named_cache_folder() -> str | None:
    """``$QMM_CACHE_DIR``, where ``~`` is the home directory: the folder of compiled kernels that the user named. Empty
    if nothing is to be kept, None if it is not set."""
    named = os.environ.get("QMM_CACHE_DIR")
    return named if named is None else os.path.expanduser(named)
