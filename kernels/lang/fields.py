"""Loads of a block's fields, the only operations by which formats read memory.

``block`` is where the block begins. In Python that is a buffer, or a number: an address of the process, or in the
emulator an address of a GPU. Compiled for the CPU it is an address of the process, of any alignment.

Compiled for a GPU it is an address of shared memory, where kernels stage the bytes of a row; or of global memory, for
kernels that read blocks where they lie. A target is told which of the two, and the alignment of fields (an n-byte
field lies at a multiple of n or of the alignment), which decides how wide the loads are:

=========  ==================================================  ==================================
alignment  ``load16`` from shared memory                       formats
=========  ==================================================  ==================================
16         one 16-byte load                                    Q4_K, Q5_K
4, 8       four 4-byte loads                                   Q2_K, Q4_1, Q5_1, F32
1, 2       five aligned 4-byte loads and four funnel shifts    Q8_0, Q3_K, Q6_K, Q4_0, Q5_0, F16
=========  ==================================================  ==================================

The five loads of the last line may touch up to three bytes before the field and four after it: bytes of the stage,
never of the tensor. From global memory just the field's bytes are loaded, as many at a time as the alignment allows.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, NamedTuple

import numpy as np
from greenlet import getcurrent

from qmm.kernels.lang.operation import operation

__all__ = ["DEFAULT_FIELDS", "HOW", "LOADS", "FieldAccess", "load1", "load16", "load2", "load4"]


ALIGNMENTS = 1, 2, 4, 8, 16
SPACES = "shared", "global"


class _FieldAccess(NamedTuple):  # which cannot have a constructor of its own
    alignment: int
    space: Literal["shared", "global"]


class FieldAccess(_FieldAccess):
    """How a GPU's kernel reads fields.

    Attributes:
        alignment: 1, 2, 4, 8 or 16; an n-byte field lies at a multiple of n or of this, whichever is smaller.
        space: ``"shared"`` or ``"global"``, the memory that blocks lie in.

    Raises:
        ValueError: they are others.
    """

    __slots__ = ()

    def __new__(cls, alignment: int, space: Literal["shared", "global"]) -> FieldAccess:
        """Check them: of another space, or at another alignment, kernels would compile to wrong loads."""
        if alignment not in ALIGNMENTS:
            raise ValueError(f"FieldAccess: the alignment is one of {ALIGNMENTS}, not {alignment!r}")
        if space not in SPACES:
            raise ValueError(f"FieldAccess: the space is one of {SPACES}, not {space!r}")
        return super().__new__(cls, alignment, space)


DEFAULT_FIELDS = FieldAccess(1, "shared")
"""For targets that do not ask."""
HOW = (
    'fields=FieldAccess(n, "global") for blocks in global memory, or FieldAccess(n, "shared") for blocks that the '
    "kernel has copied to shared memory; n is what their addresses divide by"
)
"""What kernels lack that load fields without a FieldAccess, for messages."""


def _field(block: Any, offset: int, nbytes: int) -> tuple[Any, int]:
    """A buffer and a field's offset in it."""
    if not isinstance(block, int):
        return block, offset
    lane = getcurrent()
    if hasattr(lane, "cta"):
        return lane.cta.field(block + offset, nbytes)
    return ctypes.string_at(block + offset, nbytes), 0


@operation("(int64, int64) -> Words")
def load16(block, offset):
    """The 16 bytes at ``block + offset``, at any alignment."""
    buffer, at = _field(block, offset, 16)
    return np.frombuffer(buffer, np.uint32, 4, at).copy()


@operation("(int64, int64) -> Word")
def load4(block, offset):
    """The 4 bytes at ``block + offset``, at any alignment."""
    buffer, at = _field(block, offset, 4)
    return np.frombuffer(buffer, np.uint32, 1, at)[0]


@operation("(int64, int64) -> Word")
def load2(block, offset):
    """The 2 bytes at ``block + offset``, the upper half of the word zero."""
    buffer, at = _field(block, offset, 2)
    return np.uint32(np.frombuffer(buffer, np.uint16, 1, at)[0])


@operation("(int64, int64) -> Word")
def load1(block, offset):
    """The byte at ``block + offset``, the rest of the word zero."""
    buffer, at = _field(block, offset, 1)
    return np.uint32(np.frombuffer(buffer, np.uint8, 1, at)[0])


@load16.cpu
def _(e, block, offset):
    return e.unaligned(block, offset, e.vector_type(e.i32, 4))


@load4.cpu
def _(e, block, offset):
    return e.unaligned(block, offset, e.i32)


@load2.cpu
def _(e, block, offset):
    return e.zext(e.unaligned(block, offset, e.i16), e.i32)


@load1.cpu
def _(e, block, offset):
    return e.zext(e.unaligned(block, offset, e.i8), e.i32)


@load16.cuda
def _(e, block, offset):
    address = e.add(block, offset)
    if e.fields.space == "global":
        return e.bitcast(_global_pieces(e, address, 16), e.vector_type(e.i32, 4))
    address = e.trunc(address, e.i32)
    if e.fields.alignment >= 16:
        return e.load(e.shared_pointer(address, e.vector_type(e.i32, 4)), align=16)
    if e.fields.alignment >= 4:
        return e.gathered([_shared(e, address, 4 * i, e.i32) for i in range(4)])
    base = e.and_(address, e.constant(e.i32, -4))
    aligned = [_shared(e, base, 4 * i, e.i32) for i in range(5)]
    return e.gathered([_funnel(e, aligned[i], aligned[i + 1], address) for i in range(4)])


@load4.cuda
def _(e, block, offset):
    address = e.add(block, offset)
    if e.fields.space == "global":
        return e.bitcast(_global_pieces(e, address, 4), e.i32)
    address = e.trunc(address, e.i32)
    if e.fields.alignment >= 4:
        return _shared(e, address, 0, e.i32)
    base = e.and_(address, e.constant(e.i32, -4))
    return _funnel(e, _shared(e, base, 0, e.i32), _shared(e, base, 4, e.i32), address)


@load2.cuda
def _(e, block, offset):
    address = e.add(block, offset)
    if e.fields.space == "global":
        return e.zext(e.bitcast(_global_pieces(e, address, 2), e.i16), e.i32)
    address = e.trunc(address, e.i32)
    if e.fields.alignment >= 2:
        return _shared(e, address, 0, e.i16)
    low, high = (_shared(e, address, i, e.i8) for i in (0, 1))
    return e.or_(low, e.shl(high, e.constant(e.i32, 8)))


@load1.cuda
def _(e, block, offset):
    address = e.add(block, offset)
    if e.fields.space == "global":
        return e.zext(e.bitcast(_global_pieces(e, address, 1), e.i8), e.i32)
    return _shared(e, e.trunc(address, e.i32), 0, e.i8)


def _global_pieces(e: Any, address: Any, nbytes: int) -> Any:
    """A field of global memory: a vector of pieces as wide as the alignment allows."""
    width = min(nbytes, e.fields.alignment, 4)
    kind = {1: e.i8, 2: e.i16, 4: e.i32}[width]
    if nbytes == e.fields.alignment == 16:
        return e.load(e.global_pointer(address, e.vector_type(kind, 4)), align=16)
    places = [e.add(address, e.constant(e.i64, at)) for at in range(0, nbytes, width)]
    return e.gathered([e.load(e.global_pointer(place, kind), align=width) for place in places])


def _shared(e: Any, address: Any, offset: int, kind: Any) -> Any:
    """A load from shared memory, as a word."""
    address = e.add(address, e.constant(e.i32, offset)) if offset else address
    loaded = e.load(e.shared_pointer(address, kind), align=kind.width // 8)
    return loaded if kind == e.i32 else e.zext(loaded, e.i32)


def _funnel(e: Any, low: Any, high: Any, address: Any) -> Any:
    """The four bytes that start at ``address & 3`` of two neighbouring registers."""
    shift = e.shl(address, e.constant(e.i32, 3))  # the instruction takes it modulo 32
    return e.ptx("shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", low, high, shift)


LOADS = frozenset({load1, load2, load4, load16})
"""The operations that need a FieldAccess on a GPU."""
