"""From a kernel's description to machine code: all of the GPU path that needs Numba and the compilers.

:mod:`qmm.kernels.runtime.launch` imports this only when a kernel has to be compiled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from cuda.bindings import nvjitlink
from numba import cuda
from numba.cuda import dispatcher, types

from qmm.kernels.lang.specialize import specialize
from qmm.kernels.lang.targets.cuda import CUDATarget
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["assembly_of", "bounded", "compiled", "function_of", "link", "signature_of"]

_ENTRY = re.compile(r"\.visible \.entry (\w+)")
_HEAD = re.compile(r"\.visible \.entry \w+\([^)]*\)\s*(?=\{)")


@functools.cache
def function_of(kernel: Kernel) -> Callable[..., Any]:
    """The specialized function of a kernel, uncompiled.

    Raises:
        ValueError: it loads fields of blocks, but does not say from which memory.
    """
    try:
        return specialize(kernel.function, kernel.constants, CUDATarget(kernel.fields))
    except ValueError as reason:
        raise ValueError(f"{kernel.name}: {reason}") from reason


def signature_of(kernel: Kernel) -> Any:
    """The Numba signature of a kernel: every parameter is an int64."""
    return types.void(*[types.int64 for _ in kernel.parameters])


def assembly_of(kernel: Kernel, capability: tuple[int, int]) -> str:
    """A kernel's PTX for a compute capability; no GPU is needed. One thread at a time."""
    function, signature = function_of(kernel), signature_of(kernel)
    with _some_device(capability):
        text, _ = cuda.compile(function, signature, cc=capability, device=False, abi="numba", output="ptx")
    return bounded(str(text), kernel.threads)


@contextmanager
def _some_device(capability: tuple[int, int]) -> Iterator[None]:
    """Give Numba a device where there is none: it asks the current one for the compute capability of device functions,
    although the kernel's own capability decides in the end."""
    if cuda.is_available():
        yield
        return
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def bounded(text: str, threads: int) -> str:
    """A kernel's PTX with launch bounds: the threads of a CTA, without which it may take too many registers, and one
    CTA per SM, without which ptxas spills to make room for another. ``cuda.compile`` has no option for either."""
    head = _HEAD.search(text)
    assert head, "no entry point in the PTX"
    return f"{text[: head.end()]}.maxntid {threads}, 1, 1\n.minnctapersm 1\n{text[head.end() :]}"


def compiled(kernel: Kernel, capability: tuple[int, int]) -> tuple[str, bytes]:
    """The name of a kernel's entry point, and machine code for a compute capability."""
    text = assembly_of(kernel, capability)
    entry = _ENTRY.search(text)
    assert entry, f"{kernel.name}: no entry point in its PTX"
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
