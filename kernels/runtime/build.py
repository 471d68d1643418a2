"""From a kernel's description to machine code: all of the GPU path that needs Numba and the compilers.

:mod:`qmm.kernels.runtime.launch` imports this when a kernel has to be compiled, and not where it was compiled before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import types

from qmm.kernels.lang.specialize import specialize
from qmm.kernels.lang.targets.cuda import CUDATarget

__all__ = ["assembly_of", "bounded", "compiled", "link", "signature", "specialized"]

_ENTRY = re.compile(r"\.visible \.entry (\w+)")


def specialized(template: str, constants: Mapping[str, Any], alignment: int) -> Callable[..., Any]:
    """The function of a kernel, uncompiled.

    Args:
        template: where it is written, as ``"matvec.kernel.matvec"`` in qmm.kernels.ops.
        constants: what it is specialized with.
        alignment: of the block fields it reads.
    """
    module, _, function = template.rpartition(".")
    return specialize(getattr(import_module(f"qmm.kernels.ops.{module}"), function), constants, CUDATarget(alignment))


def signature(arguments: int) -> Any:
    """The Numba signature of a kernel of so many int64 arguments."""
    return types.void(*[types.int64] * arguments)


def assembly_of(function: Callable[..., Any], arguments: int, threads: int, capability: tuple[int, int]) -> str:
    """The kernel's PTX for a compute capability. On a machine without a GPU, numba.cuda must be told of one."""
    text, _ = cuda.compile(function, signature(arguments), cc=capability, device=False, abi="numba", output="ptx")
    return bounded(str(text), threads)


def bounded(text: str, threads: int) -> str:
    """A kernel's PTX that says how many threads a block has, and that one block on a multiprocessor is enough: without
    the first it may take more registers than there are, without the second ptxas spills to make room for another.
    ``cuda.compile`` has no option for either."""
    head, found, body = text.partition("{")
    assert found and ".entry" in head, "no entry point before the first brace of the PTX"
    return f"{head}.maxntid {threads}, 1, 1\n.minnctapersm 1\n{{{body}"


def compiled(
    function: Callable[..., Any], arguments: int, threads: int, capability: tuple[int, int]
) -> tuple[str, bytes]:
    """The name of the kernel's entry point, and machine code for a compute capability."""
    text = assembly_of(function, arguments, threads, capability)
    entry = _ENTRY.search(text)
    assert entry, f"{function.__name__}: no entry point in its PTX"
    return entry[1], link(text, capability)


def link(text: str, capability: tuple[int, int]) -> bytes:
    """Machine code of PTX for a compute capability. nvJitLink comes with the compiler, so it knows the compiler's PTX;
    the driver's own linker may be older."""
    encoded = text.encode()
    handle = nvjitlink.create(1, [f"-arch=sm_{capability[0]}{capability[1]}"])
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, encoded, len(encoded), "qmm")
        nvjitlink.complete(handle)
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
        return bytes(code)
    finally:
        nvjitlink.destroy(handle)
