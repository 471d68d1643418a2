"""Reading the header of a GGUF file: a position that only moves forward over checked bytes.

Layout of everything below: ggml's ``docs/gguf.md`` (version 3; version 2 has the same layout). All integers are little
endian, nothing is aligned.

The header is read with ``pread`` into a small window, never through a mapping: a page fault would map, and read ahead,
pages of weights. No count or length is trusted: it is a Python integer (it cannot wrap) and is compared with the bytes
that the file has left before anything is allocated or looped over. A file may be sparse and any size, so what a header
may hold is bounded as well, far above what models use: a hostile file costs a second and some megabytes at most.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, NoReturn, Self

import numpy as np

from qmm.errors import GGUFError
from qmm.loaders.files import OpenFile
from qmm.loaders.gguf.strings import StringOverrunError, skip_strings

__all__ = ["ArrayField", "HeaderReader", "TextField", "ValueType", "quote"]

# Beside each bound, what Gemma-3-270M takes: its vocabulary is among the largest in use.
HEADER_LIMIT: Final = 128 << 20  # bytes up to the end of the tensor table: 6,525,112
TEXT_LIMIT: Final = 4 << 20  # bytes of keys, tensor names and strings outside arrays, but for long ones: 6,206
STRING_LIMIT: Final = 1 << 21  # strings in all arrays of the file: 262,148
NESTED_LIMIT: Final = 1 << 12  # arrays inside arrays: 0
DEPTH_LIMIT: Final = 8  # arrays inside arrays inside arrays: 1
COUNT_LIMIT: Final = 1 << 14  # keys, 33, and tensors, 236
DIMENSION_LIMIT: Final = 64  # dimensions of a tensor, 2: what NumPy and PyTorch can have

FIRST_READ_NBYTES: Final = 64 * 1024  # doubled with each read, so that a small header reads little of what follows it
LAST_READ_NBYTES: Final = 256 * 1024

LONG_TEXT: Final = 1 << 16  # bytes of a string that is left in the file until asked for, such as a whole tokenizer.json
MIDDLING_TEXT: Final = 1 << 10  # the same, where those before took half of TEXT_LIMIT
QUOTE_LENGTH: Final = 128  # twice what ggml allows a tensor's name

UINT32: Final = struct.Struct("<I")
UINT64: Final = struct.Struct("<Q")


class ValueType(IntEnum):
    """``gguf_metadata_value_type``. The gguf package has it too (a test compares them), but takes 50 ms to import."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12

    @property
    def label(self) -> str:
        """The name for people, such as ``"uint32"``."""
        return self.name.lower()


SCALARS: Final[dict[int, struct.Struct]] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: UINT32,
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: UINT64,
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
SMALLEST: Final = {ValueType.STRING: 8, ValueType.ARRAY: 12}  # bytes of an empty string, of an empty array


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def quote(name: str) -> str:
    """``name`` as messages show it: quoted, and cut if it is long, since a damaged one may have megabytes."""
    if len(name) <= QUOTE_LENGTH:
        return repr(name)
    return f"{name[:QUOTE_LENGTH]!r}... ({len(name)} characters)"


class ArrayField(NamedTuple):
    """An array that was skipped: the type and number of its elements, and the byte offset of the first."""

    item: ValueType
    length: int
    offset: int


class TextField(NamedTuple):
    """A long string that was skipped: its size and byte offset."""

    nbytes: int
    offset: int


class HeaderReader:
    """A forward position in one GGUF file; every method reads there and moves on. A context manager.

    Text is UTF-8; other bytes are kept, with Python's error handler ``surrogateescape``.

    Attributes:
        path: The file, for messages.
        known: The file's path and identity, to open it again.
        nbytes: The file's size when it was opened.
        position: Byte offset of the next read.

    Every method raises GGUFError, with the file, the byte offset and both numbers, where the file cannot hold what it
    claims.
    """

    def __init__(self, file: OpenFile) -> None:
        self.path: Path = file.path
        self.known = file.known
        self.position = 0
        self._file = file
        self.nbytes = file.identity.nbytes
        self._window = b""
        self._window_start = 0
        self._read_nbytes = FIRST_READ_NBYTES
        self._text_nbytes = self._strings = self._nested = 0
        if hasattr(os, "posix_fadvise"):  # otherwise the kernel reads ahead of us, into the weights
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if hasattr(os, "posix_fadvise"):  # the mapping of the file has the same descriptor, and wants its pages ahead
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_NORMAL)

    def fail(self, message: str, *, position: int | None = None) -> NoReturn:
        """Raise GGUFError with the file, the byte offset (``position``, or where the reader stands) and ``message``."""
        raise GGUFError(f"{self.path}: at byte {self.position if position is None else position}: {message}")

    def raw(self, nbytes: int, what: str) -> bytes:
        """The next ``nbytes`` bytes."""
        start = self._advance(nbytes, what)
        return self._window[start : start + nbytes]

    def number(self, layout: struct.Struct, what: str) -> Any:
        """The next value of ``layout``, which has one field."""
        start = self._advance(layout.size, what)
        return layout.unpack_from(self._window, start)[0]

    def numbers(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        """The next values of all fields of ``layout``."""
        start = self._advance(layout.size, what)
        return layout.unpack_from(self._window, start)

    def count(self, what: str, smallest: int, limit: int) -> int:
        """The next uint64 as the number of things of at least ``smallest`` bytes that follow, at most ``limit``."""
        count: int = self.number(UINT64, f"the number of {what}")
        left = self.nbytes - self.position
        if count * smallest > left:
            self.fail(
                f"claims {count} {what}, at least {count * smallest} bytes, but only {left} bytes are left. "
                "The file is damaged or cut short: fetch or convert it again.",
                position=self.position - 8,
            )
        if count > limit:
            self.fail(f"claims {count} {what}; qmm reads at most {limit}.", position=self.position - 8)
        return count

    def text(self, what: str) -> str:
        """The next GGUF string: uint64 length, then UTF-8."""
        return self._text(self._length(what), what)

    def _length(self, what: str) -> int:
        length: int = self.number(UINT64, f"the length of {what}")
        self._require(length, what)
        return length

    def _text(self, length: int, what: str) -> str:
        self._text_nbytes += length
        if self._text_nbytes > TEXT_LIMIT:
            self.fail(f"{what} has {length} bytes; qmm reads at most {TEXT_LIMIT} bytes of names and text in a header.")
        return _decoded(self.raw(length, what))

    def value_type(self, what: str) -> ValueType:
        """The next uint32 as the type of a value."""
        number = self.number(UINT32, f"the type of {what}")
        if number > ValueType.FLOAT64:
            self.fail(
                f"{what} has value type {number}; qmm knows 0 to {ValueType.FLOAT64:d}. The file is damaged or newer.",
                position=self.position - 4,
            )
        return ValueType(number)

    def value(self, what: str) -> tuple[ValueType, Any]:
        """The next value with its type before it: int, float, bool, str, or a :class:`TextField` or :class:`ArrayField`
        that was skipped."""
        kind = self.value_type(what)
        if kind == ValueType.ARRAY:
            return kind, self._skip_array(what, 1)
        if kind == ValueType.STRING:
            length = self._length(what)
            short = LONG_TEXT if self._text_nbytes <= TEXT_LIMIT // 2 else MIDDLING_TEXT
            return kind, self._text(length, what) if length <= short else self._skip_text(length)
        number = self.number(SCALARS[kind], what)
        return kind, bool(number) if kind == ValueType.BOOL else number  # ggml takes any byte but 0 for true

    def long_text(self, field: TextField, what: str) -> str:
        """The string of ``field``, wherever the reader stands."""
        self.position = field.offset
        return _decoded(self.raw(field.nbytes, what))

    def array(self, field: ArrayField, what: str) -> Any:
        """The elements of ``field``, wherever the reader stands.

        Returns:
            Numbers and bools: a read-only NumPy array, shape (length,), of the type stored; strings: list[str]; arrays:
            a list of these.
        """
        self.position = field.offset
        return self._elements(field.item, field.length, what)

    def _elements(self, item: ValueType, count: int, what: str) -> Any:
        if item == ValueType.ARRAY:
            return [self._elements(self.value_type(what), self.number(UINT64, what), what) for _ in range(count)]
        if item == ValueType.STRING:
            return self._string_elements(count, what)
        layout = SCALARS[item]
        if item == ValueType.BOOL:
            flags = np.frombuffer(self.raw(count, what), dtype=np.uint8) != 0
            flags.flags.writeable = False
            return flags
        return np.frombuffer(self.raw(count * layout.size, what), dtype=np.dtype(layout.format))

    def _string_elements(self, count: int, what: str) -> list[str]:
        base = self.position
        self._skip_strings(count, what)
        nbytes, self.position = self.position - base, base
        data = self.raw(nbytes, what)
        strings: list[str] = []
        start = 0
        for _ in range(count):
            stop = start + 8 + UINT64.unpack_from(data, start)[0]
            strings.append(_decoded(data[start + 8 : stop]))
            start = stop
        return strings

    def _skip_text(self, length: int) -> TextField:
        field = TextField(length, self.position)
        self.position += length
        return field

    def _skip_array(self, what: str, depth: int) -> ArrayField:
        if depth > DEPTH_LIMIT:
            self.fail(f"{what} nests arrays more than {DEPTH_LIMIT} deep; qmm reads no deeper ones.")
        item = self.value_type(f"the elements of {what}")
        smallest = SCALARS[item].size if item in SCALARS else SMALLEST[item]
        count = self.count(f"elements of {what}", smallest, HEADER_LIMIT // smallest)
        field = ArrayField(item, count, self.position)
        if item == ValueType.STRING:
            self._skip_strings(count, what)
        elif item == ValueType.ARRAY:
            self._nested += count
            if self._nested > NESTED_LIMIT:
                self.fail(f"{what} makes {self._nested} arrays inside arrays; qmm reads at most {NESTED_LIMIT}.")
            for _ in range(count):
                self._skip_array(what, depth + 1)
        else:
            self._require(count * smallest, what)
            self.position += count * smallest
        return field

    def _skip_strings(self, count: int, what: str) -> None:
        self._strings += count
        if self._strings > STRING_LIMIT:
            self.fail(f"{what} makes {self._strings} strings in the header; qmm reads at most {STRING_LIMIT}.")
        try:
            self.position = skip_strings(self._pread, self.position, count, min(self.nbytes, HEADER_LIMIT))
        except StringOverrunError as overrun:
            self.position = overrun.position
            self._require(8 + overrun.length, f"a string in {what}")
            self._fail_shortened(what)

    def _require(self, nbytes: int, what: str) -> None:
        left = self.nbytes - self.position
        if nbytes > left:
            self.fail(
                f"{what} needs {nbytes} bytes, but only {left} bytes are left. "
                "The file is damaged or cut short: fetch or convert it again."
            )
        if self.position + nbytes > HEADER_LIMIT:
            self.fail(f"{what} needs {nbytes} bytes, which makes the header longer than {HEADER_LIMIT} bytes.")

    def _fail_shortened(self, what: str) -> NoReturn:
        self.fail(f"{what} could not be read: the file became shorter than its {self.nbytes} bytes while it was read.")

    def _advance(self, nbytes: int, what: str) -> int:
        """Move past ``nbytes`` bytes and return where in the window they start."""
        start = self.position - self._window_start
        if start < 0 or start + nbytes > len(self._window):
            self._require(nbytes, what)
            self._window = self._pread(self.position, max(nbytes, self._read_nbytes))
            self._window_start, start = self.position, 0
            self._read_nbytes = min(2 * self._read_nbytes, LAST_READ_NBYTES)
            if len(self._window) < nbytes:
                self._fail_shortened(what)
        self.position += nbytes
        return start

    def _pread(self, position: int, nbytes: int) -> bytes:
        """Up to ``nbytes`` bytes at ``position``, fewer only at the file's end."""
        try:
            return os.pread(self._file.fileno(), nbytes, position)
        except OSError as reason:
            raise GGUFError(
                f"{self.path}: {nbytes} bytes at byte {position} cannot be read: {reason.strerror}. Check the disk."
            ) from reason
