"""float16 to float32, by the CPU's instruction or without it.

x86-64 has had the instruction since 2012 (F16C), but virtual machines may hide it, as they hide AVX, and Celerons and
Atoms lacked it longer. LLVM then calls a library function that does not exist, and ends the process.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import binding, ir

__all__ = ["from_half", "from_half_by_integers", "has_instruction"]

I16, I32 = ir.IntType(16), ir.IntType(32)
F16, F32 = ir.HalfType(), ir.FloatType()


def from_half(builder: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    """The float32 values of a ``half``, or of a vector of them, by an instruction of the target."""
    return builder.fpext(halves, _like(halves, F32))


def from_half_by_integers(builder: ir.IRBuilder, halves: ir.Value) -> ir.Value:
    """The same bits, by integer arithmetic; like the instruction, it quiets NaN."""
    bits = builder.bitcast(halves, _like(halves, I16))

    def constant(value: float, element: ir.Type = I32) -> ir.Constant:
        kind = _like(bits, element)
        return ir.Constant(kind, value if kind == element else [value] * kind.count)

    words, floats = _like(bits, I32), _like(bits, F32)
    wide = builder.zext(bits, words)
    magnitude = builder.and_(wide, constant(0x7FFF))
    sign = builder.shl(builder.and_(wide, constant(0x8000)), constant(16))
    shifted = builder.shl(magnitude, constant(13))
    # Not by float32 subnormals: a thread may be set to flush those to zero.
    small = builder.bitcast(builder.fmul(builder.sitofp(magnitude, floats), constant(2.0**-24, F32)), words)
    number = builder.add(shifted, constant((127 - 15) << 23))
    special = builder.or_(shifted, constant(0x7F800000))
    quiet = builder.or_(special, constant(0x00400000))
    result = builder.select(builder.icmp_unsigned("<", magnitude, constant(0x0400)), small, number)
    result = builder.select(builder.icmp_unsigned(">=", magnitude, constant(0x7C00)), special, result)
    result = builder.select(builder.icmp_unsigned(">", magnitude, constant(0x7C00)), quiet, result)
    return builder.bitcast(builder.or_(result, sign), floats)


@functools.cache
def has_instruction(machine: Any) -> bool:
    """Whether an LLVM target machine converts without a library call. LLVM is asked, since the CPU's own feature flags
    need not be those that are compiled for."""
    module = ir.Module()
    module.triple = machine.triple
    for element in (F16, ir.VectorType(F16, 16)):
        pointers = element.as_pointer(), _like(element, F32).as_pointer()
        name = f"convert_{len(module.functions)}"
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), name)
        builder = ir.IRBuilder(function.append_basic_block())
        builder.store(from_half(builder, builder.load(function.args[0])), function.args[1])
        builder.ret_void()
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    return not any(name in assembly for name in ("extendhfsf2", "h2f"))


def _like(kind: ir.Value | ir.Type, element: ir.Type) -> ir.Type:
    """``element``, or as many of them as the vector ``kind`` has."""
    kind = getattr(kind, "type", kind)
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element
