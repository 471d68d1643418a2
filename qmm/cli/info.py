"""The report of ``qmm info`` on a model, and the padding that ggml's CUDA backend would add.

ggml allocates a quantized tensor on the GPU with room behind its last row: where a row's length ``ne0`` is no multiple
of 512 (MATRIX_ROW_PADDING), it adds the bytes of the values that are missing, since its kernels read up to there
(``ggml_backend_cuda_buffer_type_get_alloc_size`` in ggml-cuda.cu).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from qmm.cli.report import Report
from qmm.cli.tables import Block, Facts, Table, dimensions, mark, shortened
from qmm.errors import PatternError
from qmm.kernels.formats import FORMATS
from qmm.loaders.gguf.metadata import Metadata
from qmm.model import Model, Tensor

__all__ = [
    "InfoReport",
    "MetadataRow",
    "TensorRow",
    "TypeRow",
    "describe",
    "matching",
    "padding_nbytes",
]

MATRIX_ROW_PADDING = 512


def padding_nbytes(type_name: str, k: int) -> int:
    """Bytes that ggml's CUDA backend adds to a tensor with rows of ``k`` values; 0 for a type that gguf has not."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    missing = -k % MATRIX_ROW_PADDING
    if type_name not in GGMLQuantizationType.__members__:
        return 0
    values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return missing // values * nbytes if values > 1 else 0  # ggml_is_quantized: plain types have blocks of one value


def matching(model: Model, pattern: str) -> list[Tensor]:
    """The tensors whose names match a pattern as a shell matches, or are that very text.

    Raises:
        PatternError: none is, though the pattern is not ``*``.
    """
    found = [model[name] for name in model if name == pattern or fnmatchcase(name, pattern)]
    if not found and pattern != "*":
        raise PatternError(
            f"{model.path}: no tensor's name matches the pattern {pattern!r}; there are {len(model)} tensors. "
            f"`qmm info {model.path}` lists them."
        )
    return found


def describe(model: Model, pattern: str = "*", arrays: bool = False) -> InfoReport:
    """Describe a model. No weight is read.

    Args:
        model: an open model.
        pattern: of the names of tensors to list, as :func:`matching` takes it.
        arrays: whether to read the metadata's arrays, and its strings of more than 64 KiB.

    Raises:
        PatternError: there is no tensor to list.
    """
    listed = {tensor.name for tensor in matching(model, pattern)}
    tensors = [_row(tensor) for tensor in model.values()]
    metadata = model.metadata
    keys = []
    for key in metadata:
        kind = metadata.type_of(key)
        keys.append(MetadataRow(key, kind, metadata[key] if arrays or not metadata.in_file(key) else None))
    return InfoReport(
        file=str(model.path),
        files=tuple(map(str, model.files)),
        version=model.version,
        alignment=model.alignment,
        architecture=_text(metadata, "general.architecture"),
        name=_text(metadata, "general.name"),
        nbytes=model.nbytes,
        tensor_count=len(tensors),
        metadata=tuple(keys),
        tensors=tuple(row for row in tensors if row.name in listed),
        types=tuple(_summaries(tensors)),
    )


def _text(metadata: Metadata, key: str) -> str | None:
    """A string of the metadata; None for another type, or for a long string that was left in the file."""
    here = key in metadata and metadata.type_of(key) == "string" and not metadata.in_file(key)
    return str(metadata[key]) if here else None


def _row(tensor: Tensor) -> TensorRow:
    return TensorRow(
        name=tensor.name,
        type=tensor.type,
        shape=tensor.shape,
        nbytes=tensor.nbytes,
        offset=tensor.info.offset,
        file=str(tensor.info.path),
        supported=tensor.supported,
        padding_nbytes=padding_nbytes(tensor.type, tensor.k),
    )


def _summaries(rows: list[TensorRow]) -> Iterator[TypeRow]:
    """One row a type, that with the most bytes first."""
    by_type: dict[str, list[TensorRow]] = {}
    for row in rows:
        by_type.setdefault(row.type, []).append(row)
    for kind, same in sorted(by_type.items(), key=lambda item: -sum(row.nbytes for row in item[1])):
        yield TypeRow(
            type=kind,
            supported=kind in FORMATS,
            tensors=len(same),
            nbytes=sum(row.nbytes for row in same),
            padded_tensors=sum(row.padding_nbytes > 0 for row in same),
            padding_nbytes=sum(row.padding_nbytes for row in same),
        )


@dataclass(frozen=True)
class MetadataRow:
    """One key; ``value`` is None for an array or a long string that was not asked for."""

    key: str
    type: str
    value: Any


@dataclass(frozen=True)
class TensorRow:
    """One tensor; ``padding_nbytes`` is what ggml's CUDA backend would allocate behind it."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    file: str
    supported: bool
    padding_nbytes: int


@dataclass(frozen=True)
class TypeRow:
    """All tensors of one type."""

    type: str
    supported: bool
    tensors: int
    nbytes: int
    padded_tensors: int
    padding_nbytes: int


@dataclass(frozen=True)
class InfoReport(Report):
    """``qmm info``: ``tensors`` match the filter, ``types`` sums up all tensors."""

    command: ClassVar[str] = "info"
    file: str
    files: tuple[str, ...]
    version: int
    alignment: int
    architecture: str | None
    name: str | None
    nbytes: int
    tensor_count: int
    metadata: tuple[MetadataRow, ...]
    tensors: tuple[TensorRow, ...]
    types: tuple[TypeRow, ...]

    def blocks(self) -> Iterator[Block]:
        """The report for people."""
        yield Facts(
            [
                ("file", self.file if len(self.files) == 1 else f"{self.file} and {len(self.files) - 1} more"),
                ("model", f"{self.name or 'without a name'}, architecture {self.architecture or 'unknown'}"),
                ("GGUF", f"version {self.version}, alignment {self.alignment}"),
                ("tensors", f"{self.tensor_count}, {self.nbytes:,} bytes"),
            ]
        )
        keys = [(row.key, row.type, "-" if row.value is None else shortened(row.value)) for row in self.metadata]
        yield Table("metadata", ("~key", "type", "~value"), keys)
        yield Table(
            "tensors: padding is what ggml would allocate behind them on a GPU, in bytes",
            ("~name", "type", ">shape", ">bytes", ">offset", ">padding"),
            [
                (
                    row.name,
                    row.type,
                    dimensions(row.shape),
                    f"{row.nbytes:,}",
                    f"{row.offset:,}",
                    f"{row.padding_nbytes:,}" if row.padding_nbytes else "-",
                )
                for row in self.tensors
            ],
        )
        yield Table(
            "types",
            ("type", "kernels", ">tensors", ">bytes", ">padded", ">padding"),
            [
                (
                    row.type,
                    mark(row.supported),
                    row.tensors,
                    f"{row.nbytes:,}",
                    row.padded_tensors,
                    f"{row.padding_nbytes:,}",
                )
                for row in self.types
            ],
        )
        padded = sum(row.padded_tensors for row in self.types)
        extra = sum(row.padding_nbytes for row in self.types)
        yield (
            f"ggml's CUDA backend would allocate {extra:,} bytes of padding behind {padded} of {self.tensor_count} "
            "tensors (quantized rows that are no multiple of 512 values). qmm allocates none."
        )
