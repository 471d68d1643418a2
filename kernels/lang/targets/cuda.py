"""The GPU as a target: how the fields of a block are read, and the primitives that PTX does its own way.

Block fields are read from shared memory, where the schedules stage the bytes of a row; addresses there are the 32-bit
shared-window addresses that ``ld.shared`` takes, kept in int64 like every other number of a kernel. How wide a field
may be read depends on what its offset divides by, so :class:`CUDATarget` is made for an alignment:

=========  ==================================================  ==================================
alignment  ``load16``                                          formats
=========  ==================================================  ==================================
16         one 16-byte load                                    Q4_K, Q5_K
4, 8       four 4-byte loads                                   Q2_K, Q4_1, Q5_1, F32
1, 2       five aligned 4-byte loads and four funnel shifts    Q8_0, Q3_K, Q6_K, Q4_0, Q5_0, F16
=========  ==================================================  ==================================

The five loads of the last line may touch up to three bytes before the field and four after it: bytes of the stage,
never of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import intrinsic

from qmm.kernels.lang import primitives
from qmm.kernels.lang.ptx import COMMON, VECTORS, assembly, shared_pointer, words_of
from qmm.kernels.lang.vector import F32, I8, I16, I32, splat, vector

__all__ = ["CUDATarget"]


def _shared(builder: ir.IRBuilder, arguments: Any) -> ir.Value:
    """``arguments[0] + arguments[1]`` as a shared-window address."""
    return builder.trunc(builder.add(arguments[0], arguments[1]), I32)


def _load_shared(builder: ir.IRBuilder, address: ir.Value, suffix: str) -> ir.Value:
    kind = {"u8": I8, "u16": I16, "u32": I32}[suffix]
    loaded = builder.load(shared_pointer(builder, address, kind), align=kind.width // 8)
    return loaded if kind == I32 else builder.zext(loaded, I32)


def _make_load16(alignment: int) -> Any:
    @intrinsic
    def load16(typing_context, address, offset):
        def lower(context, builder, signature, arguments):
            address = _shared(builder, arguments)
            if alignment >= 16:
                return builder.load(shared_pointer(builder, address, vector(I32, 4)), align=16)
            base = address if alignment >= 4 else builder.and_(address, ir.Constant(I32, -4))
            count = 4 if alignment >= 4 else 5
            aligned = [_load_shared(builder, builder.add(base, ir.Constant(I32, 4 * i)), "u32") for i in range(count)]
            if alignment >= 4:
                return words_of(builder, aligned)
            return words_of(builder, [_funnel(builder, aligned[i], aligned[i + 1], address) for i in range(4)])

        return VECTORS.words(types.int64, types.int64), lower

    return load16


def _funnel(builder: ir.IRBuilder, low: ir.Value, high: ir.Value, address: ir.Value) -> ir.Value:
    """The four bytes that start at ``address & 3`` of two neighbouring registers."""
    shift = builder.shl(address, ir.Constant(I32, 3))  # modulo 32 is the instruction's own
    return assembly(builder, I32, "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift])


def _make_load4(alignment: int) -> Any:
    @intrinsic
    def load4(typing_context, address, offset):
        def lower(context, builder, signature, arguments):
            address = _shared(builder, arguments)
            if alignment >= 4:
                return _load_shared(builder, address, "u32")
            base = builder.and_(address, ir.Constant(I32, -4))
            low = _load_shared(builder, base, "u32")
            high = _load_shared(builder, builder.add(base, ir.Constant(I32, 4)), "u32")
            return _funnel(builder, low, high, address)

        return VECTORS.word(types.int64, types.int64), lower

    return load4


def _make_load2(alignment: int) -> Any:
    @intrinsic
    def load2(typing_context, address, offset):
        def lower(context, builder, signature, arguments):
            address = _shared(builder, arguments)
            if alignment >= 2:
                return _load_shared(builder, address, "u16")
            low = _load_shared(builder, address, "u8")
            high = _load_shared(builder, builder.add(address, ir.Constant(I32, 1)), "u8")
            return builder.or_(low, builder.shl(high, ir.Constant(I32, 8)))

        return VECTORS.word(types.int64, types.int64), lower

    return load2


@intrinsic
def _load1(typing_context, address, offset):
    def lower(context, builder, signature, arguments):
        return _load_shared(builder, _shared(builder, arguments), "u8")

    return VECTORS.word(types.int64, types.int64), lower


@intrinsic
def _subtract_bytes(typing_context, words, value):
    def lower(context, builder, signature, arguments):
        # The top bit, set, takes the borrow that would otherwise reach the next byte.
        words, value = arguments
        top = ir.Constant(vector(I32, 4), [0x80808080] * 4)
        each = builder.mul(builder.trunc(value, I32), ir.Constant(I32, 0x01010101))
        return builder.xor(builder.sub(builder.or_(words, top), splat(builder, each, 4)), top)

    return VECTORS.words(VECTORS.words, types.int64), lower


@intrinsic
def _spread_bits(typing_context, bits):
    def lower(context, builder, signature, arguments):
        # 0x00204081 copies bit i of a nibble to bit 8 i, among others that the mask takes away.
        (bits,) = arguments
        spread = []
        for i in range(4):
            nibble = builder.and_(builder.lshr(bits, ir.Constant(I32, 4 * i)), ir.Constant(I32, 15))
            copies = builder.mul(nibble, ir.Constant(I32, 0x00204081))
            spread.append(builder.and_(copies, ir.Constant(I32, 0x01010101)))
        return words_of(builder, spread)

    return VECTORS.words(VECTORS.word), lower


@intrinsic
def _unsigned_byte(typing_context, value):
    def lower(context, builder, signature, arguments):
        return builder.uitofp(builder.and_(arguments[0], ir.Constant(I32, 0xFF)), F32)

    return types.float32(VECTORS.word), lower


@intrinsic
def _signed_byte(typing_context, value):
    def lower(context, builder, signature, arguments):
        return builder.sitofp(builder.trunc(arguments[0], I8), F32)

    return types.float32(VECTORS.word), lower


class CUDATarget:
    """Specializes kernels for the GPU, with block fields that keep to ``alignment`` bytes."""

    name = "cuda"

    def __init__(self, alignment: int) -> None:
        self._intrinsics = {
            **COMMON,
            primitives.load16: _make_load16(alignment),
            primitives.load4: _make_load4(alignment),
            primitives.load2: _make_load2(alignment),
            primitives.load1: _load1,
            primitives.subtract_bytes: _subtract_bytes,
            primitives.spread_bits: _spread_bits,
            primitives.unsigned_byte: _unsigned_byte,
            primitives.signed_byte: _signed_byte,
        }

    def intrinsic(self, primitive: object) -> object | None:
        """The target's implementation of a primitive, or None."""
        return self._intrinsics.get(primitive)

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that kernels call."""
        return cuda.jit(device=True)(function)
