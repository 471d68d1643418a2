"""A second opinion on GGUF files: a strict reader of ggml's ``docs/gguf.md`` that shares no code with qmm.

It holds the whole file in memory, walks every string and compares every pair of tensors, so it is short and slow. Where
the document leaves something open, or files in use break it, it takes what qmm documents: any integer type will do for
``general.alignment`` and ``split.*``, any alignment from 1 on, up to 64 dimensions, any byte but 0 is true, text may be
no UTF-8, tensors may lie in any order with gaps, one of an unknown type has the room up to its neighbour, one without
values may be anywhere, and a file that has all tensors of ``split.tensors.count`` by itself may have lost its shards.
qmm's limits (qmm/loaders/header.py) are not the format's: :class:`Usage` says what a header would need of each.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gguf.constants import GGML_QUANT_SIZES

__all__ = ["Field", "File", "InvalidError", "Model", "Numbers", "Tensor", "Usage", "read_file", "read_model"]

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NAMES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array"]
NAMES += ["uint64", "int64", "float64"]
STRING, ARRAY = 8, 9
BLOCKS = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


class InvalidError(Exception):
    """The file breaks the format."""


class Field(NamedTuple):
    """Where a number or text of the header lies."""

    kind: str
    position: int
    nbytes: int


class Numbers(NamedTuple):
    """An array of numbers or bools: the name of its type, and its bytes."""

    type: str
    data: bytes


class Tensor(NamedTuple):
    """A tensor: ggml's name of its type, row-major shape, and which bytes of which file it has."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path


@dataclass
class Usage:
    """What a header takes of each of qmm's limits; ``short_texts`` without those of over 1 KiB, which may be left."""

    keys: int = 0
    tensors: int = 0
    texts: int = 0
    short_texts: int = 0
    strings: int = 0
    nested: int = 0
    depth: int = 0
    nbytes: int = 0


@dataclass
class File:
    """One file. ``metadata``: by key the type as qmm words it, and the value."""

    version: int = 0
    alignment: int = 32
    metadata: dict[str, tuple[str, Any]] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)


class Model(NamedTuple):
    """A model in one file or several; version, alignment and metadata are the first file's."""

    paths: list[Path]
    files: list[File]

    @property
    def tensors(self) -> list[Tensor]:
        """Of all files."""
        return [tensor for file in self.files for tensor in file.tensors]


def read_model(path: Path) -> Model:
    """The model in ``path`` and, if it is one of several shards, in the others beside it."""
    asked = read_file(path)
    count = _integer(asked, "split.count", 1)
    if count < 0:
        raise InvalidError(f"{count} shards")
    if count <= 1:
        return Model([path], [asked])
    whole = _integer(asked, "split.tensors.count", -1) == len(asked.tensors)
    prefix, number = path.name[:-20], path.name[-19:-14]
    numbered = number.isascii() and number.isdecimal() and 1 <= int(number) <= count
    if not numbered or path.name != f"{prefix}-{number}-of-{count:05d}.gguf":
        if whole:
            return Model([path], [asked])
        raise InvalidError(f"not the name of one of {count} shards")
    paths = [path.with_name(f"{prefix}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if whole and not all(each.exists() for each in paths):
        return Model([path], [asked])
    files = [read_file(each) for each in paths]
    total = sum(len(file.tensors) for file in files)
    for index, file in enumerate(files):
        said = [_integer(file, key, -1) for key in ("split.no", "split.count")]
        if said != [index, count] or _integer(file, "split.tensors.count", total) != total:
            raise InvalidError(f"shard {index} says {said}")
    model = Model(paths, files)
    if len({tensor.name for tensor in model.tensors}) < total:
        raise InvalidError("a tensor is in two shards")
    return model


def read_file(path: Path) -> File:
    """One file, other shards left aside."""
    try:
        data = path.read_bytes()
    except OSError as reason:
        raise InvalidError(str(reason)) from reason
    return _Reader(data, path).file


def _integer(file: File, key: str, default: int) -> int:
    kind, value = file.metadata.get(key, ("int32", default))
    if "int" not in kind or "[" in kind:
        raise InvalidError(f"{key} is {kind}")
    return int(value)


class _Reader:
    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.position, self.file = data, path, 0, File()
        file, usage = self.file, self.file.usage
        if self.take("magic", 4) != b"GGUF":
            raise InvalidError("magic")
        file.version = self.number("version", "I")
        if file.version not in (2, 3):
            raise InvalidError("version")
        usage.tensors, usage.keys = self.number("count", "Q"), self.number("count", "Q")
        for _ in range(usage.keys):
            key = self.text("key")
            if key in file.metadata:
                raise InvalidError(f"key {key!r} twice")
            file.metadata[key] = self.value()
        file.alignment = _integer(file, "general.alignment", 32)
        if file.alignment < 1:
            raise InvalidError("alignment")
        rows = [self.row() for _ in range(usage.tensors)]
        usage.nbytes = self.position
        self.place(rows)

    def take(self, kind: str, nbytes: int) -> bytes:
        if nbytes > len(self.data) - self.position:
            raise InvalidError(f"{kind} of {nbytes} bytes at {self.position}")
        self.file.fields.append(Field(kind, self.position, nbytes))
        self.position += nbytes
        return self.data[self.position - nbytes : self.position]

    def number(self, kind: str, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(kind, struct.calcsize(f"<{code}")))[0]

    def text(self, kind: str) -> str:
        data = self.take(kind, self.number("length", "Q"))
        if kind != "string" or len(data) <= 1 << 16:  # longer ones qmm leaves in the file
            self.file.usage.texts += len(data)
        if kind != "string" or len(data) <= 1 << 10:
            self.file.usage.short_texts += len(data)
        return _decode(data)

    def value(self) -> tuple[str, Any]:
        kind = self.number("value type", "I")
        if kind == STRING:
            return "string", self.text("string")
        if kind == ARRAY:
            return self.array(1)
        if kind not in CODES:
            raise InvalidError(f"value type {kind}")
        if CODES[kind] == "?":
            return "bool", self.take("value", 1) != b"\0"
        return NAMES[kind], self.number("value", CODES[kind])

    def array(self, depth: int) -> tuple[str, Any]:
        usage = self.file.usage
        usage.depth = max(usage.depth, depth)
        kind, count = self.number("value type", "I"), self.number("count", "Q")
        if kind >= len(NAMES):
            raise InvalidError(f"element type {kind}")
        label = f"{NAMES[kind]}[{count}]"
        if kind == ARRAY:
            usage.nested += count
            return label, [self.array(depth + 1)[1] for _ in range(count)]
        if kind == STRING:
            usage.strings += count
            raw = [self.take("element", self.number("length", "Q")) for _ in range(count)]
            return label, [_decode(data) for data in raw]
        data = self.take("elements", count * struct.calcsize(f"<{CODES[kind]}"))
        return label, Numbers(NAMES[kind], bytes(map(bool, data)) if CODES[kind] == "?" else data)

    def row(self) -> tuple[str, list[int], int, int]:
        name, dimensions = self.text("name"), self.number("dimensions", "I")
        if dimensions > 64:
            raise InvalidError(f"{dimensions} dimensions")
        ne = [self.number("dimension", "Q") for _ in range(dimensions)]
        return name, ne or [1], self.number("tensor type", "I"), self.number("offset", "Q")

    def place(self, rows: list[tuple[str, list[int], int, int]]) -> None:
        if len({name for name, *_ in rows}) < len(rows):
            raise InvalidError("a tensor twice")
        start = self.position + -self.position % self.file.alignment
        taken = [(start + offset, start + offset + _least(ne, kind)) for _, ne, kind, offset in rows]
        for index, (begin, end) in enumerate(taken):
            others = taken[:index] + taken[index + 1 :]
            if (begin < end and end > len(self.data)) or rows[index][3] % self.file.alignment:
                raise InvalidError(f"{rows[index]}: past the end, or misaligned")
            if begin < end and any(low < end and begin < high for low, high in others if low < high):
                raise InvalidError(f"{rows[index]}: overlaps")
            name, ne, kind, _ = rows[index]
            if kind not in BLOCKS and begin < end:
                end = min([low for low, high in others if begin < low < high], default=len(self.data))
            label = BLOCKS[kind][0] if kind in BLOCKS else f"unknown({kind})"
            self.file.tensors.append(Tensor(name, label, tuple(reversed(ne)), begin, end - begin, self.path))


def _least(ne: list[int], kind: int) -> int:
    """Bytes of a tensor; of an unknown type one, if it has values."""
    if math.prod(max(1, n) for n in ne) >= 2**63:
        raise InvalidError(f"dimensions {ne}")
    _, values, nbytes = BLOCKS.get(kind, ("", 1, 0))
    if ne[0] % values:
        raise InvalidError(f"{ne[0]} values in blocks of {values}")
    return math.prod(ne) // values * nbytes if nbytes else int(0 not in ne)


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
