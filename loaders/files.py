"""Files that are opened once: header and mapping come from one descriptor.

A path may lead to another file a moment later: files are replaced by renaming, caches are pruned, a relative path means
something else after ``os.chdir``. So the path is looked up once. Later uses have the file's identity. They get the
descriptor that is still open, or else open the path again and compare.
"""

from __future__ import annotations

import os
import stat
import weakref
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from qmm.errors import FileAccessError, FileMissingError, QmmError

__all__ = ["FileIdentity", "KnownFile", "OpenFile"]


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

    def difference(self, now: FileIdentity) -> str:
        """``"nbytes was 10, is 12"``, of all fields that differ."""
        fields = zip(self._fields, self, now, strict=True)
        return ", ".join(f"{name} was {before}, is {after}" for name, before, after in fields if before != after)


class OpenFile(FileIO):
    """A regular file, open for reading; closed when its last reference goes.

    Attributes:
        path: its absolute path.
        identity: what it was when it was opened.
    """

    path: Path
    identity: FileIdentity

    @classmethod
    def open(cls, path: str | bytes | os.PathLike[str] | os.PathLike[bytes], error: type[QmmError]) -> OpenFile:
        """Open ``path``.

        Raises:
            FileMissingError: there is no such file.
            FileAccessError: it cannot be opened, for another reason.
            error: it is empty, or not a regular file.
        """
        named = Path(os.fsdecode(path))
        if not os.fspath(path):
            raise FileMissingError("the path of the file is empty")
        try:
            absolute = named.absolute()  # not resolve(): messages should show the name that was given
            _require_regular(absolute, os.stat(absolute), error)  # before, since opening a FIFO waits for a writer
            file = cls(absolute)
        except (OSError, ValueError) as reason:  # ValueError: a path with a zero byte
            raise _refusal(named, reason) from reason
        status = os.fstat(file.fileno())
        _require_regular(absolute, status, error)
        file.path = absolute
        file.identity = FileIdentity.of(status)
        _open_files[file.identity] = file
        return file

    @property
    def known(self) -> KnownFile:
        """Its path and identity, to open it again."""
        return KnownFile(self.path, self.identity)

    def check(self, error: type[QmmError], path: Path | None = None) -> None:
        """Raise ``error``, naming ``path`` or else its own, if the file was written since it was opened."""
        named = path or self.path
        try:
            now = FileIdentity.of(os.fstat(self.fileno()))
        except OSError as reason:  # a network file system that has lost the file
            raise error(f"{named}: cannot be checked for changes: {reason.strerror}. Open it again.") from reason
        if now != self.identity:
            raise error(f"{named}: changed since it was opened: {self.identity.difference(now)}. Open it again.")

    # FileIO's own finalizer warns of a file that was not closed; here that is the rule.
    __del__ = FileIO.close


_open_files: weakref.WeakValueDictionary[FileIdentity, OpenFile] = weakref.WeakValueDictionary()


class KnownFile(NamedTuple):
    """A file that was open once: its absolute path, and which file that was."""

    path: Path
    identity: FileIdentity

    def open(self, error: type[QmmError]) -> OpenFile:
        """Open the same file: the one that is still open, or else what the path leads to.

        Raises:
            FileMissingError, FileAccessError: the path cannot be opened any more.
            error: it leads to another file now, or the file was written to.
        """
        file = _open_files.get(self.identity)
        if file is not None:
            file.check(error)
            return file
        file = OpenFile.open(self.path, error)
        self.compare(file.identity, error)
        return file

    def check_name(self, error: type[QmmError]) -> None:
        """Raise ``error`` if the path leads to another file now, or to none."""
        try:
            now = FileIdentity.of(os.stat(self.path))
        except OSError as reason:
            raise error(f"{self.path}: was removed while it was opened: {reason.strerror}. Open it again.") from reason
        self.compare(now, error)

    def compare(self, now: FileIdentity, error: type[QmmError]) -> None:
        """Raise ``error`` if a file of identity ``now`` is another one."""
        if now != self.identity:
            difference = self.identity.difference(now)
            raise error(f"{self.path}: was written or replaced since it was opened: {difference}. Open it again.")


def _require_regular(path: Path, status: os.stat_result, error: type[QmmError]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise error(f"{path}: is {kind}, which cannot be mapped. Give the path of the GGUF file itself.")
    if status.st_size == 0:
        raise error(f"{path}: is empty (0 bytes). Was the download or copy finished?")


def _refusal(path: Path, reason: OSError | ValueError) -> QmmError:
    why = reason.strerror if isinstance(reason, OSError) else reason
    kind = FileMissingError if isinstance(reason, FileNotFoundError) else FileAccessError
    return kind(f"{path}: cannot be opened: {why}. Check the path and its permissions.", reason)
