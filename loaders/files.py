"""Opening a file and telling whether it is still the same file."""

from __future__ import annotations

import os
import stat
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


def open_regular(path: Path, error: type[QmmError]) -> tuple[int, FileIdentity]:
    """Open ``path`` for reading.

    Returns:
        The file descriptor, which the caller closes, and the identity of the file behind it.

    Raises:
        error: The file is absent, unreadable, empty, or not a regular file.
    """
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for a writer before anybody could say that it is a FIFO.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as reason:  # ValueError: a path with a zero byte
        why = reason.strerror if isinstance(reason, OSError) else reason
        raise error(f"{path}: cannot be opened: {why}. Check the path and its permissions.") from reason
    status = os.fstat(descriptor)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        problem = f"{path}: is {kind}, which cannot be mapped. Give the path of the GGUF file itself."
    elif status.st_size == 0:
        problem = f"{path}: is empty (0 bytes). Was the download or copy finished?"
    if problem:
        os.close(descriptor)
        raise error(problem)
    return descriptor, FileIdentity.of(status)
