"""Opening a file and telling whether it is still the same file."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from qmm.errors import QmmError

__all__ = ["FileIdentity", "open_regular"]


class FileIdentity(NamedTuple):
    """What makes two opens the same bytes: a file that was rewritten or replaced differs in at least one field."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """The identity of the file that ``status`` (from ``os.stat`` or ``os.fstat``) describes."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_regular(path: Path, error: type[QmmError]) -> tuple[FileIO, FileIdentity]:
    """Open ``path`` for reading.

    Returns:
        The file, unbuffered, and its identity. It closes itself when it is dropped, by whatever Ctrl-C.

    Raises:
        error: The file is absent, unreadable, empty, or not a regular file.
    """
    try:
        _require_regular(path, os.stat(path), error)  # before, since opening a FIFO waits for a writer
        file = FileIO(path)
    except (OSError, ValueError) as reason:  # ValueError: a path with a zero byte
        why = reason.strerror if isinstance(reason, OSError) else reason
        raise error(f"{path}: cannot be opened: {why}. Check the path and its permissions.") from reason
    status = os.fstat(file.fileno())
    _require_regular(path, status, error)
    return file, FileIdentity.of(status)


def _require_regular(path: Path, status: os.stat_result, error: type[QmmError]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise error(f"{path}: is {kind}, which cannot be mapped. Give the path of the GGUF file itself.")
    if status.st_size == 0:
        raise error(f"{path}: is empty (0 bytes). Was the download or copy finished?")
