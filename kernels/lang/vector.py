"""The values of :mod:`qmm.kernels.lang.primitives` as Numba types, and those primitives that are the same LLVM
everywhere.

Numba for the CPU and numba-cuda keep separate registries of types and operators, so everything here is a function of a
:class:`Toolkit`, the handful of names that a registration needs from either. LLVM's own vectors carry the values: the
CPU's back end turns ``<4 x i32>`` into one register, the GPU's into four.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from llvmlite import ir

from qmm.kernels.lang import primitives
from qmm.kernels.lang.half import from_half

__all__ = ["I8", "I16", "I32", "I64", "F32", "Toolkit", "VectorTypes", "define", "splat", "vector"]

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F16 = ir.FloatType(), ir.HalfType()

OPERATORS = {
    operator.and_: "and_",
    operator.or_: "or_",
    operator.xor: "xor",
    operator.lshift: "shl",
    operator.rshift: "lshr",
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
}


@dataclass(frozen=True)
class Toolkit:
    """Where one target of Numba keeps its extension points."""

    types: ModuleType
    intrinsic: Callable[..., Any]
    lower_builtin: Callable[..., Any]
    register_model: Callable[..., Any]
    primitive_model: type
    abstract_template: type
    infer_global: Callable[..., Any]
    signature: Callable[..., Any]
    multiply: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
    """The product of two ``<16 x float>`` that the compiler may not fuse with the sum it goes into."""
    from_half: Callable[[ir.IRBuilder, ir.Value], ir.Value] = from_half
    """The float32 of a ``half``, or of a vector of them."""


@dataclass(frozen=True)
class VectorTypes:
    """The Numba types of one target."""

    word: Any
    words: Any
    floats: Any
    make: Callable[[str, ir.Type], Any]
    """Makes a further type, carried by the given LLVM type, without operators."""


def vector(element: ir.Type, count: int) -> ir.VectorType:
    """The LLVM vector of ``count`` elements."""
    return ir.VectorType(element, count)


def splat(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    """A vector that holds ``value`` ``count`` times."""
    undefined = ir.Constant(vector(value.type, count), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(vector(I32, count), [0] * count))


def join(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two vectors end to end."""
    count = 2 * low.type.count
    return builder.shuffle_vector(low, high, ir.Constant(vector(I32, count), list(range(count))))


def define(toolkit: Toolkit) -> tuple[VectorTypes, dict[object, object]]:
    """Registers types and operators with a target; returns them, and the intrinsics by the primitive they replace."""
    types = _register_types(toolkit)
    _register_operators(toolkit, types)
    return types, _common_intrinsics(toolkit, types)


def _register_types(toolkit: Toolkit) -> VectorTypes:
    class Register(toolkit.types.Type):  # type: ignore[name-defined]
        def __init__(self, name: str, carrier: ir.Type) -> None:
            self.carrier = carrier
            super().__init__(name)

    @toolkit.register_model(Register)
    class _RegisterModel(toolkit.primitive_model):  # type: ignore[name-defined]
        def __init__(self, manager: Any, register: Any) -> None:
            super().__init__(manager, register, register.carrier)

    return VectorTypes(
        word=Register("Word", I32),
        words=Register("Words", vector(I32, 4)),
        floats=Register("Floats", vector(F32, 16)),
        make=Register,
    )


def _register_operators(toolkit: Toolkit, types: VectorTypes) -> None:
    integer = toolkit.types.Integer
    register = type(types.word)
    for function, instruction in OPERATORS.items():

        class Template(toolkit.abstract_template):  # type: ignore[name-defined]
            def generic(self, arguments: Any, keywords: Any) -> Any:
                left, right = arguments
                if left in (types.word, types.words):
                    if right in (left, types.word):
                        return toolkit.signature(left, left, right)
                    if isinstance(right, integer):
                        return toolkit.signature(left, left, toolkit.types.int64)
                return None

        toolkit.infer_global(function)(Template)

        def lower(context: Any, builder: Any, signature: Any, arguments: Any, instruction: str = instruction) -> Any:
            left, right = arguments
            if signature.args[1] == toolkit.types.int64:
                right = builder.trunc(right, I32)
            if right.type != left.type:
                right = splat(builder, right, 4)
            return getattr(builder, instruction)(left, right)

        toolkit.lower_builtin(function, register, register)(lower)
        toolkit.lower_builtin(function, register, integer)(lower)


def _common_intrinsics(toolkit: Toolkit, types: VectorTypes) -> dict[object, object]:
    numba_types = toolkit.types
    float32, int64 = numba_types.float32, numba_types.int64

    @toolkit.intrinsic
    def word(typing_context, words, index):
        def lower(context, builder, signature, arguments):
            return builder.extract_element(arguments[0], builder.trunc(arguments[1], I32))

        return types.word(types.words, int64), lower

    @toolkit.intrinsic
    def half(typing_context, bits):
        def lower(context, builder, signature, arguments):
            return toolkit.from_half(builder, builder.bitcast(builder.trunc(arguments[0], I16), F16))

        return float32(types.word), lower

    @toolkit.intrinsic
    def run_weights(typing_context, q, scale, minimum):
        def plain(context, builder, signature, arguments):
            return arguments[0]

        def lower(context, builder, signature, arguments):
            q, scale, minimum = arguments
            values = builder.sitofp(builder.bitcast(q, vector(I8, 16)), vector(F32, 16))
            products = toolkit.multiply(builder, values, splat(builder, scale, 16))
            return builder.fsub(products, splat(builder, minimum, 16))

        if q == types.floats:
            return types.floats(types.floats, float32, float32), plain
        return types.floats(types.words, float32, float32), lower

    @toolkit.intrinsic
    def half_floats(typing_context, low, high):
        def lower(context, builder, signature, arguments):
            halves = [builder.bitcast(part, vector(F16, 8)) for part in arguments]
            return toolkit.from_half(builder, join(builder, *halves))

        return types.floats(types.words, types.words), lower

    @toolkit.intrinsic
    def bfloat_floats(typing_context, low, high):
        def lower(context, builder, signature, arguments):
            halves = join(builder, *[builder.bitcast(part, vector(I16, 8)) for part in arguments])
            bits = builder.shl(builder.zext(halves, vector(I32, 16)), ir.Constant(vector(I32, 16), [16] * 16))
            return builder.bitcast(bits, vector(F32, 16))

        return types.floats(types.words, types.words), lower

    @toolkit.intrinsic
    def float_floats(typing_context, a, b, c, d):
        def lower(context, builder, signature, arguments):
            a, b, c, d = arguments
            return builder.bitcast(join(builder, join(builder, a, b), join(builder, c, d)), vector(F32, 16))

        return types.floats(*[types.words] * 4), lower

    @toolkit.intrinsic
    def masked(typing_context, values, count):
        def lower(context, builder, signature, arguments):
            values, count = arguments
            index = ir.Constant(vector(I32, 16), list(range(16)))
            keep = builder.icmp_signed("<", index, splat(builder, builder.trunc(count, I32), 16))
            return builder.select(keep, values, ir.Constant(vector(F32, 16), [0.0] * 16))

        return types.floats(types.floats, int64), lower

    made = (word, half, run_weights, half_floats, bfloat_floats, float_floats, masked)
    return {getattr(primitives, intrinsic._name): intrinsic for intrinsic in made}
