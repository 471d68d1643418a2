"""From a specialized function to machine code of the CPU: all of the CPU path that needs Numba.

:mod:`qmm.kernels.runtime.cpu` imports this only when a kernel has to be compiled.
"""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Callable

from llvmlite import binding, ir
from numba.core import config, types
from numba.core.registry import cpu_target

from qmm.kernels.lang.targets.cpu import CPUTarget
from qmm.kernels.runtime.cache import Code
from qmm.kernels.runtime.compiler import check_cpu, compiling

__all__ = ["compiled", "has_usual_settings"]

SETTINGS = (
    *("BOUNDSCHECK", "CPU_FEATURES", "CPU_NAME", "DEBUGINFO_DEFAULT", "ENABLE_AVX", "LOOP_VECTORIZE", "OPT"),
    "SLP_VECTORIZE",
)
"""Numba's settings that change machine code."""


def compiled(function: Callable[..., None], target: CPUTarget) -> Code:
    """Machine code of a function of int64 arguments that returns nothing, specialized for ``target``, as
    :class:`qmm.kernels.runtime.cpu.CPUKernel` calls it.

    Raises:
        DeviceError: a setting of Numba forbids compiling.
    """
    check_cpu()
    dispatcher = target.device_function(function)
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
