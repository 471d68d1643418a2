"""Mapping a file into memory, once a process.

The mapping is always PROT_READ and MAP_SHARED. Never private: registering a private mapping with CUDA copies every page
or hangs, depending on the flags (seen on an H200 with driver 580: without ReadOnly a copy, with it a call that did not
return in 12 s even for 16 MiB).
"""

from __future__ import annotations

import mmap
import operator
import os
import sys
import threading
import weakref
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from qmm.children import PerProcess
from qmm.errors import ClosedError, MappingError
from qmm.loaders.closing import Closing
from qmm.loaders.files import FileIdentity, OpenFile

__all__ = ["FileMapping"]


NO_COPY: dict[str, bool] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
"""Have mmap keep no descriptor of its own, where it can be told."""


class _Pages:
    """The one mapping of a file, owned by the handles on it: Python's own reference count is the count of users.

    Nobody calls ``mmap.close``, which raises BufferError while a view lives. The mmap object unmaps when it dies, and
    it dies with the last of the handles and the views, each of which holds it.
    """

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        nbytes = file.identity.nbytes
        try:
            memory = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ, **NO_COPY)  # MAP_SHARED, PROT_READ
        except (OSError, ValueError, OverflowError) as reason:
            raise MappingError(
                f"{file.path}: {nbytes} bytes cannot be mapped: {reason}. Is the file on a file system without "
                "mmap, did it just become shorter, or is there a limit on address space (ulimit -v) or open files "
                "(ulimit -n)?"
            ) from reason
        self.data: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)  # read-only, because memory is
        self.address: int = self.data.ctypes.data


_pages: weakref.WeakValueDictionary[FileIdentity, _Pages] = weakref.WeakValueDictionary()
_lock = PerProcess(threading.RLock)


class FileMapping(Closing):
    """A handle on the read-only mapping of one file. A context manager.

    All handles on the same file (device, inode, size and modification time) share one mapping, whichever thread opened
    them; it goes when the last handle is closed and the last view is dropped. Closing a handle twice is harmless. A
    view stays valid after ``close`` for as long as somebody holds it; an ``address`` does not. A handle that is dropped
    without ``close`` counts as closed, as NumPy's ``memmap`` does.
    """

    def __init__(self, pages: _Pages, path: Path) -> None:
        """Use :meth:`open`, :meth:`of` or :meth:`share`."""
        self._pages: _Pages | None = pages
        self.path = path
        self.nbytes = pages.file.identity.nbytes

    @classmethod
    def open(cls, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> FileMapping:
        """Map ``path``, or share the mapping that the process has of it already. No page is touched.

        Raises:
            FileMissingError, FileAccessError: The file cannot be opened.
            MappingError: It is empty, not a regular file, or cannot be mapped.
        """
        return cls.of(OpenFile.open(path, MappingError))

    @classmethod
    def of(cls, file: OpenFile) -> FileMapping:
        """Map an open file, or share the mapping that the process has of it already.

        Raises:
            MappingError: It cannot be mapped.
        """
        with _lock.now:
            pages = _pages.get(file.identity)
            if pages is None:
                pages = _pages[file.identity] = _Pages(file)
        return cls(pages, file.path)

    def share(self) -> FileMapping:
        """Another handle on the same mapping, to be closed on its own. The path is not looked up again."""
        return FileMapping(self._open_pages(), self.path)

    def __copy__(self) -> FileMapping:
        return self.share()

    def __deepcopy__(self, memo: object) -> FileMapping:
        return self.share()

    def close(self) -> None:
        """Give up this handle. The last one unmaps the file, as soon as no view is left. Twice is harmless."""
        self._pages = None

    def __repr__(self) -> str:
        state = "closed" if self._pages is None else f"at 0x{self._pages.address:x}"
        return f"<FileMapping of {self.path}: {self.nbytes} bytes, {state}>"

    @property
    def closed(self) -> bool:
        """Whether this handle was closed; others on the same file may be open."""
        return self._pages is None

    @property
    def address(self) -> int:
        """Host address of the file's first byte: a multiple of the page size, valid until this handle is closed."""
        return self._open_pages().address

    def view(self, offset: SupportsIndex, nbytes: SupportsIndex) -> npt.NDArray[np.uint8]:
        """Bytes ``offset`` to ``offset + nbytes`` of the file: (nbytes,) uint8, read-only, no copy, no page touched.

        Raises:
            MappingError: They are not all in the file.
            ClosedError: The handle was closed.
        """
        data = self._open_pages().data
        start, end = self.require(offset, nbytes)
        return data[start:end]

    def read(self, offset: int, target: memoryview) -> None:
        """Read bytes of the file from ``offset`` on until ``target`` is full, without touching a page of the mapping.

        Raises:
            MappingError: The file has become shorter, or cannot be read.
            ClosedError: The handle was closed.
        """
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.fileno(), [target[done:]], offset + done)
            except OSError as reason:
                raise MappingError(
                    f"{self.path}: byte {offset + done} cannot be read: {reason.strerror}. Open the file again."
                ) from reason
            if not count:
                raise MappingError(
                    f"{self.path}: became shorter since it was opened: there is no byte {offset + done}. Open it again."
                )
            done += count

    def require(self, offset: SupportsIndex, nbytes: SupportsIndex) -> tuple[int, int]:
        """Check a range of bytes; its ``start`` and ``end`` as Python ints.

        Raises:
            MappingError: They are not all in the file.
        """
        start = operator.index(offset)
        end = start + operator.index(nbytes)
        if not 0 <= start <= end <= self.nbytes:
            raise MappingError(
                f"{self.path}: bytes {start} to {end} were asked for, but the mapping has {self.nbytes}. "
                "Take offsets and sizes from the GGUFIndex of this very file."
            )
        return start, end

    def fileno(self) -> int:
        """The file descriptor that was mapped. It stays open while the mapping lives, whatever happens to the path.

        Raises:
            ClosedError: The handle was closed.
        """
        return self._open_pages().file.fileno()

    def check(self) -> None:
        """Compare the file with what was mapped: size and modification time.

        Pages past the end of a file that became shorter raise SIGBUS, and ones that were written hold new weights. A
        file that was replaced by renaming another over it, or removed, is still there for those who have it open.

        Raises:
            MappingError: The file was written.
            ClosedError: The handle was closed.
        """
        self._open_pages().file.check(MappingError, self.path)

    def _open_pages(self) -> _Pages:
        if self._pages is None:
            raise ClosedError(f"{self.path}: the mapping was closed. Open it again.")
        return self._pages
