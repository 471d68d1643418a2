"""The CPU as a target: the primitives as LLVM vector code, and the few instructions that only the CPU schedule uses.

Nothing here names an instruction set. The integer product is written so that LLVM recognises a multiply-add of
neighbouring pairs (``vpmaddwd`` on x86-64), and everything else is plain vector arithmetic that any back end lowers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from qmm.kernels.lang import primitives
from qmm.kernels.lang.half import from_half, from_half_by_integers, has_instruction
from qmm.kernels.lang.vector import F32, I8, I16, I32, I64, Toolkit, define, splat, vector
from qmm.kernels.runtime.compiler import check_cpu, compiling

__all__ = [
    "CPU",
    "CPU_PRODUCTS",
    "CPUKernel",
    "dot_run",
    "fetch_add",
    "load_float",
    "load_floats",
    "multiply_add",
    "store_float",
    "store_floats",
    "sum_floats",
    "sum_partial",
    "zero_floats",
    "zero_partial",
]


def _from_half(builder: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    machine = cpu_target.target_context.codegen()._tm  # Numba says nowhere else what it compiles for
    return (from_half if has_instruction(machine) else from_half_by_integers)(builder, halves)


VECTORS, _INTRINSICS = define(
    Toolkit(
        types=types,
        intrinsic=extending.intrinsic,
        lower_builtin=extending.lower_builtin,
        register_model=extending.register_model,
        primitive_model=extending.models.PrimitiveModel,
        abstract_template=AbstractTemplate,
        infer_global=infer_global,
        signature=signature,
        multiply=lambda builder, a, b: builder.fmul(a, b),  # LLVM fuses nothing that was not marked for it
        from_half=_from_half,
    )
)
PARTIAL = VECTORS.make("Partial", vector(F32, 8))
"""Eight running sums of an integer product: one for each pair of weights of a run."""


class CPUKernel:
    """A function that is compiled at its first call, for arguments of these types.

    Raises:
        DeviceError: a setting of Numba forbids compiling.
    """

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher

    def __call__(self, *arguments: Any) -> None:
        """Run it."""
        # An address that is NumPy's uint64 would become a float64 when an offset is added to it.
        arguments = tuple([int(value) if isinstance(value, np.integer) else value for value in arguments])
        if not self._dispatcher.overloads:
            check_cpu()
            with compiling():
                self._dispatcher.compile(tuple(map(numba.typeof, arguments)))
        self._dispatcher(*arguments)


class CPUTarget:
    """Specializes kernels for the CPU that runs them.

    Args:
        fastmath: what LLVM may do to float arithmetic. Nothing, where results must be an oracle's bit for bit.
    """

    name = "cpu"

    def __init__(self, fastmath: Collection[str] = ()) -> None:
        self._options = {"error_model": "numpy", "nogil": True, "fastmath": set(fastmath)}

    def intrinsic(self, primitive: object) -> object | None:
        """The target's implementation of a primitive, or None."""
        return _INTRINSICS.get(primitive)

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that kernels call."""
        check_cpu()
        return numba.njit(**self._options)(function)

    def kernel(self, function: Callable[..., Any]) -> CPUKernel:
        """A function that Python calls."""
        return CPUKernel(self.device_function(function))


CPU = CPUTarget()
CPU_PRODUCTS = CPUTarget(("contract", "nsz", "reassoc"))
"""For products: a scale of the activations may be multiplied in where it is shared, which makes Q4_K 9% faster and Q6_K
3% (14336x4096 on a Zen 4 core). A NaN or an infinity stays one."""


def _address(builder: ir.IRBuilder, arguments: Any, carrier: ir.Type) -> ir.Value:
    """``arguments[0] + arguments[1]`` as a pointer; mapped blocks keep to no alignment."""
    return builder.inttoptr(builder.add(arguments[0], arguments[1]), carrier.as_pointer())


def _loader(primitive: Callable[..., Any] | None, result: Any, carrier: ir.Type, widen: bool = False) -> Any:
    @extending.intrinsic
    def load(typing_context, address, offset):
        def lower(context, builder, signature, arguments):
            value = builder.load(_address(builder, arguments, carrier))
            value.align = 1
            return builder.zext(value, I32) if widen else value

        return result(types.int64, types.int64), lower

    if primitive is not None:
        _INTRINSICS[primitive] = load
    return load


def _storer(value_type: Any, carrier: ir.Type) -> Any:
    @extending.intrinsic
    def store(typing_context, address, offset, value):
        def lower(context, builder, signature, arguments):
            builder.store(arguments[2], _address(builder, arguments, carrier)).align = 1
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value_type), lower

    return store


_loader(primitives.load16, VECTORS.words, vector(I32, 4))
_loader(primitives.load4, VECTORS.word, I32)
_loader(primitives.load2, VECTORS.word, I16, widen=True)
load1 = _loader(primitives.load1, VECTORS.word, I8, widen=True)
load_float = _loader(None, types.float32, F32)
load_floats = _loader(None, VECTORS.floats, vector(F32, 16))
store_float = _storer(types.float32, F32)
store_floats = _storer(VECTORS.floats, vector(F32, 16))


@extending.intrinsic
def store1(typing_context, address, offset, value):
    """Stores the low byte of a word."""

    def lower(context, builder, signature, arguments):
        builder.store(builder.trunc(arguments[2], I8), _address(builder, arguments, I8))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, VECTORS.word), lower


@extending.intrinsic
def fetch_add(typing_context, address, value):
    """Adds ``value`` to the int64 at ``address`` and returns what it was before, as one step for all threads."""

    def lower(context, builder, signature, arguments):
        address, value = arguments
        return builder.atomic_rmw("add", builder.inttoptr(address, I64.as_pointer()), value, "monotonic")

    return types.int64(types.int64, types.int64), lower


@extending.intrinsic
def _subtract_bytes(typing_context, words, value):
    def lower(context, builder, signature, arguments):
        words, value = arguments
        bytes16 = builder.bitcast(words, vector(I8, 16))
        return builder.bitcast(builder.sub(bytes16, splat(builder, builder.trunc(value, I8), 16)), vector(I32, 4))

    return VECTORS.words(VECTORS.words, types.int64), lower


@extending.intrinsic
def _spread_bits(typing_context, bits):
    def lower(context, builder, signature, arguments):
        # Byte i keeps bit i % 8 of its half of the 16 bits, and becomes 1 where that bit is set.
        each = builder.bitcast(splat(builder, builder.trunc(arguments[0], I16), 8), vector(I8, 16))
        low_then_high = ir.Constant(vector(I32, 16), [0] * 8 + [1] * 8)
        spread = builder.shuffle_vector(each, each, low_then_high)
        bit = ir.Constant(vector(I8, 16), [1 << (i % 8) for i in range(16)])
        is_set = builder.icmp_unsigned("!=", builder.and_(spread, bit), ir.Constant(vector(I8, 16), [0] * 16))
        return builder.bitcast(builder.zext(is_set, vector(I8, 16)), vector(I32, 4))

    return VECTORS.words(VECTORS.word), lower


def _byte_table(name: str, values: Sequence[int]) -> Any:
    """A byte as float32, looked up: one load, which the product with the block's ``d`` takes in, where a conversion
    moves the byte to a vector register first (a fifth of the time of Q6_K and an eighth of that of Q4_K, 14336x4096 on
    a Zen 4 core)."""

    @extending.intrinsic
    def look_up(typing_context, value):
        def lower(context, builder, signature, arguments):
            kind = ir.ArrayType(F32, 256)
            table = builder.module.globals.get(name)
            if table is None:
                table = ir.GlobalVariable(builder.module, kind, name)
                table.linkage = "internal"
                table.global_constant = True
                table.initializer = ir.Constant(kind, [float(value) for value in values])
            index = builder.zext(builder.trunc(arguments[0], I8), I64)
            return builder.load(builder.gep(table, [ir.Constant(I64, 0), index], inbounds=True))

        return types.float32(VECTORS.word), lower

    return look_up


_INTRINSICS[primitives.unsigned_byte] = _byte_table("qmm_unsigned_byte", range(256))
_INTRINSICS[primitives.signed_byte] = _byte_table("qmm_signed_byte", [*range(128), *range(-128, 0)])
_INTRINSICS[primitives.subtract_bytes] = _subtract_bytes
_INTRINSICS[primitives.spread_bits] = _spread_bits


def _zero(result: Any, count: int) -> Any:
    @extending.intrinsic
    def zero(typing_context):
        def lower(context, builder, signature, arguments):
            return ir.Constant(vector(F32, count), [0.0] * count)

        return result(), lower

    return zero


zero_partial = _zero(PARTIAL, 8)
zero_floats = _zero(VECTORS.floats, 16)


def _fused(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``a * b + c``, fused where the CPU has an instruction for it (``llvm.fma`` would call a library where not)."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


@extending.intrinsic
def dot_run(typing_context, total, q, x, scale):
    """``total + scale * (q . x)`` in eight lanes: the 16 signed bytes of a run by the 16 int16 at address ``x``."""

    def lower(context, builder, signature, arguments):
        total, q, x, scale = arguments
        wide = vector(I32, 16)
        load = builder.load(builder.inttoptr(x, vector(I16, 16).as_pointer()))
        load.align = 2
        # Through int16 on the way to int32: that is the shape LLVM turns into one multiply-add of pairs.
        weights = builder.sext(builder.sext(builder.bitcast(q, vector(I8, 16)), vector(I16, 16)), wide)
        products = builder.mul(weights, builder.sext(load, wide))
        undefined = ir.Constant(wide, ir.Undefined)
        even, odd = (ir.Constant(vector(I32, 8), list(range(start, 16, 2))) for start in (0, 1))
        pairs = builder.add(
            builder.shuffle_vector(products, undefined, even), builder.shuffle_vector(products, undefined, odd)
        )
        return _fused(builder, builder.sitofp(pairs, vector(F32, 8)), splat(builder, scale, 8), total)

    return PARTIAL(PARTIAL, VECTORS.words, types.int64, types.float32), lower


@extending.intrinsic
def multiply_add(typing_context, total, a, b):
    """``total + a * b`` in sixteen lanes."""

    def lower(context, builder, signature, arguments):
        total, a, b = arguments
        return _fused(builder, a, b, total)

    return VECTORS.floats(VECTORS.floats, VECTORS.floats, VECTORS.floats), lower


def _summer(value_type: Any, count: int) -> Any:
    @extending.intrinsic
    def total(typing_context, values):
        def lower(context, builder, signature, arguments):
            (values,) = arguments
            half = count // 2
            while half:
                undefined = ir.Constant(values.type, ir.Undefined)
                low, high = (
                    builder.shuffle_vector(values, undefined, ir.Constant(vector(I32, half), list(part)))
                    for part in (range(half), range(half, 2 * half))
                )
                values = builder.fadd(low, high)
                half //= 2
            return builder.extract_element(values, ir.Constant(I32, 0))

        return types.float32(value_type), lower

    return total


sum_partial = _summer(PARTIAL, 8)
sum_floats = _summer(VECTORS.floats, 16)
