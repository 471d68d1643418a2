"""The CPU as a target, compiled by Numba."""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Callable, Collection
from typing import Any

import numba
from llvmlite import binding, ir
from numba import extending
from numba.core import config, types
from numba.core.errors import RequireLiteralValue
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from qmm.kernels.lang.fields import DEFAULT_FIELDS
from qmm.kernels.lang.intrinsics import Intrinsics, Toolkit
from qmm.kernels.lang.operation import Operation
from qmm.kernels.runtime.cache import Code
from qmm.kernels.runtime.compiler import check_cpu, compiling

__all__ = ["CPUTarget", "has_usual_settings"]

INTRINSICS = Intrinsics(
    "cpu",
    Toolkit(
        types=types,
        intrinsic=extending.intrinsic,
        lower_builtin=extending.lower_builtin,
        register_model=extending.register_model,
        primitive_model=extending.models.PrimitiveModel,
        abstract_template=AbstractTemplate,
        infer_global=infer_global,
        signature=signature,
        require_literal=RequireLiteralValue,
    ),
)
SETTINGS = (
    *("BOUNDSCHECK", "CPU_FEATURES", "CPU_NAME", "DEBUGINFO_DEFAULT", "ENABLE_AVX", "LOOP_VECTORIZE", "OPT"),
    "SLP_VECTORIZE",
)
"""Numba's settings that change machine code."""


class CPUTarget:
    """Specializes and compiles kernels for the CPU that runs them.

    Args:
        fastmath: LLVM's fast-math flags; none where results must equal the reference's bit for bit.
    """

    name = "cpu"
    absent_masks: frozenset[str] = frozenset()

    def __init__(self, fastmath: Collection[str] = ()) -> None:
        # Without the wrappers for calls from Python, a kernel compiles in two thirds of the time.
        self._options = {
            "error_model": "numpy",
            "fastmath": set(fastmath),
            "no_cfunc_wrapper": True,
            "no_cpython_wrapper": True,
        }

    def intrinsic(self, value: object) -> object | None:
        """The target's implementation of an operation; None where ``value`` is not one."""
        return INTRINSICS.of(value, DEFAULT_FIELDS) if isinstance(value, Operation) else None

    def device_function(self, function: Callable[..., Any]) -> Any:
        """A function that only kernels call."""
        check_cpu()
        return numba.njit(**self._options)(function)

    def compiled(self, function: Callable[..., Any]) -> Code:
        """Machine code of a specialized function of int64 arguments that returns nothing, as
        :class:`qmm.kernels.runtime.cpu.CPUKernel` calls it.

        Raises:
            DeviceError: a setting of Numba forbids compiling.
        """
        dispatcher = self.device_function(function)
        arguments = (types.int64,) * len(inspect.signature(function).parameters)
        with compiling():
            dispatcher.compile(types.void(*arguments))
            native = dispatcher.overloads[arguments].fndesc.llvm_func_name
            module = binding.parse_assembly(dispatcher.inspect_llvm(arguments))
            entry = f"qmm_{function.__name__}"
            module.link_in(binding.parse_assembly(str(_entry_point(entry, native, len(arguments)))))
            machine = cpu_target.target_context.codegen()._tm  # Numba has no public attribute for what it compiles for
            return Code(entry, machine.emit_object(module))


def _entry_point(name: str, native: str, count: int) -> ir.Module:
    """A C function that calls one of Numba's. It takes the address of ``count`` arguments, and returns its status:
    0, or another number if it raises an exception."""
    pointer, status, word = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
    module = ir.Module(name)
    module.triple = binding.get_process_triple()
    callee = ir.Function(module, ir.FunctionType(status, [pointer, pointer, *[word] * count]), native)
    function = ir.Function(module, ir.FunctionType(status, [word.as_pointer()]), name)
    builder = ir.IRBuilder(function.append_basic_block())
    # Memory for a result and an exception.
    outputs = [builder.bitcast(builder.alloca(pointer), pointer) for _ in range(2)]
    places = [builder.gep(function.args[0], [ir.Constant(word, i)]) for i in range(count)]
    builder.ret(builder.call(callee, [*outputs, *map(builder.load, places)]))
    return module


def has_usual_settings() -> bool:
    """Whether Numba's settings are those of the environment, not changed by the program."""
    usual = runpy.run_path(config.__file__)
    return all(usual[name] == getattr(config, name) for name in SETTINGS)
