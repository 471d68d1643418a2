"""A model: the tensors of a GGUF file or of split files, and their mappings."""

from __future__ import annotations

import difflib
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from qmm.errors import ClosedError, CopyError, GGUFError, MappingError, TensorNotFoundError, UnsupportedTypeError
from qmm.kernels.formats import FORMATS, Format
from qmm.loaders.closing import Closing
from qmm.loaders.files import KnownFile
from qmm.loaders.gguf.index import GGUFIndex, TensorInfo, read_model
from qmm.loaders.gguf.metadata import Metadata
from qmm.loaders.mapping import FileMapping
from qmm.tracing import outside, untraced, watched

__all__ = ["Model", "Tensor", "open_model"]


@untraced
def open_model(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Model:
    """Index and map a GGUF model. It takes milliseconds, and no weight byte is read.

    Args:
        path: the file; of a split model any of its files.

    Raises:
        FileMissingError: there is no such file. It is a GGUFError and a FileNotFoundError.
        FileAccessError: it cannot be opened for another reason. It is a GGUFError and an OSError.
        GGUFError: ``path`` is no path, or the file is damaged, cut short, big endian or of an unknown version.
        MappingError: it cannot be mapped.
    """
    if watched():
        model: Model = outside(open_model)(path)
        return model
    if not isinstance(path, str | bytes | os.PathLike):
        raise GGUFError(
            f"a model is opened by its path, a str, bytes or os.PathLike, not by {path!r}; qmm.Engine also takes an "
            "open model"
        )
    index, files = read_model(path)
    model = Model(index)
    del files  # open until here, so that the files mapped are the files read, even if they were renamed
    return model


class Tensor:
    """One tensor of an open model: its description, and its bytes in the mapping. Copying it returns itself."""

    def __init__(self, model: Model, info: TensorInfo) -> None:
        self.model = model
        self.info = info

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.info.name

    @property
    def type(self) -> str:
        """ggml's name of its block type, such as ``"Q4_K"``."""
        return self.info.type

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major; ``(m, k)`` for a matrix."""
        return self.info.shape

    @property
    def m(self) -> int:
        """Rows: the product of all dimensions but the last."""
        return self.info.m

    @property
    def k(self) -> int:
        """Weights a row."""
        return self.info.k

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.info.nbytes

    @property
    def format(self) -> Format:
        """The block format that its bytes are in.

        Raises:
            UnsupportedTypeError: qmm has no kernel for it.
        """
        known = FORMATS.get(self.type)
        if known is None:
            raise UnsupportedTypeError(
                f"{self.info.path}: tensor {self.name!r} is of type {self.type}, which qmm has no kernel for; it has "
                f"{', '.join(FORMATS)}. The file's other tensors can be used."
            )
        return known

    @property
    def supported(self) -> bool:
        """Whether qmm can multiply by it."""
        return self.type in FORMATS

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """Its bytes in the mapping: ``(nbytes,)`` uint8, read-only, no copy. Valid for as long as it is held and the
        file stays as it is: the operating system ends a process (SIGBUS) that reads a truncated part of a file.

        Raises:
            ClosedError: the model was closed.
            MappingError: the file changed since it was mapped.
        """
        mapping = self.model.mapping(self.info.path)
        mapping.check()
        return mapping.view(self.info.offset if self.nbytes else 0, self.nbytes)

    def __copy__(self) -> Tensor:
        return self

    def __deepcopy__(self, memo: object) -> Tensor:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CopyError(
            f"{self!r} cannot be pickled: its bytes are in a mapping of this process. Open the model in the worker: "
            f"qmm.open({str(self.model.path)!r})[{self.name!r}]"
        )

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"<Tensor {self.name!r}: {shape} {self.type}, {self.nbytes} bytes>"


class Model(Closing, Mapping[str, Tensor]):
    """The tensors of a model by name, in file order. A context manager. Copying it returns itself.

    Engines have their own handles on the mappings: a model may be closed before them.
    """

    def __init__(self, index: GGUFIndex) -> None:
        self._index = index
        self._mappings: dict[Path, FileMapping] = {}
        self._tensors: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self._closed = False
        try:
            for file in index.known:
                self._mappings[file.path] = FileMapping.of(file.open(MappingError))
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The file that was opened."""
        return self._index.path

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the model, in order."""
        return self._index.files

    @property
    def known(self) -> tuple[KnownFile, ...]:
        """Every file of the model in order, and which file that was."""
        return self._index.known

    @property
    def metadata(self) -> Metadata:
        """The file's key/value pairs; arrays are read on access."""
        return self._index.metadata

    @property
    def version(self) -> int:
        """GGUF version."""
        return self._index.version

    @property
    def alignment(self) -> int:
        """The alignment of tensors' offsets, in bytes."""
        return self._index.alignment

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._index.tensors.values())

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def mapping(self, path: Path) -> FileMapping:
        """The mapping of one of the model's files.

        Raises:
            ClosedError: the model was closed.
        """
        if self._closed:
            raise ClosedError(f"{self.path}: the model was closed. Open it again with qmm.open.")
        return self._mappings[path]

    def close(self) -> None:
        """Release the mappings. Closing twice is harmless."""
        self._closed = True
        for mapping in self._mappings.values():
            mapping.close()

    def __copy__(self) -> Model:
        return self

    def __deepcopy__(self, memo: object) -> Model:
        return self

    def _why_not_copied(self) -> str:
        return f"pickled: it is a mapping of this process. Open it in the worker: qmm.open({str(self.path)!r})"

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name: the same object for as long as somebody, such as an engine, holds it.

        Raises:
            TensorNotFoundError: there is none; the message suggests similar names.
        """
        held = self._tensors.get(name)
        if held is not None:
            return held
        info = self._index.tensors.get(name)
        if info is None:
            similar = difflib.get_close_matches(str(name), self._index.tensors, n=3)
            advice = (
                f"Did you mean {' or '.join(map(repr, similar))}?" if similar else f"`qmm info {self.path}` lists them."
            )
            raise TensorNotFoundError(
                f"{self.path}: has no tensor {name!r} among its {len(self._index.tensors)}. {advice}"
            )
        return self._tensors.setdefault(name, Tensor(self, info))

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.tensors)

    def __len__(self) -> int:
        return len(self._index.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._index.tensors

    def __repr__(self) -> str:
        return f"<Model {self.path}: {len(self)} tensors, {self.nbytes} bytes{', closed' if self._closed else ''}>"
