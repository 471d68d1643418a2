"""The machine operations of the CUDA schedules, as inline PTX: where a thread is, memory, arithmetic, the warp.

Only :func:`bulk_copy`, :func:`copy16` and the edge copies ever read a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import cgutils, types
from numba.cuda.core.errors import RequireLiteralValue
from numba.cuda.extending import core_models, intrinsic, lower_builtin, register_model
from numba.cuda.typing.templates import AbstractTemplate, infer_global, signature

from qmm.kernels.lang.vector import F32, I8, I16, I32, I64, Toolkit, define, splat, vector

__all__ = [
    "arrive",
    "arrive_after_copies",
    "barrier_arrive",
    "barrier_wait",
    "bulk_copy",
    "expect",
    "fence",
    "initialize_barrier",
    "synchronize_warp",
    "COMMON",
    "VECTORS",
    "assembly",
    "block_count",
    "block_index",
    "cached_floats",
    "copy16",
    "copy_edge1",
    "copy_edge2",
    "copy_edge4",
    "dot_floats",
    "dot_pair",
    "dot_pair_more",
    "dot_short",
    "fused",
    "lane_index",
    "largest_of_eight",
    "largest_of_values",
    "largest_of_warp",
    "launch_dependents",
    "load_bfloat",
    "load_byte",
    "load_cached16",
    "load_float",
    "load_half",
    "load_past16",
    "load_shared16",
    "load_shared_float",
    "load_past_floats",
    "load_past_l1",
    "power_of_two_below",
    "prefetch",
    "quad",
    "reciprocal",
    "scaled",
    "scaled_byte",
    "scaled_bytes",
    "share",
    "shared_floats",
    "shared_memory",
    "store_bfloat",
    "store_byte",
    "store_float",
    "store_half",
    "store_part",
    "store_run",
    "store_shared16",
    "store_shared_float",
    "store_shared_word",
    "store_word",
    "sum_of_eight_words",
    "sum_of_four_words",
    "sum_of_half_warp",
    "sum_of_warp",
    "synchronize_block",
    "thread_index",
    "two_halves",
    "wait_for_predecessors",
    "waiter",
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
# Memory of the tensor: asynchronous copies, the edges they may not touch, the barriers that tell of their end
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


launch_dependents = _statement("griddepcontrol.launch_dependents;")
"""Lets the next kernel of the stream start, as far as there is room for it (sm_90 and later)."""
wait_for_predecessors = _statement("griddepcontrol.wait;")
"""Waits for all kernels before this one, and sees what they wrote (sm_90 and later)."""
synchronize_warp = _statement("bar.warp.sync 0xffffffff;")


def barrier_arrive(number: int, threads: int) -> Any:
    """A function that says of a warp that it is at barrier ``number`` of so many threads, and goes on."""
    return _statement(f"barrier.cta.arrive.aligned {number}, {threads};")


def barrier_wait(number: int, threads: int) -> Any:
    """A function that waits at barrier ``number`` for so many threads, its own warp's included."""
    return _statement(f"barrier.cta.sync.aligned {number}, {threads};")


def fence(bulk: bool) -> Any:
    """A function that shows initialized barriers to the engine that makes bulk copies."""
    return _statement("fence.mbarrier_init.release.cluster;" if bulk else "membar.cta;")


def _barrier_statement(text: str, *kinds: Any) -> Any:
    """An operation on a barrier: shared-window addresses and counts are 32 bits wide, ``int64`` here."""
    if not kinds:

        @intrinsic
        def execute(typing_context, barrier):
            def lower(context, builder, signature, arguments):
                assembly(builder, VOID, text, "r", [builder.trunc(arguments[0], I32)], volatile=True)
                return context.get_dummy_value()

            return types.void(types.int64), lower
    else:

        @intrinsic
        def execute(typing_context, barrier, value):
            def lower(context, builder, signature, arguments):
                both = [builder.trunc(argument, I32) for argument in arguments]
                assembly(builder, VOID, text, "r,r", both, volatile=True)
                return context.get_dummy_value()

            return types.void(types.int64, types.int64), lower

    return execute


initialize_barrier = _barrier_statement("mbarrier.init.shared.b64 [$0], $1;", int)
"""Makes a barrier of 8 bytes that so many arrivals complete."""
arrive = _barrier_statement("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [$0]; }")
"""One arrival; what the thread read and wrote before comes before what others do after their wait."""
arrive_after_copies = _barrier_statement("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];")
"""One arrival as soon as the thread's ``copy16`` so far are done."""
expect = _barrier_statement("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$0], $1;", int)
"""Makes the barrier wait for so many bytes of bulk copies too (sm_90 and later)."""


def waiter(bulk: bool) -> Any:
    """A function that waits until a barrier has completed the phase of a parity."""
    test = "try_wait" if bulk else "test_wait"
    text = f"{{ .reg .pred done; again: mbarrier.{test}.parity.shared.b64 done, [$0], $1; @!done bra again; }}"
    return _barrier_statement(text, int)


@intrinsic
def bulk_copy(typing_context, target, source, nbytes, barrier):
    """Starts copying from global to shared memory, all at multiples of 16; the barrier counts the bytes (sm_90)."""

    def lower(context, builder, signature, arguments):
        target, source, nbytes, barrier = arguments
        text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
        small = [builder.trunc(value, I32) for value in (target, nbytes, barrier)]
        assembly(builder, VOID, text, "r,l,r,r", [small[0], source, *small[1:]], volatile=True)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), lower


@intrinsic
def prefetch(typing_context, source, nbytes):
    """Asks for global memory to be brought into L2, all at multiples of 16; nobody is told when it is there (sm_90)."""

    def lower(context, builder, signature, arguments):
        source, nbytes = arguments
        text = "cp.async.bulk.prefetch.L2.global [$0], $1;"
        assembly(builder, VOID, text, "l,r", [source, builder.trunc(nbytes, I32)], volatile=True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), lower


@intrinsic
def synchronize_block(typing_context):
    """Waits for all threads of the block. LLVM's own barrier, because it must not be copied into branches."""

    def lower(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VOID, []), "llvm.nvvm.barrier0")
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), lower


# ---------------------------------------------------------------------------------------------------------------------
# Activations and results: ordinary global memory of qmm's own
# ---------------------------------------------------------------------------------------------------------------------


def global_pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """An address of global memory as a pointer."""
    return builder.inttoptr(address, kind.as_pointer(1))


# Activations may have been written by a kernel that this one was started before the end of: never `.nc`, which may
# give what a line of L1 held before.
@intrinsic
def load_cached16(typing_context, address):
    """16 bytes of global memory, at a multiple of 16, through L1."""

    def lower(context, builder, signature, arguments):
        return builder.load(global_pointer(builder, arguments[0], vector(I32, 4)), align=16)

    return VECTORS.words(types.int64), lower


@intrinsic
def load_past16(typing_context, address):
    """16 bytes of global memory, at a multiple of 16, past L1."""

    def lower(context, builder, signature, arguments):
        return quad(builder, "ld.global.cg.v4.u32 {$0, $1, $2, $3}, [$4];", arguments[0], volatile=True)

    return VECTORS.words(types.int64), lower


@intrinsic
def load_past_floats(typing_context, address):
    """Four floats of global memory, at a multiple of 16, past L1."""

    def lower(context, builder, signature, arguments):
        words = quad(builder, "ld.global.cg.v4.u32 {$0, $1, $2, $3}, [$4];", arguments[0], volatile=True)
        floats = builder.bitcast(words, vector(F32, 4))
        values = [builder.extract_element(floats, ir.Constant(I32, i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.float32, 4)(types.int64), lower


def _floats(count: int, pointer: Callable[[ir.IRBuilder, ir.Value, ir.Type], ir.Value]) -> Any:
    width = min(4, count)

    @intrinsic
    def load(typing_context, address):
        def lower(context, builder, signature, arguments):
            values = []
            for start in range(0, count, width):
                place = builder.add(arguments[0], ir.Constant(I64, 4 * start))
                loaded = builder.load(pointer(builder, place, vector(F32, width)), align=4 * width)
                values += [builder.extract_element(loaded, ir.Constant(I32, i)) for i in range(width)]
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(types.float32, count)(types.int64), lower

    return load


def cached_floats(count: int) -> Any:
    """A load of ``count`` floats (1, 2, 4 or 8) of global memory, at a multiple of their size up to 16, through L1."""
    return _floats(count, global_pointer)


def shared_floats(count: int) -> Any:
    """The same of shared memory."""
    return _floats(count, shared_pointer)


def shared_pointer(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """A shared-window address as a pointer. LLVM's own loads, not inline PTX: it may merge and move them between the
    barriers."""
    return builder.inttoptr(builder.trunc(address, I32), kind.as_pointer(3))


@intrinsic
def load_shared16(typing_context, address):
    """16 bytes of shared memory, at a multiple of 16."""

    def lower(context, builder, signature, arguments):
        return builder.load(shared_pointer(builder, arguments[0], vector(I32, 4)), align=16)

    return VECTORS.words(types.int64), lower


@intrinsic
def store_shared16(typing_context, address, words):
    """Stores 16 bytes to shared memory, at a multiple of 16."""

    def lower(context, builder, signature, arguments):
        builder.store(arguments[1], shared_pointer(builder, arguments[0], vector(I32, 4)), align=16)
        return context.get_dummy_value()

    return types.void(types.int64, VECTORS.words), lower


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


@intrinsic
def load_shared_float(typing_context, address):
    """A float of shared memory."""

    def lower(context, builder, signature, arguments):
        return builder.load(shared_pointer(builder, arguments[0], F32), align=4)

    return types.float32(types.int64), lower


@intrinsic
def store_shared_float(typing_context, address, value):
    """Stores a float to shared memory."""

    def lower(context, builder, signature, arguments):
        builder.store(arguments[1], shared_pointer(builder, arguments[0], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), lower


@intrinsic
def store_shared_word(typing_context, address, word):
    """Stores four bytes to shared memory, at a multiple of 4."""

    def lower(context, builder, signature, arguments):
        builder.store(arguments[1], shared_pointer(builder, arguments[0], I32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, VECTORS.word), lower


def _global_loader(suffix: str, result: Any, carrier: ir.Type, letter: str, convert: Any = None) -> Any:
    @intrinsic
    def load(typing_context, address):
        def lower(context, builder, signature, arguments):
            value = assembly(builder, carrier, f"ld.global.{suffix} $0, [$1];", f"={letter},l", [arguments[0]], True)
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


@intrinsic
def two_halves(typing_context, a, b):
    """Two numbers as float16, the first in the lower half of a word."""

    def lower(context, builder, signature, arguments):
        return assembly(builder, I32, "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", list(arguments))

    return VECTORS.word(types.float32, types.float32), lower


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


MAGIC = 0x4B400000
"""12,582,912.0 = 3 * 2**22 as a float; added to it, a whole number up to 2**22 stands in the last bits."""


@intrinsic
def dot_pair(typing_context, a, b, x):
    """Products of two rows with two columns, by the tensor cores: ``12,582,912 + dot`` as four floats, exact.

    A tensor-core product sums over the four lanes of a quad, whose runs have scales of their own. So x is spread over a
    diagonal: to column ``2 t + e`` only the lanes whose number in their quad is t contribute, and each lane gets its
    own run's sum for two columns. Lane ``4 g + t`` passes its run ``a`` of row g and ``b`` of row g + 8. As ``x`` the
    lanes with ``t == g // 2`` pass the same run of x's column ``g % 2``, and all others zeros.

    Returns row g with column 0 and 1, and row g + 8 with these.
    """

    def lower(context, builder, signature, arguments):
        dots = _dot_pair(builder, arguments, [ir.Constant(I32, MAGIC)] * 4)
        return context.make_tuple(builder, signature.return_type, dots)

    return types.UniTuple(types.float32, 4)(VECTORS.words, VECTORS.words, VECTORS.words), lower


@intrinsic
def dot_pair_more(typing_context, a, b, x, dots):
    """Adds what :func:`dot_pair` would make of other runs to what it made; 12,582,912 is in it once."""

    def lower(context, builder, signature, arguments):
        *sides, dots = arguments
        totals = [builder.bitcast(builder.extract_value(dots, j), I32) for j in range(4)]
        return context.make_tuple(builder, signature.return_type, _dot_pair(builder, sides, totals))

    quadruple = types.UniTuple(types.float32, 4)
    return quadruple(VECTORS.words, VECTORS.words, VECTORS.words, quadruple), lower


def _dot_pair(builder: ir.IRBuilder, sides: list[ir.Value], totals: list[ir.Value]) -> list[ir.Value]:
    kind = ir.LiteralStructType([I32] * 4)
    text = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    for i in (0, 2):
        word = [[builder.extract_element(side, ir.Constant(I32, i + j)) for j in (0, 1)] for side in sides]
        registers = [word[0][0], word[1][0], word[0][1], word[1][1], *word[2], *totals]
        made = assembly(builder, kind, text, ",".join(["=r"] * 4 + ["r"] * 10), registers)
        totals = [builder.extract_value(made, j) for j in range(4)]
    return [builder.bitcast(total, F32) for total in totals]


@intrinsic
def dot_short(typing_context, a, b, x, totals):
    """Adds products of two rows with eight columns to ``totals``, by the tensor cores, in float32.

    Lane ``4 g + t`` passes its sixteen numbers ``a`` of row g, ``b`` of row g + 8, and of column g the sixteen at the
    same places, ``x``; all have 11 significant bits at most, which makes the products exact. It gets rows g and g + 8
    (the latter two) with columns ``2 t`` and ``2 t + 1``, summed over the quad.
    """

    def lower(context, builder, signature, arguments):
        a, b, x, totals = arguments
        kind = ir.LiteralStructType([F32] * 4)
        text = (
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        bits = [builder.bitcast(side, vector(I32, 16)) for side in (a, b, x)]
        sums = [builder.extract_value(totals, j) for j in range(4)]
        for i in range(0, 16, 2):
            word = [[builder.extract_element(side, ir.Constant(I32, i + j)) for j in (0, 1)] for side in bits]
            operands = [word[0][0], word[1][0], word[0][1], word[1][1], *word[2], *sums]
            made = assembly(builder, kind, text, ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4), operands)
            sums = [builder.extract_value(made, j) for j in range(4)]
        return context.make_tuple(builder, signature.return_type, sums)

    quadruple = types.UniTuple(types.float32, 4)
    return quadruple(VECTORS.floats, VECTORS.floats, VECTORS.floats, quadruple), lower


@intrinsic
def scaled(typing_context, values, scale):
    """Sixteen floats times one."""

    def lower(context, builder, signature, arguments):
        values, scale = arguments
        return builder.fmul(values, splat(builder, scale, 16))

    return VECTORS.floats(VECTORS.floats, types.float32), lower


@intrinsic
def fused(typing_context, a, b, c):
    """``a * b + c``, rounded once."""

    def lower(context, builder, signature, arguments):
        return assembly(builder, F32, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", list(arguments))

    return types.float32(types.float32, types.float32, types.float32), lower


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
def share(typing_context, a, b, distance, upper):
    """With the lane ``distance`` (a literal) away: one gets the sum of both their ``a``, the other, where ``upper`` is
    not 0, that of their ``b``."""
    if not isinstance(distance, types.IntegerLiteral):
        raise RequireLiteralValue("the distance of lanes")
    apart = distance.literal_value

    def lower(context, builder, signature, arguments):
        a, b, _, upper = arguments
        is_upper = builder.icmp_signed("!=", upper, ir.Constant(I64, 0))
        kept = builder.select(is_upper, b, a)
        sent = builder.select(is_upper, a, b)
        return builder.fadd(kept, _shuffle(builder, sent, apart))

    return types.float32(types.float32, types.float32, distance, types.int64), lower


def _sum(distances: tuple[int, ...]) -> Any:
    @intrinsic
    def total(typing_context, value):
        def lower(context, builder, signature, arguments):
            value = builder.trunc(arguments[0], I32)
            for distance in distances:
                value = builder.add(value, _shuffle(builder, value, distance))
            return builder.sext(value, I64)

        return types.int64(types.int64), lower

    return total


sum_of_warp = _sum((16, 8, 4, 2, 1))
"""The sum of whole numbers over the 32 lanes, in every lane."""
sum_of_half_warp = _sum((8, 4, 2, 1))
"""The same over the 16 lanes of a half warp."""


def _sum_of_bytes(distances: tuple[int, ...]) -> Any:
    @intrinsic
    def total(typing_context, word):
        def lower(context, builder, signature, arguments):
            ones, none = ir.Constant(I32, 0x01010101), ir.Constant(I32, 0)
            text = "dp4a.s32.s32 $0, $1, $2, $3;"
            value = assembly(builder, I32, text, "=r,r,r,r", [arguments[0], ones, none])
            for distance in distances:
                value = builder.add(value, _shuffle(builder, value, distance))
            return builder.sitofp(value, F32)

        return types.float32(VECTORS.word), lower

    return total


sum_of_four_words = _sum_of_bytes((2, 1))
"""The sum of the signed bytes of four neighbouring lanes' words, in each of them, as float32."""
sum_of_eight_words = _sum_of_bytes((4, 2, 1))
"""The same of eight."""


def _largest(distances: tuple[int, ...]) -> Any:
    @intrinsic
    def largest(typing_context, value):
        def lower(context, builder, signature, arguments):
            bits = builder.and_(builder.bitcast(arguments[0], I32), ir.Constant(I32, 0x7FFFFFFF))
            for distance in distances:
                bits = _larger(builder, bits, _shuffle(builder, bits, distance))
            return builder.bitcast(bits, F32)

        return types.float32(types.float32), lower

    return largest


def _larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_unsigned(">", b, a), b, a)


largest_of_warp = _largest((16, 8, 4, 2, 1))
"""The largest magnitude over the 32 lanes, in every lane; a NaN counts as larger than everything.

Magnitudes are compared as bit patterns, which order as the numbers do."""
largest_of_eight = _largest((4, 2, 1))
"""The same over eight neighbouring lanes."""


@intrinsic
def largest_of_values(typing_context, a, b, c, d):
    """The largest magnitude of four numbers; a NaN counts as larger than everything."""

    def lower(context, builder, signature, arguments):
        bits = [builder.and_(builder.bitcast(value, I32), ir.Constant(I32, 0x7FFFFFFF)) for value in arguments]
        both = [_larger(builder, *bits[:2]), _larger(builder, *bits[2:])]
        return builder.bitcast(_larger(builder, *both), F32)

    return types.float32(*[types.float32] * 4), lower


def _scaled(builder: ir.IRBuilder, value: ir.Value, factor: ir.Value) -> ir.Value:
    """``round(value * factor)``, halves to even, as the low byte of a word: the bits of the sum with 3 * 2**22."""
    text = f"fma.rn.f32 $0, $1, $2, 0f{MAGIC:08X};"
    return builder.bitcast(assembly(builder, F32, text, "=f,f,f", [value, factor]), I32)


@intrinsic
def scaled_byte(typing_context, value, factor):
    """``round(value * factor)``, halves to even, which must lie in a signed byte (of a NaN it is anything)."""

    def lower(context, builder, signature, arguments):
        return builder.sext(builder.trunc(_scaled(builder, *arguments), I8), I64)

    return types.int64(types.float32, types.float32), lower


def _permuted(builder: ir.IRBuilder, selector: str, low: ir.Value, high: ir.Value) -> ir.Value:
    """A word of those bytes of two that the selector names, lowest first."""
    return assembly(builder, I32, f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", [low, high])


@intrinsic
def scaled_bytes(typing_context, a, b, c, d, factor):
    """The same for four values, as a word with the first lowest."""

    def lower(context, builder, signature, arguments):
        *values, factor = arguments
        parts = [_scaled(builder, value, factor) for value in values]
        low, high = (_permuted(builder, "0x0040", parts[i], parts[i + 1]) for i in (0, 2))
        return _permuted(builder, "0x5410", low, high)

    return VECTORS.word(*[types.float32] * 5), lower


@intrinsic
def reciprocal(typing_context, value):
    """``1 / value``, correctly rounded."""

    def lower(context, builder, signature, arguments):
        return assembly(builder, F32, "rcp.rn.f32 $0, $1;", "=f,f", list(arguments))

    return types.float32(types.float32), lower


@intrinsic
def power_of_two_below(typing_context, value):
    """The largest power of two up to a normal positive number, at most 2**126 so that its reciprocal is normal too."""

    def lower(context, builder, signature, arguments):
        exponent = builder.and_(builder.bitcast(arguments[0], I32), ir.Constant(I32, 0x7F800000))
        largest = ir.Constant(I32, 253 << 23)
        return builder.bitcast(builder.select(builder.icmp_unsigned(">", exponent, largest), largest, exponent), F32)

    return types.float32(types.float32), lower
