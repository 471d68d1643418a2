"""Describes the CUDA kernels of a format, compiles them when they are first needed, and launches them.

Numba is imported to compile (:mod:`qmm.kernels.build`), not to launch.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from cuda.bindings import driver

from qmm.kernels.cache import CachedKernel, Code
from qmm.kernels.formats import Format
from qmm.kernels.staging import COLUMN_TILES, SHARED_NBYTES, WARPS, Staging

__all__ = [
    "CUDAKernel",
    "alignment_of",
    "cast_kernel",
    "dequantize_kernel",
    "matvec_kernel",
    "quantize_kernel",
]

LOADS = {"float32": "load_float", "float16": "load_half", "bfloat16": "load_bfloat"}
STORES = {"float32": "store_float", "float16": "store_half", "bfloat16": "store_bfloat"}
THREADS = 32 * WARPS


class CUDAKernel:
    """One kernel, compiled for a GPU when it is first launched there; every argument is an int64.

    Numba turns the Python into PTX, nvJitLink the PTX into machine code, and the driver loads and launches that: a
    launch of Numba's own costs four times as much on the host (17 against 4.8 us) and warns of every small grid.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Callable[..., Any]],
        arguments: int,
        key: Mapping[str, Any],
        staging: Staging | None = None,
    ) -> None:
        """Describe a kernel; nothing is built yet.

        Args:
            name: for messages.
            build: makes the specialized function.
            arguments: how many it has.
            key: everything that tells the function from others, apart from the source of this package.
            staging: how rows pass through shared memory, if they do.
        """
        self.name = name
        self.key = key
        self.arguments = arguments
        self.shared_nbytes = staging.shared_nbytes if staging else 0
        self.rows = staging.rows if staging else 1
        self.chunk_blocks = staging.chunk_blocks if staging else 1
        self._build = build
        self._argument_types = (ctypes.c_int64,) * arguments
        self._loaded: dict[int, Any] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The specialized function, which Numba compiles."""
        return self._build()

    @property
    def signature(self) -> Any:
        """The function's Numba signature."""
        from qmm.kernels import build

        return build.signature(self.arguments)

    def ptx(self, capability: tuple[int, int]) -> str:
        """The kernel for a compute capability. On a machine without a GPU, numba.cuda must be told of one."""
        from qmm.kernels import build

        return build.assembly_of(self.function, self.arguments, capability)

    def launch(self, device: int, blocks: int, stream: int, *arguments: int) -> None:
        """Put a launch of ``blocks`` blocks on a stream (its handle; 0 is the default stream) of the current device.

        Raises:
            RuntimeError: the driver refused; the message names the kernel and the call.
        """
        function = self._loaded.get(device) or self._load(device)
        error, *_ = driver.cuLaunchKernel(
            function, blocks, 1, 1, THREADS, 1, 1, self.shared_nbytes, stream, (arguments, self._argument_types), 0
        )
        _require(error, doing=f"launching {self.name}")

    def _load(self, device: int) -> Any:
        with self._lock:
            if device not in self._loaded:
                self._loaded[device] = self._made(_capability(device))
            return self._loaded[device]

    def _made(self, capability: tuple[int, int]) -> Any:
        """The driver's function, from the cache if it has the kernel."""
        cached = CachedKernel(self.name, self.key, capability)
        found = cached.get()
        if found is not None:
            with suppress(RuntimeError):  # refused, whatever the reason: the code compiled here and now is tried next
                return self._function_of(found)
        from qmm.kernels import build

        code = Code(*build.compiled(self.function, self.arguments, capability))
        function = self._function_of(code)
        cached.put(code)
        return function

    def _function_of(self, code: Code) -> Any:
        """The driver's function, in the current device's context.

        Raises:
            RuntimeError: the driver refused the code.
        """
        module = _require(*driver.cuModuleLoadData(code.code), doing=f"loading {self.name}")
        function = _require(*driver.cuModuleGetFunction(module, code.entry.encode()), doing=f"finding {self.name}")
        if self.shared_nbytes > SHARED_NBYTES:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            error = driver.cuFuncSetAttribute(function, most, self.shared_nbytes)
            _require(*error, doing=f"asking for {self.shared_nbytes} bytes of shared memory for {self.name}")
        return function


def _capability(device: int) -> tuple[int, int]:
    """The compute capability of a device."""
    kinds = driver.CUdevice_attribute
    major, minor = (
        int(_require(*driver.cuDeviceGetAttribute(kind, device), doing="reading the compute capability"))
        for kind in (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return major, minor


def _require(error: Any, *results: Any, doing: str = "") -> Any:
    """The result of a driver call that must succeed."""
    if int(error):
        raise RuntimeError(f"{doing}: the driver returned {error.name} ({int(error)})")
    return results[0] if results else None


def alignment_of(address: int) -> int:
    """The largest power of two up to 16 that an address divides by."""
    return min(16, address & -address) if address else 16


def _described(
    name: str,
    template: str,
    arguments: int,
    constants: Mapping[str, Any],
    alignment: int = 16,
    staging: Staging | None = None,
) -> CUDAKernel:
    """A kernel by what :func:`qmm.kernels.build.specialized` takes: the same values build it and are its key."""

    def build() -> Callable[..., Any]:
        from qmm.kernels.build import specialized

        return specialized(template, constants, alignment)

    key = {"template": template, "constants": constants, "alignment": alignment, "arguments": arguments}
    return CUDAKernel(name, build, arguments, key, staging)


@functools.cache
def matvec_kernel(block_format: Format, columns: int, int8: bool, alignment: int = 16) -> CUDAKernel:
    """The product of up to ``columns`` columns (one of COLUMN_TILES) with int8 or float16 activations."""
    if columns not in COLUMN_TILES:
        raise ValueError(f"a kernel takes {COLUMN_TILES} columns, not {columns}")
    staging = Staging.of(block_format, alignment)
    constants = {**staging.constants(block_format), "COLUMNS": columns, "INT8": int8}
    name = f"matvec_{block_format.name}_{columns}_{'int8' if int8 else 'f16'}_{staging.alignment}"
    return _described(name, "matvec.matvec", 13, constants, staging.alignment, staging)


@functools.cache
def dequantize_kernel(block_format: Format, alignment: int = 16) -> CUDAKernel:
    """Dequantization to float32."""
    staging = Staging.of(block_format, alignment, rows=1)
    name = f"dequantize_{block_format.name}_{staging.alignment}"
    return _described(name, "dequantize.dequantize", 7, staging.constants(block_format), staging.alignment, staging)


@functools.cache
def quantize_kernel(dtype: str, int8: bool) -> CUDAKernel:
    """Activations of ``dtype`` to blocks of 32 int8 or float16 values."""
    constants = {"INT8": int8, "WARPS": WARPS, "load_value": LOADS[dtype]}
    return _described(f"quantize_{dtype}_{'int8' if int8 else 'f16'}", "activations.quantize", 9, constants)


@functools.cache
def cast_kernel(dtype: str) -> CUDAKernel:
    """float32 results to an array of ``dtype`` with any strides."""
    constants = {"WARPS": WARPS, "store_value": STORES[dtype]}
    return _described(f"cast_{dtype}", "activations.cast", 6, constants)


@functools.cache
def read_kernel() -> CUDAKernel:
    """A copy of bytes to device memory by a kernel, from wherever they lie."""
    return _described("read", "probe.read", 3, {"WARPS": WARPS})
