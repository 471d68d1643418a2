"""Mapping a file into memory, once a process.

The mapping is always PROT_READ and MAP_SHARED. Never private: registering a private mapping with CUDA copies every page
or hangs, depending on the flags (seen on an H200 with driver 580: without ReadOnly a copy, with it a call that did not
return in 12 s even for 16 MiB).
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qmm.errors import ClosedError, MappingError
from qmm.loaders.closing import Closing
from qmm.loaders.files import FileIdentity, open_regular
from qmm.loaders.forks import ProcessLock

__all__ = ["FileMapping"]


class _Pages:
    """The one mapping of a file, owned by the handles on it: Python's own reference count is the count of users.

    Nobody calls ``mmap.close``, which raises BufferError while a view lives. The mmap object unmaps when it dies, and
    it dies with the last of the handles and the views, each of which holds it.
    """

    def __init__(self, path: Path, descriptor: int, identity: FileIdentity) -> None:
        self.path = path
        self.identity = identity
        try:
            memory = mmap.mmap(descriptor, identity.nbytes, access=mmap.ACCESS_READ)  # MAP_SHARED, PROT_READ
        except (OSError, ValueError, OverflowError) as reason:
            raise MappingError(
                f"{path}: {identity.nbytes} bytes cannot be mapped: {reason}. Is the file on a file system without "
                "mmap, did it just become shorter, or is there a limit on address space (ulimit -v)?"
            ) from reason
        self.data: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)  # read-only, because memory is
        self.address: int = self.data.ctypes.data


_pages: weakref.WeakValueDictionary[FileIdentity, _Pages] = weakref.WeakValueDictionary()
_lock = ProcessLock()


class FileMapping(Closing):
    """A handle on the read-only mapping of one file. A context manager.

    All handles on the same file (device, inode, size and modification time) share one mapping, whichever thread opened
    them; it goes when the last handle is closed and the last view is dropped. Closing a handle twice is harmless. A
    view stays valid after ``close`` for as long as somebody holds it; an ``address`` does not.
    """

    def __init__(self, pages: _Pages) -> None:
        """Use :meth:`open` or :meth:`share`."""
        self._pages: _Pages | None = pages
        self.path = pages.path
        self.nbytes = pages.identity.nbytes

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FileMapping:
        """Map ``path``, or share the mapping that the process has of it already. No page is touched.

        Raises:
            MappingError: The file is absent, unreadable, empty, not a regular file, or cannot be mapped.
        """
        file, identity = open_regular(Path(path), MappingError)
        with file, _lock.now:  # mmap holds its own duplicate
            pages = _pages.get(identity)
            if pages is None:
                pages = _pages[identity] = _Pages(Path(path), file.fileno(), identity)
        return cls(pages)

    def share(self) -> FileMapping:
        """Another handle on the same mapping, to be closed on its own; the file is not looked up again."""
        return FileMapping(self._open_pages())

    def close(self) -> None:
        """Give up this handle. The last one of a file unmaps it, as soon as no view is left."""
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

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Bytes ``offset`` to ``offset + nbytes`` of the file: (nbytes,) uint8, read-only, no copy, no page touched.

        Raises:
            MappingError: They are not all in the file.
            ClosedError: The handle was closed.
        """
        data = self._open_pages().data
        self.require(offset, nbytes)
        return data[offset : offset + nbytes]

    def require(self, offset: int, nbytes: int) -> None:
        """Raise MappingError unless bytes ``offset`` to ``offset + nbytes`` are all in the file."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise MappingError(
                f"{self.path}: bytes {offset} to {offset + nbytes} were asked for, but the mapping has {self.nbytes}. "
                "Take offsets and sizes from the GGUFIndex of this very file."
            )

    def check(self) -> None:
        """Compare the file on disk with what was mapped: size, modification time and inode.

        Pages past the end of a file that became shorter raise SIGBUS, and ones that were written hold new weights.

        Raises:
            MappingError: The file changed, was replaced or is gone.
            ClosedError: The handle was closed.
        """
        mapped = self._open_pages().identity
        try:
            now = FileIdentity.of(os.stat(self.path))
        except OSError as reason:
            raise MappingError(
                f"{self.path}: was mapped, but is gone: {reason.strerror}. Put it back, or open another model."
            ) from reason
        for name, before, after in zip(FileIdentity._fields, mapped, now, strict=True):
            if before != after:
                raise MappingError(
                    f"{self.path}: changed since it was mapped: {name} was {before}, is {after}. Open the model again."
                )

    def _open_pages(self) -> _Pages:
        if self._pages is None:
            raise ClosedError(f"{self.path}: the mapping was closed. Open it again.")
        return self._pages
