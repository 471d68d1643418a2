"""Lookup tables of formats: bytes, or short rows of them, by their index.

A table is an operation, built from its values at the top of a format's file::

    values = table([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])

    def unpack(lane, d, nibbles):
        return ((values(nibbles & 0x0F0F0F0F), half(d), 0.0), (values((nibbles >> 4) & 0x0F0F0F0F), half(d), 0.0))

Compiled for a GPU, sixteen bytes or fewer are looked up in registers by byte permutes; larger tables lie in global
memory and are cached. On the CPU they are constants of the program.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from qmm.errors import EmulatorError
from qmm.kernels.lang.operation import Operation, operation

__all__ = ["table"]

SELECTED = 16
"""The most bytes that are looked up in registers."""


def table(values: npt.ArrayLike) -> Operation:
    """A lookup as an operation, whose result is sixteen bytes.

    Args:
        values: ``(entries,)`` int8, for an operation of sixteen indices, one in each byte of Words; or
            ``(entries, width)`` int8 with a width of 4 or 8, for an operation of ``16 / width`` indices, each a Word.
            Up to 256 entries in the first case, 65,536 in the second.

    The result of an index past the last entry is undefined, and on a GPU its read may fault: mask it in ``unpack``.
    In plain Python and in the emulator it raises an EmulatorError.

    Raises:
        ValueError: the values have another shape, or are not signed bytes.
    """
    rows = np.asarray(values)
    if rows.ndim not in (1, 2) or (rows.ndim == 2 and rows.shape[1] not in (4, 8)) or not rows.size:
        raise ValueError(f"a table is (entries,), (entries, 4) or (entries, 8), not {rows.shape}")
    if rows.dtype.kind not in "iu":
        raise ValueError(f"a table holds signed bytes, not {rows.dtype}: make it of whole numbers")
    if len(rows) > (256 if rows.ndim == 1 else 65536) or rows.min() < -128 or rows.max() > 127:
        raise ValueError(f"a table of {len(rows)} entries from {rows.min()} to {rows.max()}: too many, or no int8")
    content = rows.astype(np.int8)
    return _of_bytes(content) if content.ndim == 1 else _of_rows(content)


def _of_bytes(values: npt.NDArray[np.int8]) -> Operation:
    @operation("(Words) -> Words")
    def look_up(indices):
        return _entries(values, indices.view(np.uint8)).view(np.uint32)

    @look_up.cuda
    def _(e, indices):
        if len(values) <= SELECTED:
            filled = np.zeros(SELECTED, np.int8)
            filled[: len(values)] = values
            words = [e.constant(e.i32, int(word)) for word in filled.view(np.uint32)]
            return e.gathered([_selected(e, words, part) for part in e.parts(indices)])
        found = [e.load(place) for place in _places(e, values, _indices(e, indices), addrspace=1)]
        return e.bitcast(e.gathered(found), indices.type)

    @look_up.cpu
    def _(e, indices):
        found = [e.load(place) for place in _places(e, values, _indices(e, indices), addrspace=0)]
        return e.bitcast(e.gathered(found), indices.type)

    return look_up


def _of_rows(rows: npt.NDArray[np.int8]) -> Operation:
    """A lookup of rows of 4 or 8 bytes, with as many indices as give sixteen bytes."""
    words = rows.view(np.uint32 if rows.shape[1] == 4 else np.uint64).ravel()

    def joined(e: Any, indices: tuple[Any, ...], addrspace: int) -> Any:
        wide = [e.zext(index, e.i64) for index in indices]
        found = [e.load(place) for place in _places(e, words, wide, addrspace)]
        return e.bitcast(e.gathered(found), e.vector_type(e.i32, 4))

    if rows.shape[1] == 8:

        @operation("(Word, Word) -> Words")
        def look_up_pairs(first, second):
            return _entries(words, [first, second]).view(np.uint32)

        look_up_pairs.cuda(lambda e, *indices: joined(e, indices, 1))
        look_up_pairs.cpu(lambda e, *indices: joined(e, indices, 0))
        return look_up_pairs

    @operation("(Word, Word, Word, Word) -> Words")
    def look_up_quads(first, second, third, fourth):
        return _entries(words, [first, second, third, fourth])

    look_up_quads.cuda(lambda e, *indices: joined(e, indices, 1))
    look_up_quads.cpu(lambda e, *indices: joined(e, indices, 0))
    return look_up_quads


def _entries(values: npt.NDArray[Any], places: npt.ArrayLike) -> npt.NDArray[Any]:
    """The entries at these places, for the meanings."""
    indices = np.asarray(places, np.int64)
    if indices.max() >= len(values):
        raise EmulatorError(f"index {indices.max()} into a table of {len(values)} entries: mask it in unpack")
    return values[indices]


def _indices(e: Any, indices: Any) -> list[Any]:
    """The sixteen bytes of Words as 64-bit numbers."""
    return [e.zext(part, e.i64) for part in e.parts(e.bitcast(indices, e.vector_type(e.i8, 16)))]


def _places(e: Any, values: npt.NDArray[Any], indices: list[Any], addrspace: int) -> list[Any]:
    """Pointers to entries of a constant array of the module."""
    content = values.tobytes()
    name = f"qmm_table_{values.dtype.str[1:]}_{hashlib.sha256(content).hexdigest()[:16]}"
    unsigned = values.view(f"u{values.dtype.itemsize}")
    constant = e.table(name, e.integer(8 * values.dtype.itemsize), [int(value) for value in unsigned], addrspace)
    return [e.gep(constant, [e.constant(e.i64, 0), index], inbounds=True) for index in indices]


def _selected(e: Any, words: list[Any], indices: Any) -> Any:
    """Four bytes of the four words of a table, by indices of four bits in the bytes of a register.

    A byte permute takes one of eight bytes for each of four selectors of three bits, side by side in 16 bits.
    """
    low = e.and_(indices, e.constant(e.i32, 0x07070707))
    pairs = e.and_(e.or_(low, e.lshr(low, e.constant(e.i32, 4))), e.constant(e.i32, 0x00FF00FF))
    selectors = e.or_(pairs, e.lshr(pairs, e.constant(e.i32, 8)))
    first, second = (
        e.ptx("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", *words[i : i + 2], e.and_(selectors, e.constant(e.i32, 0x7777)))
        for i in (0, 2)
    )
    upper = e.and_(e.lshr(indices, e.constant(e.i32, 3)), e.constant(e.i32, 0x01010101))
    mask = e.mul(upper, e.constant(e.i32, 0xFF))
    return e.or_(e.and_(second, mask), e.and_(first, e.not_(mask)))
