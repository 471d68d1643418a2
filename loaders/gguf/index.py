"""The index of a GGUF model: the type, shape, offset and size of every tensor, from the header alone.

    >>> index = GGUFIndex.read("model.gguf")                     # doctest: +SKIP
    >>> index.tensors["blk.0.ffn_up.weight"]                     # doctest: +SKIP
    TensorInfo(name='blk.0.ffn_up.weight', type='Q4_K', shape=(2048, 640), offset=19070496, nbytes=737280, path=...)

The layout (ggml ``docs/gguf.md``): magic ``GGUF``, uint32 version, uint64 number of tensors, uint64 number of keys, the
key/value pairs, then for each tensor its name, uint32 number of dimensions, uint64 each dimension (``ne``, fastest
first), uint32 type and uint64 offset; then zeros up to ``general.alignment``, where the data begins that offsets count
from.
"""

from __future__ import annotations

import functools
import math
import os
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from qmm.errors import GGUFError
from qmm.loaders.files import KnownFile, OpenFile
from qmm.loaders.gguf.header import COUNT_LIMIT, DIMENSION_LIMIT, UINT32, HeaderReader, quote
from qmm.loaders.gguf.metadata import Metadata
from qmm.loaders.gguf.split import check_shard, check_total, is_whole, shard_paths, split_count

__all__ = ["GGUFIndex", "TensorInfo", "read_model"]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
# What follows a tensor's name, by its number of dimensions: these, a type and an offset.
ENTRIES: Final = tuple(struct.Struct(f"<{dimensions}QIQ") for dimensions in range(DIMENSION_LIMIT + 1))
SMALLEST_PAIR: Final = 8 + 4 + 1  # an empty key, a type and a value of one byte
SMALLEST_TENSOR: Final = 8 + 4 + 4 + 8  # an empty name, no dimensions, a type and an offset


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, and where its bytes are.

    Attributes:
        name: Its name in the file.
        type: ggml's name of its type, such as ``"Q4_K"``; ``"unknown(99)"`` for a type that the gguf package has not.
        shape: Row-major, slowest dimension first (GGUF's ``ne`` reversed): a matrix is ``(m, k)``.
        offset: First byte, from the start of ``path``.
        nbytes: Exact size. For an unknown type: the room up to the next tensor or the end of the file.
        path: The file that holds it, one of :attr:`GGUFIndex.files`.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    path: Path

    @property
    def k(self) -> int:
        """Values in a row: the last dimension."""
        return self.shape[-1]

    @property
    def m(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class GGUFIndex:
    """The tensors and metadata of a GGUF model, in one file or split over several.

    Attributes:
        path: The file that was asked for.
        version: GGUF version, 2 or 3.
        alignment: ``general.alignment`` in bytes, or 32; that of the first file if the model is split.
        known: All files of the model in order, and which files they were; one unless it is split.
        tensors: By name, in file order.
        metadata: By key; arrays are read when they are asked for. That of the first file if the model is split.
    """

    path: Path
    version: int
    alignment: int
    known: tuple[KnownFile, ...]
    tensors: dict[str, TensorInfo]
    metadata: Metadata

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths of all files of the model in order."""
        return tuple(file.path for file in self.known)

    @classmethod
    def read(cls, path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> GGUFIndex:
        """Index the model in ``path``, and in its other shards if it is one of several. No weight is read.

        Raises:
            FileMissingError, FileAccessError: The file cannot be opened.
            GGUFError: It is damaged, cut short, big endian or of another version; a shard is missing, belongs to
                another model, or was replaced while the model was read.
        """
        index, _ = read_model(path)
        return index


def read_model(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> tuple[GGUFIndex, list[OpenFile]]:
    """:meth:`GGUFIndex.read`, and the files, still open: mapped from these, the weights are those of the header.

    Raises:
        GGUFError: As there.
    """
    file = OpenFile.open(path, GGUFError)
    path = file.path
    asked = _read_file(file)
    count = split_count(path, asked.metadata)
    if count == 1 or is_whole(path, asked.metadata, count, len(asked.tensors)):
        tensors = {tensor.name: tensor for tensor in asked.tensors}
        return GGUFIndex(path, asked.version, asked.alignment, (file.known,), tensors, asked.metadata), [file]
    paths = shard_paths(path, count)
    files, shards = [], []
    for number, shard in enumerate(paths):
        files.append(file if shard == path else OpenFile.open(shard, GGUFError))
        shards.append(asked if shard == path else _read_file(files[-1]))
        check_shard(shard, shards[-1].metadata, number, count)
    for opened in files:  # if the model was replaced meanwhile, some may be old shards and some new
        opened.known.check_name(GGUFError)
    tensors = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in tensors:
            raise GGUFError(
                f"{tensor.path}: tensor {quote(tensor.name)} is in {tensors[tensor.name].path} already. "
                "The files of different models were mixed: fetch them again."
            )
        tensors[tensor.name] = tensor
    for named, read in zip(paths, shards, strict=True):
        check_total(named, read.metadata, count, len(tensors))
    first = shards[0]
    known = tuple(opened.known for opened in files)
    return GGUFIndex(path, first.version, first.alignment, known, tensors, first.metadata), files


class _File(NamedTuple):
    version: int
    alignment: int
    tensors: list[TensorInfo]
    metadata: Metadata


class _Entry(NamedTuple):
    """A row of the tensor table as stored: ``ne`` fastest dimension first, ``offset`` from the start of the data."""

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int


class _Layout(NamedTuple):
    """A ggml type: its name, and how many values and bytes a block of it has."""

    name: str
    values: int
    nbytes: int


@functools.cache
def _layouts() -> dict[int, _Layout]:
    # Imported at the first file: gguf takes 50 ms to import.
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): _Layout(kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _read_file(file: OpenFile) -> _File:
    path = file.path
    with HeaderReader(file) as header:
        version = _read_version(header)
        tensor_count = header.count("tensors", SMALLEST_TENSOR, COUNT_LIMIT)
        metadata = Metadata.read(header, header.count("metadata keys", SMALLEST_PAIR, COUNT_LIMIT))
        alignment = _alignment(path, metadata)
        entries: dict[str, _Entry] = {}
        for index in range(tensor_count):
            start = header.position
            entry = _read_entry(header, f"tensor {index + 1} of {tensor_count}")
            if entry.name in entries:
                header.fail(f"tensor {quote(entry.name)} occurs twice. The file is damaged.", position=start)
            entries[entry.name] = entry
        data_start = -(-header.position // alignment) * alignment
        tensors = _place(path, header.nbytes, entries.values(), data_start, alignment)
        return _File(version, alignment, tensors, metadata)


def _read_version(header: HeaderReader) -> int:
    if header.nbytes < len(MAGIC) + UINT32.size or (magic := header.raw(len(MAGIC), "the magic")) != MAGIC:
        start = repr(magic) if header.nbytes >= len(MAGIC) + UINT32.size else f"only {header.nbytes} bytes"
        header.fail(f"this is not a GGUF file: it has {start} where {MAGIC!r} and a version belong.", position=0)
    version: int = header.number(UINT32, "the version")
    if version & 0xFFFF == 0 and version:
        header.fail(
            f"this is big endian (version field 0x{version:08x}), and qmm reads blocks as they lie, little endian. "
            f"Convert it in place with a script of the gguf package: gguf-convert-endian {header.path} little",
            position=len(MAGIC),
        )
    if version not in VERSIONS:
        advice = "Convert the model again with a current llama.cpp." if version < 2 else "A newer qmm may know it."
        header.fail(f"this is GGUF version {version}; qmm reads versions 2 and 3. {advice}", position=len(MAGIC))
    return version


def _alignment(path: Path, metadata: Metadata) -> int:
    alignment = metadata.integer("general.alignment", DEFAULT_ALIGNMENT)
    # gguf.md wants a multiple of 8, ggml a power of two, gguf-py takes any; qmm's kernels read at any address.
    if alignment < 1:
        raise GGUFError(
            f"{path}: general.alignment is {alignment}, and must be 1 at least. "
            "The file is damaged, or its writer is wrong: convert it again."
        )
    return alignment


def _read_entry(header: HeaderReader, what: str) -> _Entry:
    name = header.text(f"the name of {what}")
    what = f"tensor {quote(name)}"
    dimensions: int = header.number(UINT32, f"the number of dimensions of {what}")
    if dimensions > DIMENSION_LIMIT:
        header.fail(
            f"{what} has {dimensions} dimensions; qmm reads at most {DIMENSION_LIMIT}.",
            position=header.position - UINT32.size,
        )
    *ne, kind, offset = header.numbers(ENTRIES[dimensions], f"the shape, type and offset of {what}")
    return _Entry(name, tuple(ne) or (1,), kind, offset)


def _place(
    path: Path, file_nbytes: int, entries: Collection[_Entry], data_start: int, alignment: int
) -> list[TensorInfo]:
    """Check the place of each tensor, and return the table's rows, in order, as TensorInfo."""
    infos: dict[str, TensorInfo] = {}
    end, above = file_nbytes, ""  # where the next tensor of the file begins, and its name
    for entry in sorted(entries, key=lambda entry: entry.offset, reverse=True):
        if entry.offset % alignment:
            raise _refusal(
                path,
                entry,
                f"has offset {entry.offset}, which is no multiple of general.alignment {alignment}. "
                "The file is damaged, or its writer is wrong: convert it again.",
            )
        offset = data_start + entry.offset
        layout = _layouts().get(entry.type)
        kind = layout.name if layout else f"unknown({entry.type})"
        nbytes = _nbytes(path, entry, layout)
        if not nbytes:  # without values, its offset may be that of another tensor, or past the end of the file
            infos[entry.name] = TensorInfo(entry.name, kind, entry.ne[::-1], offset, 0, path)
            continue
        if offset + nbytes > file_nbytes:
            raise _refusal(
                path,
                entry,
                f"takes bytes {offset} to {offset + nbytes}, but the file ends at byte {file_nbytes}. "
                "It is cut short (an unfinished download or copy?): fetch it again.",
            )
        if offset + nbytes > end:
            raise _refusal(
                path,
                entry,
                f"takes bytes {offset} to {offset + nbytes}, but tensor {quote(above)} begins at byte {end}. "
                "The file is damaged: fetch or convert it again.",
            )
        if layout is None:
            nbytes = end - offset
        end, above = offset, entry.name
        infos[entry.name] = TensorInfo(entry.name, kind, entry.ne[::-1], offset, nbytes, path)
    return [infos[entry.name] for entry in entries]


def _nbytes(path: Path, entry: _Entry, layout: _Layout | None) -> int:
    """Its exact size; of an unknown type the least that it can be: one byte, if it has values."""
    product = math.prod(filter(None, entry.ne))  # a Python integer: it cannot wrap, nor hide behind a dimension of 0
    if product >= 1 << 63:
        raise _refusal(
            path,
            entry,
            f"has dimensions {' x '.join(map(str, entry.ne))}, whose product is {product}; ggml's is below 2^63. "
            "The file is damaged.",
        )
    if layout is None:
        return min(entry.ne) and 1
    if entry.ne[0] % layout.values:
        raise _refusal(
            path,
            entry,
            f"has rows of {entry.ne[0]} values, which is no multiple of the {layout.values} in a block of "
            f"{layout.name}. The file is damaged.",
        )
    return math.prod(entry.ne) // layout.values * layout.nbytes


def _refusal(path: Path, entry: _Entry, problem: str) -> GGUFError:
    return GGUFError(f"{path}: tensor {quote(entry.name)} {problem}")
