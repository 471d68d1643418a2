"""The builder of LLVM instructions for lowerings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from qmm.kernels.lang.fields import DEFAULT_FIELDS, FieldAccess
from qmm.kernels.lang.half import from_half, from_half_by_integers, has_instruction

__all__ = ["CARRIERS", "Emitter"]

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()

CARRIERS = {
    "Word": I32,
    "Words": ir.VectorType(I32, 4),
    "Floats": ir.VectorType(F32, 16),
    "Partial": ir.VectorType(F32, 8),
}
"""The LLVM types of the language's own types. Vectors carry the values: the CPU's back end turns ``<4 x i32>`` into one
register, the GPU's into four."""
LETTERS = {"h": I16, "r": I32, "l": I64, "f": F32}
"""The types of registers by their constraint in inline PTX."""


class Emitter:
    """An ``ir.IRBuilder`` with the language's types and with helpers for lowerings.

    Attributes:
        fields: how block fields are read.
    """

    i8, i16, i32, i64, f16, f32, void = I8, I16, I32, I64, F16, F32, ir.VoidType()

    def __init__(self, builder: ir.IRBuilder, fields: FieldAccess = DEFAULT_FIELDS) -> None:
        self.builder = builder
        self.fields = fields

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    @staticmethod
    def vector_type(element: ir.Type, count: int) -> ir.VectorType:
        """The type of ``count`` elements."""
        return ir.VectorType(element, count)

    @staticmethod
    def constant(kind: ir.Type, value: Any) -> ir.Constant:
        """A constant; a list for a vector."""
        return ir.Constant(kind, value)

    @staticmethod
    def undefined(kind: ir.Type) -> ir.Constant:
        """An undefined value."""
        return ir.Constant(kind, ir.Undefined)

    def parts(self, vector: ir.Value) -> list[ir.Value]:
        """The elements of a vector."""
        return [self.part(vector, i) for i in range(vector.type.count)]

    def part(self, vector: ir.Value, index: int) -> ir.Value:
        """One element of a vector."""
        return self.builder.extract_element(vector, ir.Constant(I32, index))

    def gathered(self, parts: Sequence[ir.Value]) -> ir.Value:
        """A vector of these elements."""
        vector = ir.Constant(ir.VectorType(parts[0].type, len(parts)), ir.Undefined)
        for index, part in enumerate(parts):
            vector = self.builder.insert_element(vector, part, ir.Constant(I32, index))
        return vector

    def splat(self, value: ir.Value, count: int) -> ir.Value:
        """A vector that holds ``value`` ``count`` times."""
        undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, count), [0] * count))

    def shuffled(self, a: ir.Value, b: ir.Value, indices: Sequence[int]) -> ir.Value:
        """A vector of the elements of two at these indices."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(indices)), list(indices)))

    def joined(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Two vectors end to end."""
        return self.shuffled(low, high, range(2 * low.type.count))

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger of two unsigned integers."""
        return self.builder.select(self.builder.icmp_unsigned(">", b, a), b, a)

    def total(self, values: ir.Value) -> ir.Value:
        """The sum of a vector of floats, of a power of two in number, by halving."""
        half = values.type.count // 2
        while half:
            undefined = self.undefined(values.type)
            low, high = (self.shuffled(values, undefined, part) for part in (range(half), range(half, 2 * half)))
            values = self.builder.fadd(low, high)
            half //= 2
        return self.part(values, 0)

    def fmuladd(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """``a * b + c`` of vectors, fused where the CPU has an instruction for it (where it has none, ``llvm.fma``
        would call a library)."""
        return self.builder.call(self.declared(f"llvm.fmuladd.v{a.type.count}f32", a.type, [a.type] * 3), [a, b, c])

    def declared(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        """An LLVM intrinsic."""
        found = self.builder.module.globals.get(name)
        return found or ir.Function(self.builder.module, ir.FunctionType(result, arguments), name)

    @staticmethod
    def integer(bits: int) -> ir.Type:
        """The integer type of so many bits."""
        return ir.IntType(bits)

    def table(self, name: str, element: ir.Type, values: Sequence[Any], addrspace: int = 0) -> ir.GlobalVariable:
        """A constant array of the module; the same for the same name. On a GPU ``addrspace`` is 1, global memory."""
        kind = ir.ArrayType(element, len(values))
        found = self.builder.module.globals.get(name)
        if found is None:
            found = ir.GlobalVariable(self.builder.module, kind, name, addrspace=addrspace)
            found.linkage = "internal"
            found.global_constant = True
            found.initializer = ir.Constant(kind, list(values))
        return found

    def from_half(self, halves: ir.Value) -> ir.Value:
        """The float32 of a ``half``, or of a vector of them, on the CPU: by its instruction, or without one."""
        from numba.core.registry import cpu_target

        machine = cpu_target.target_context.codegen()._tm  # Numba has no public attribute for what it compiles for
        return (from_half if has_instruction(machine) else from_half_by_integers)(self.builder, halves)

    def unaligned(self, address: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
        """A load from ``address + offset`` of this process, at any alignment."""
        loaded = self.builder.load(self.builder.inttoptr(self.builder.add(address, offset), kind.as_pointer()))
        loaded.align = 1
        return loaded

    def global_pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        """An address of a GPU's global memory as a pointer."""
        return self.builder.inttoptr(address, kind.as_pointer(1))

    def shared_pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        """A shared-window address (the lower 32 bits of an int64) as a pointer."""
        return self.builder.inttoptr(self.builder.trunc(address, I32), kind.as_pointer(3))

    def load_floats(self, address: ir.Value, count: int, pointer: Callable[..., ir.Value]) -> list[ir.Value]:
        """``count`` floats, at a multiple of their size up to 16 bytes, from the memory that ``pointer`` is for."""
        width = min(4, count)
        values: list[ir.Value] = []
        for start in range(0, count, width):
            place = self.builder.add(address, ir.Constant(I64, 4 * start))
            loaded = self.builder.load(pointer(place, ir.VectorType(F32, width)), align=4 * width)
            values += self.parts(loaded)
        return values

    def dynamic_shared_memory(self, name: str) -> ir.GlobalVariable:
        """The shared memory that a launch asks for, aligned to a line of 128 bytes."""
        found = self.builder.module.globals.get(name)
        if found is None:
            found = ir.GlobalVariable(self.builder.module, ir.ArrayType(I8, 0), name, addrspace=3)
            found.linkage = "external"
            found.align = 128
        return found

    def ptx(self, text: str, constraints: str, *arguments: ir.Value, volatile: bool = False) -> Any:
        """Inline PTX.

        Args:
            text: the instructions, with ``$0`` and so on for results and arguments.
            constraints: the letters of their registers, those of results with ``=``, as ``"=f,f,l"``.
            arguments: the values.
            volatile: whether it does more than compute its results.

        Returns:
            The result, a list of several, or None.
        """
        kinds = [LETTERS[letter[1]] for letter in constraints.split(",") if letter.startswith("=")]
        result = ir.VoidType() if not kinds else kinds[0] if len(kinds) == 1 else ir.LiteralStructType(kinds)
        if volatile:
            constraints += ("," if constraints else "") + "~{memory}"
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        called = self.builder.call(ir.InlineAsm(kind, text, constraints, side_effect=volatile), arguments)
        if len(kinds) < 2:
            return called if kinds else None
        return [self.builder.extract_value(called, i) for i in range(len(kinds))]
