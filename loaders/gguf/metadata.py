"""The key/value metadata of a GGUF file; arrays and long strings are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qmm.errors import GGUFError
from qmm.loaders.files import KnownFile
from qmm.loaders.gguf.header import ArrayField, HeaderReader, TextField, quote

__all__ = ["Metadata"]


class Metadata(Mapping[str, Any]):
    """Keys and values in file order.

    Numbers are int, float or bool; strings are str, in which bytes that are not UTF-8 are kept as Python keeps them in
    file names: ``text.encode("utf-8", "surrogateescape")`` gives them back. ``metadata[key]`` of an array or a long
    string (:meth:`in_file` says which) reads it from the file the first time and keeps it: numbers and bools as a
    read-only NumPy array of the stored type, strings as list[str], arrays as a list of these. Iterating over values or
    items therefore reads all of them; :meth:`type_of` reads none.
    """

    def __init__(self, file: KnownFile, types: dict[str, str], values: dict[str, Any]) -> None:
        self._file = file
        self._types = types
        self._values = values

    @classmethod
    def read(cls, header: HeaderReader, count: int) -> Metadata:
        """Read ``count`` key/value pairs where ``header`` stands.

        Raises:
            GGUFError: They are damaged, or a key occurs twice.
        """
        types: dict[str, str] = {}
        values: dict[str, Any] = {}
        for index in range(count):
            start = header.position
            key = header.text(f"key {index + 1} of {count}")
            if key in values:
                header.fail(f"metadata key {quote(key)} occurs twice. The file is damaged.", position=start)
            kind, value = header.value(f"metadata key {quote(key)}")
            types[key] = f"{value.item.label}[{value.length}]" if isinstance(value, ArrayField) else kind.label
            values[key] = value
        return cls(header.known, types, values)

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, ArrayField | TextField):
            # Two threads may both decode it; either result will do.
            value = self._values[key] = self._decode(key, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values  # Mapping's own would decode the array to find out

    def __repr__(self) -> str:
        return f"<Metadata of {self._file.path}: {len(self)} keys>"

    def type_of(self, key: str) -> str:
        """The type stored under ``key``, such as ``"uint32"`` or ``"string[262144]"``; reads nothing from the file."""
        return self._types[key]

    def in_file(self, key: str) -> bool:
        """Whether the value is still in the file only: an array or a long string that was not asked for yet.

        Strings are long from 64 KiB on, and after 2 MiB of other strings from 1 KiB on.
        """
        return isinstance(self._values[key], ArrayField | TextField)

    def integer(self, key: str, default: int) -> int:
        """The integer under ``key``, or ``default`` if the key is absent. Never reads an array.

        Raises:
            GGUFError: There is something else.
        """
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise GGUFError(
                f"{self._file.path}: metadata key {key!r} should be an integer, but is {self._types[key]}. "
                "The file is damaged, or its writer is wrong: convert it again."
            )
        return value

    def _decode(self, key: str, field: ArrayField | TextField) -> Any:
        what = f"metadata key {quote(key)}"
        try:
            file = self._file.open(GGUFError)
        except GGUFError as reason:
            raise GGUFError(f"{reason} So {what} cannot be read.") from reason
        with HeaderReader(file) as header:
            return header.array(field, what) if isinstance(field, ArrayField) else header.long_text(field, what)
