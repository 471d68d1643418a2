"""Machine code of kernels on disk, so that later processes compile nothing and import no compiler.

An entry is one file, named by the SHA-256 of its key (:mod:`qmm.kernels.runtime.keys`). Code from a file runs on the
user's GPU, or in the user's process, so a file counts only if it is a regular one of this user's, which nobody else may
write, and its key and digest are right. Any other file is a miss, and is replaced.

::

    8 bytes   4         4            4              8             ...    ...     ...    32
    magic   | version | key length | entry length | code length | key  | entry | code | SHA-256 of all before

The folder is ``$QMM_CACHE_DIR`` (empty: nothing is kept; ``~`` is the home directory), else ``qmm/kernels`` in
``$XDG_CACHE_HOME`` or ``~/.cache``. Where it cannot be written, kernels are compiled in every process; a warning says
so if the user named the folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
import struct
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from qmm.folders import cache_folder, named_cache_folder
from qmm.kernels.runtime.keys import key_of, unchanged_sources

__all__ = ["CachedKernel", "Code", "Store", "store"]

MAGIC = b"qmm\0kern"
VERSION = 1
HEADER = struct.Struct("<8sIIIQ")
DIGEST_NBYTES = hashlib.sha256().digest_size

MOST_NBYTES = 256 << 20
MOST_DAYS = 60
ABANDONED_SECONDS = 3600
"""The age from which a half-written file is taken for abandoned."""
NAMES = re.compile(r"[0-9a-f]{64}\.(kernel|[0-9a-f]{16}\.part)")
"""The names of our files. The user may have named a folder with other files in it."""


class Code(NamedTuple):
    """A kernel: the name of its entry point, and machine code, a cubin or an object file."""

    entry: str
    code: bytes


class Store:
    """The entries in one folder. Processes may share it: a file appears whole or not at all."""

    def __init__(self, folder: Path, named: bool = False) -> None:
        """Args are the folder, created when something is put there, and whether the user named it."""
        self.folder = folder
        self._warns = named

    def path(self, key: str) -> Path:
        """Where the entry of a key is."""
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.kernel"

    def get(self, key: str) -> Code | None:
        """The entry of a key; None if there is none, or it is not ours, or damaged."""
        try:
            with open(self.path(key), "rb", opener=_open_to_read) as file:
                if not _trusted(os.fstat(file.fileno())):
                    return None
                found = _parse(file.read(), key)
                if found is not None:
                    with suppress(OSError):  # a file system mounted read-only
                        os.utime(file.fileno())
                return found
        except (OSError, ValueError):  # ValueError: invalid UTF-8
            return None

    def put(self, key: str, code: Code) -> None:
        """Keep machine code under a key, and drop what is old. A folder that cannot be written is left alone."""
        try:
            self._write(self.path(key), _format(key, code))
        except OSError as reason:
            if self._warns:
                self._warns = False
                message = f"QMM_CACHE_DIR={self.folder}: {reason}. Kernels are not kept, but compiled in every process."
                warnings.warn(message, RuntimeWarning, stacklevel=2)
        else:
            with suppress(OSError):  # another process removes files too
                self._prune(self.path(key))

    def _write(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.urandom(8).hex()}.part")
        try:
            with open(part, "xb", opener=_open_to_write) as file:
                file.write(data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _prune(self, newest: Path) -> None:
        """Remove what was not used for MOST_DAYS, then the longest unused beyond MOST_NBYTES; never ``newest``."""
        now = time.time()
        held, entries = newest.stat().st_size, []
        with os.scandir(self.folder) as files:
            for file in files:
                if NAMES.fullmatch(file.name) and file.name != newest.name and file.is_file(follow_symlinks=False):
                    status = file.stat(follow_symlinks=False)
                    entries.append((status.st_mtime, status.st_size, file.path))
        for mtime, nbytes, path in sorted(entries, reverse=True):
            held += nbytes
            if path.endswith(".part"):
                useless = now - mtime > ABANDONED_SECONDS
            else:
                useless = now - mtime > MOST_DAYS * 86400 or held > MOST_NBYTES
            if useless:
                with suppress(FileNotFoundError):
                    os.unlink(path)


def _open_to_read(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO would otherwise wait for its writer.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _open_to_write(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _trusted(status: os.stat_result) -> bool:
    """Whether nobody but this user can have written a file."""
    shared = stat.S_IWGRP | stat.S_IWOTH
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & shared
        and status.st_size <= MOST_NBYTES
    )


def _format(key: str, code: Code) -> bytes:
    parts = [key.encode(), code.entry.encode(), code.code]
    data = b"".join([HEADER.pack(MAGIC, VERSION, *map(len, parts)), *parts])
    return data + hashlib.sha256(data).digest()


def _parse(data: bytes, key: str) -> Code | None:
    body, digest = data[:-DIGEST_NBYTES], data[-DIGEST_NBYTES:]
    if len(body) < HEADER.size or hashlib.sha256(body).digest() != digest:
        return None
    magic, version, key_nbytes, entry_nbytes, code_nbytes = HEADER.unpack_from(body)
    entry_start = HEADER.size + key_nbytes
    code_start = entry_start + entry_nbytes
    if (magic, version, code_start + code_nbytes) != (MAGIC, VERSION, len(body)):
        return None
    if body[HEADER.size : entry_start] != key.encode():
        return None
    return Code(body[entry_start:code_start].decode(), body[code_start:])


class CachedKernel:
    """One kernel's entry in the user's cache; there need not be a cache."""

    def __init__(self, name: str, constants: Mapping[str, Any], target: object) -> None:
        """Args are as for :func:`qmm.kernels.runtime.keys.key_of`."""
        self._described = (name, constants, target)
        self._store = store()
        self._key = key_of(*self._described) if self._store else None

    def get(self) -> Code | None:
        """The kernel, if it is there."""
        return self._store.get(self._key) if self._store and self._key else None

    def put(self, code: Code) -> None:
        """Keep the kernel."""
        if self._store and self._key and self._unchanged():
            self._store.put(self._key, code)

    def _unchanged(self) -> bool:
        """Whether the kernel's sources are as they were: code compiled during an edit may be of neither version."""
        return unchanged_sources() and key_of(*self._described) == self._key


def store() -> Store | None:
    """The user's cache; None if it is turned off."""
    named = named_cache_folder()
    if named is not None:
        return _store(Path(named), True) if named else None
    try:
        return _store(cache_folder() / "kernels", False)
    except RuntimeError:
        return None


_store = functools.cache(Store)  # one for each folder, so that it warns once
