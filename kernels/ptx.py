"""The machine operations of the CUDA schedules, as inline PTX: where a thread is, memory, arithmetic, the warp.

Only :func:`copy16` and the edge copies ever read a tensor.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import core_models, intrinsic, lower_builtin, register_model
from numba.cuda.typing.templates import AbstractTemplate, infer_global, signature

from qmm.kernels.vector import F32, I8, I16, I32, I64, Toolkit, define, vector

__all__ = [
    "COMMON",
    "VECTORS",
    "assembly",
    "block_count",
    "block_index",
    "commit",
    "copy16",
    "copy_edge1",
    "copy_edge2",
    "copy_edge4",
    "divide",
    "dot16",
    "dot_floats",
    "lane_index",
    "largest_of_warp",
    "load_bfloat",
    "load_byte",
    "load_float",
    "load_global16",
    "load_half",
    "load_past_l1",
    "power_of_two_below",
    "quad",
    "round_to_int",
    "shared_memory",
    "store_bfloat",
    "store_byte",
    "store_float",
    "store_half",
    "store_part",
    "store_run",
    "store_word",
    "sum_of_half_warp",
    "sum_of_warp",
    "synchronize_warp",
    "thread_index",
    "wait",
    "words_of",
    "zero_words",
]

VOID = ir.VoidType()


def assembly(
    builder: ir.IRBuilder,
    result: ir.Type,
    text: str,
    constraints: str,
    arguments: list[ir.Value],
    volatile: bool = False,
) -> ir.Value:
    """Emits inline PTX; ``volatile`` where it does more than compute its result."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    if volatile:
        constraints += ("," if constraints else "") + "~{memory}"
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=volatile), arguments)


def _multiply(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Sixteen products, each rounded: without the explicit rounding both compilers would fuse them with the sum."""
    products = ir.Constant(vector(F32, 16), ir.Undefined)
    for i in range(16):
        parts = [builder.extract_element(side, ir.Constant(I32, i)) for side in (a, b)]
        product = assembly(builder, F32, "mul.rn.f32 $0, $1, $2;", "=f,f,f", parts)
        products = builder.insert_element(products, product, ir.Constant(I32, i))
    return products


VECTORS, COMMON = define(
    Toolkit(
        types=types,
        intrinsic=intrinsic,
        lower_builtin=lower_builtin,
        register_model=register_model,
        primitive_model=core_models.PrimitiveModel,
        abstract_template=AbstractTemplate,
        infer_global=infer_global,
        signature=signature,
        multiply=_multiply,
    )
)


def words_of(builder: ir.IRBuilder, registers: list[ir.Value]) -> ir.Value:
    """Four registers as Words."""
    value = ir.Constant(vector(I32, 4), ir.Undefined)
    for index, register in enumerate(registers):
        value = builder.insert_element(value, register, ir.Constant(I32, index))
    return value


def quad(builder: ir.IRBuilder, text: str, address: ir.Value, volatile: bool = False) -> ir.Value:
    """A load of four registers as Words."""
    kind = ir.LiteralStructType([I32] * 4)
    letter = "l" if address.type == I64 else "r"
    loaded = assembly(builder, kind, text, f"=r,=r,=r,=r,{letter}", [address], volatile)
    return words_of(builder, [builder.extract_value(loaded, i) for i in range(4)])


# ---------------------------------------------------------------------------------------------------------------------
# Where a thread is
# ---------------------------------------------------------------------------------------------------------------------


def _special_register(register: str) -> Any:
    @intrinsic
    def read(typing_context):
        def lower(context, builder, signature, arguments):
            return builder.zext(assembly(builder, I32, f"mov.u32 $0, %{register};", "=r", []), I64)

        return types.int64(), lower

    return read


lane_index = _special_register("laneid")
thread_index = _special_register("tid.x")
block_index = _special_register("ctaid.x")
block_count = _special_register("nctaid.x")


@intrinsic
def shared_memory(typing_context):
    """The shared-window address of the launch's dynamic shared memory, aligned to a line of 128 bytes."""

    def lower(context, builder, signature, arguments):
        name = "qmm_shared"
        if name not in builder.module.globals:
            memory = ir.GlobalVariable(builder.module, ir.ArrayType(I8, 0), name, addrspace=3)
            memory.linkage = "external"
            memory.align = 128
        return builder.zext(builder.ptrtoint(builder.module.globals[name], I32), I64)

    return types.int64(), lower


# ---------------------------------------------------------------------------------------------------------------------
# Memory of the tensor: the asynchronous copy, and the edges it may not touch
# ---------------------------------------------------------------------------------------------------------------------


@intrinsic
def copy16(typing_context, target, source):
    """Starts copying 16 bytes from global to shared memory, both 16-byte aligned, past L1 (sm_80 and later)."""

    def lower(context, builder, signature, arguments):
        target, source = arguments
        text = "cp.async.cg.shared.global [$0], [$1], 16;"
        assembly(builder, VOID, text, "r,l", [builder.trunc(target, I32), source], volatile=True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), lower


def _edge_copier(nbytes: int) -> Any:
    register, carrier, letter = {1: ("b8", I16, "h"), 2: ("b16", I16, "h"), 4: ("b32", I32, "r")}[nbytes]

    @intrinsic
    def copy(typing_context, target, source):
        def lower(context, builder, signature, arguments):
            target, source = arguments
            value = assembly(builder, carrier, f"ld.global.{register} $0, [$1];", f"={letter},l", [source], True)
            place = builder.trunc(target, I32)
            assembly(builder, VOID, f"st.shared.{register} [$0], $1;", f"r,{letter}", [place, value], True)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), lower

    return copy


copy_edge1 = _edge_copier(1)
copy_edge2 = _edge_copier(2)
copy_edge4 = _edge_copier(4)


def _statement(text: str) -> Any:
    @intrinsic
    def execute(typing_context):
        def lower(context, builder, signature, arguments):
            assembly(builder, VOID, text, "", [], volatile=True)
            return context.get_dummy_value()

        return types.void(), lower

    return execute


commit = _statement("cp.async.commit_group;")
synchronize_warp = _statement("bar.warp.sync 0xffffffff;")


def wait(groups: int) -> Any:
    """A function that waits until at most ``groups`` of the thread's committed copies are still under way."""
    return _statement(f"cp.async.wait_group {groups};")


# ---------------------------------------------------------------------------------------------------------------------
# Activations and results: ordinary global memory of qmm's own
# ---------------------------------------------------------------------------------------------------------------------


@intrinsic
def load_global16(typing_context, address):
    """16 bytes of global memory that no thread writes during the kernel, at a multiple of 16."""

    def lower(context, builder, signature, arguments):
        return quad(builder, "ld.global.nc.v4.u32 {$0, $1, $2, $3}, [$4];", arguments[0])

    return VECTORS.words(types.int64), lower


@intrinsic
def load_past_l1(typing_context, address):
    """16 bytes of global memory, at a multiple of 16, that take no room in L1: for what is read once."""

    def lower(context, builder, signature, arguments):
        return quad(builder, "ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4];", arguments[0])

    return VECTORS.words(types.int64), lower


@intrinsic
def zero_words(typing_context):
    """Sixteen bytes of zeros."""

    def lower(context, builder, signature, arguments):
        return ir.Constant(vector(I32, 4), [0] * 4)

    return VECTORS.words(), lower


def _global_loader(suffix: str, result: Any, carrier: ir.Type, letter: str, convert: Any = None) -> Any:
    @intrinsic
    def load(typing_context, address):
        def lower(context, builder, signature, arguments):
            value = assembly(builder, carrier, f"ld.global.nc.{suffix} $0, [$1];", f"={letter},l", [arguments[0]])
            return convert(builder, value) if convert else value

        return result(types.int64), lower

    return load


def _from_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.fpext(builder.bitcast(value, ir.HalfType()), F32)


def _from_bfloat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return builder.bitcast(builder.shl(builder.zext(value, I32), ir.Constant(I32, 16)), F32)


load_float = _global_loader("f32", types.float32, F32, "f")
load_byte = _global_loader("u8", types.int64, I32, "r", lambda builder, value: builder.zext(value, I64))
load_half = _global_loader("b16", types.float32, I16, "h", _from_half)
load_bfloat = _global_loader("b16", types.float32, I16, "h", _from_bfloat)


def _global_storer(suffix: str, value_type: Any, letter: str, convert: Any = None) -> Any:
    @intrinsic
    def store(typing_context, address, value):
        def lower(context, builder, signature, arguments):
            address, value = arguments
            value = convert(builder, value) if convert else value
            assembly(builder, VOID, f"st.global.{suffix} [$0], $1;", f"l,{letter}", [address, value], True)
            return context.get_dummy_value()

        return types.void(types.int64, value_type), lower

    return store


def _to_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return assembly(builder, I16, "cvt.rn.f16.f32 $0, $1;", "=h,f", [value])


def _to_bfloat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return assembly(builder, I16, "cvt.rn.bf16.f32 $0, $1;", "=h,f", [value])


store_float = _global_storer("f32", types.float32, "f")
store_half = _global_storer("b16", types.float32, "h", _to_half)
store_bfloat = _global_storer("b16", types.float32, "h", _to_bfloat)
store_byte = _global_storer("b8", types.int64, "h", lambda builder, value: builder.trunc(value, I16))


store_word = _global_storer("b32", VECTORS.word, "r")


@intrinsic
def store_run(typing_context, address, values):
    """Stores the 16 weights of a run at a multiple of 16 bytes."""

    def lower(context, builder, signature, arguments):
        address, values = arguments
        for i in range(0, 16, 4):
            parts = [builder.extract_element(values, ir.Constant(I32, i + j)) for j in range(4)]
            place = builder.add(address, ir.Constant(I64, 4 * i))
            text = "st.global.v4.f32 [$0], {$1, $2, $3, $4};"
            assembly(builder, VOID, text, "l,f,f,f,f", [place, *parts], volatile=True)
        return context.get_dummy_value()

    return types.void(types.int64, VECTORS.floats), lower


@intrinsic
def store_part(typing_context, address, values, count):
    """Stores the first ``count`` weights of a run, at a multiple of 4 bytes."""

    def lower(context, builder, signature, arguments):
        address, values, count = arguments
        for i in range(16):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(I64, i), count)):
                place = builder.add(address, ir.Constant(I64, 4 * i))
                value = builder.extract_element(values, ir.Constant(I32, i))
                assembly(builder, VOID, "st.global.f32 [$0], $1;", "l,f", [place, value], volatile=True)
        return context.get_dummy_value()

    return types.void(types.int64, VECTORS.floats, types.int64), lower


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@intrinsic
def dot16(typing_context, a, b):
    """The product of 16 signed bytes by 16 signed bytes, as float32 (exact: it stays below 2**19)."""

    def lower(context, builder, signature, arguments):
        a, b = arguments
        total: ir.Value = ir.Constant(I32, 0)
        for i in range(4):
            parts = [builder.extract_element(side, ir.Constant(I32, i)) for side in (a, b)]
            total = assembly(builder, I32, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [*parts, total])
        return builder.sitofp(total, F32)

    return types.float32(VECTORS.words, VECTORS.words), lower


@intrinsic
def dot_floats(typing_context, a, b):
    """The product of 16 floats by 16 floats, fused, in two chains."""

    def lower(context, builder, signature, arguments):
        a, b = arguments
        chains: list[ir.Value] = [ir.Constant(F32, 0.0)] * 2
        for i in range(16):
            parts = [builder.extract_element(side, ir.Constant(I32, i)) for side in (a, b)]
            chains[i % 2] = assembly(builder, F32, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [*parts, chains[i % 2]])
        return builder.fadd(*chains)

    return types.float32(VECTORS.floats, VECTORS.floats), lower


def _shuffle(builder: ir.IRBuilder, value: ir.Value, distance: int) -> ir.Value:
    letter = "f" if value.type == F32 else "r"
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
    return assembly(builder, value.type, text, f"={letter},{letter}", [value], volatile=True)


@intrinsic
def sum_of_warp(typing_context, value):
    """The sum over the 32 lanes, in every lane, in one fixed order."""

    def lower(context, builder, signature, arguments):
        (value,) = arguments
        for distance in (16, 8, 4, 2, 1):
            value = builder.fadd(value, _shuffle(builder, value, distance))
        return value

    return types.float32(types.float32), lower


@intrinsic
def sum_of_half_warp(typing_context, value):
    """The sum of whole numbers over the 16 lanes of a half warp, in each of them."""

    def lower(context, builder, signature, arguments):
        value = builder.trunc(arguments[0], I32)
        for distance in (8, 4, 2, 1):
            value = builder.add(value, _shuffle(builder, value, distance))
        return builder.sext(value, I64)

    return types.int64(types.int64), lower


@intrinsic
def largest_of_warp(typing_context, value):
    """The largest magnitude over the 32 lanes, in every lane; a NaN counts as larger than everything.

    Magnitudes are compared as bit patterns, which order as the numbers do.
    """

    def lower(context, builder, signature, arguments):
        bits = builder.and_(builder.bitcast(arguments[0], I32), ir.Constant(I32, 0x7FFFFFFF))
        for distance in (16, 8, 4, 2, 1):
            other = _shuffle(builder, bits, distance)
            bits = builder.select(builder.icmp_unsigned(">", other, bits), other, bits)
        return builder.bitcast(bits, F32)

    return types.float32(types.float32), lower


@intrinsic
def round_to_int(typing_context, value):
    """The nearest whole number, halves to even; NaN becomes 0."""

    def lower(context, builder, signature, arguments):
        return builder.sext(assembly(builder, I32, "cvt.rni.s32.f32 $0, $1;", "=r,f", [arguments[0]]), I64)

    return types.int64(types.float32), lower


@intrinsic
def divide(typing_context, a, b):
    """``a / b``, correctly rounded."""

    def lower(context, builder, signature, arguments):
        return assembly(builder, F32, "div.rn.f32 $0, $1, $2;", "=f,f,f", list(arguments))

    return types.float32(types.float32, types.float32), lower


@intrinsic
def power_of_two_below(typing_context, value):
    """The largest power of two up to a normal positive number, at most 2**126 so that its reciprocal is normal too."""

    def lower(context, builder, signature, arguments):
        exponent = builder.and_(builder.bitcast(arguments[0], I32), ir.Constant(I32, 0x7F800000))
        largest = ir.Constant(I32, 253 << 23)
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", exponent, largest), largest, exponent), F32)

    return types.float32(types.float32), lower
