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
from qmm.kernels.staging import COLUMN_TILES, SHARED_NBYTES, WARPS, Activations, Tiling

__all__ = [
    "CUDAKernel",
    "alignment_of",
    "cast_kernel",
    "checksum_kernel",
    "dequantize_kernel",
    "matvec_kernel",
    "quantize_kernel",
]

LOADS = {"float32": "load_float", "float16": "load_half", "bfloat16": "load_bfloat"}
STORES = {"float32": "store_float", "float16": "store_half", "bfloat16": "store_bfloat"}
THREADS = 32 * WARPS
_PROGRAMMATIC = driver.CUlaunchAttribute()
_PROGRAMMATIC.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_PROGRAMMATIC.value.programmaticStreamSerializationAllowed = 1


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
        shared_nbytes: int = 0,
        threads: int = THREADS,
    ) -> None:
        """Describe a kernel; nothing is built yet.

        Args:
            name: for messages.
            build: makes the specialized function.
            arguments: how many it has.
            key: everything that tells the function from others, apart from the source of this package.
            shared_nbytes: the most shared memory that a launch asks for.
            threads: of a block.
        """
        self.name = name
        self.key = key
        self.arguments = arguments
        self.shared_nbytes = shared_nbytes
        self.threads = threads
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

        return build.assembly_of(self.function, self.arguments, self.threads, capability)

    def launch(
        self, device: int, blocks: int, stream: int, *arguments: int, shared_nbytes: int = 0, programmatic: bool = False
    ) -> None:
        """Put a launch of ``blocks`` blocks on a stream (its handle; 0 is the default stream) of the current device.

        Args:
            device: its number.
            blocks: how many.
            stream: its handle.
            arguments: of the kernel.
            shared_nbytes: shared memory of a block.
            programmatic: whether it may start before the kernel before it ends; it then waits itself.

        Raises:
            RuntimeError: the driver refused; the message names the kernel and the call.
        """
        function = self._loaded.get(device) or self._load(device)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = shared_nbytes
        config.hStream = stream
        if programmatic:
            config.attrs = [_PROGRAMMATIC]
            config.numAttrs = 1
        error, *_ = driver.cuLaunchKernelEx(config, function, (arguments, self._argument_types), 0)
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

        code = Code(*build.compiled(self.function, self.arguments, self.threads, capability))
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
    shared_nbytes: int = 0,
    threads: int = THREADS,
) -> CUDAKernel:
    """A kernel by what :func:`qmm.kernels.build.specialized` takes: the same values build it and are its key."""

    def build() -> Callable[..., Any]:
        from qmm.kernels.build import specialized

        return specialized(template, constants, alignment)

    key = {"template": template, "constants": constants, "alignment": alignment, "arguments": arguments, "threads": threads}
    return CUDAKernel(name, build, arguments, key, shared_nbytes, threads)


@functools.cache
def matvec_kernel(
    block_format: Format,
    columns: int,
    int8: bool,
    tiling: Tiling,
    x_shared: bool = True,
    fused: bool = False,
    programmatic: bool = True,
    shared_nbytes: int = 0,
) -> CUDAKernel:
    """The product of up to ``columns`` columns (one of COLUMN_TILES) with int8 or float16 activations."""
    if columns not in COLUMN_TILES:
        raise ValueError(f"a kernel takes {COLUMN_TILES} columns, not {columns}")
    activations = Activations(columns, int8)
    constants = {
        **tiling.constants(block_format, programmatic),
        "COLUMNS": columns,
        "FUSED": fused,
        "INT8": int8,
        "PROGRAMMATIC": programmatic,
        "RUN_NBYTES": activations.run_nbytes,
        "SCALES": 3 if int8 else 1,
        "X_SHARED": x_shared,
        "load_columns": ("shared_floats" if x_shared else "cached_floats", columns),
        "load_values": "load_shared16" if x_shared else "load_cached16",
        "load_values4": ("past_floats", 4),
    }
    name = f"matvec_{block_format.name}_{columns}_{'int8' if int8 else 'f16'}_{tiling.alignment}"
    return _described(name, "matvec.matvec", 11, constants, tiling.alignment, shared_nbytes, tiling.threads)


@functools.cache
def dequantize_kernel(block_format: Format, tiling: Tiling, bulk: bool = True) -> CUDAKernel:
    """Dequantization to float32."""
    name = f"dequantize_{block_format.name}_{tiling.alignment}"
    constants = tiling.constants(block_format, bulk)
    shared_nbytes = tiling.shared_nbytes(0)
    return _described(
        name, "dequantize.dequantize", 7, constants, tiling.alignment, shared_nbytes, tiling.threads
    )


@functools.cache
def quantize_kernel(dtype: str, int8: bool, programmatic: bool = True) -> CUDAKernel:
    """Activations of ``dtype`` to blocks of 32 int8 or float16 values."""
    constants = {"INT8": int8, "PROGRAMMATIC": programmatic, "WARPS": WARPS, "load_value": LOADS[dtype]}
    return _described(f"quantize_{dtype}_{'int8' if int8 else 'f16'}", "activations.quantize", 11, constants)


@functools.cache
def cast_kernel(dtype: str) -> CUDAKernel:
    """float32 results to an array of ``dtype`` with any strides."""
    constants = {"WARPS": WARPS, "store_value": STORES[dtype]}
    return _described(f"cast_{dtype}", "activations.cast", 6, constants)


@functools.cache
def read_kernel() -> CUDAKernel:
    """A copy of bytes to device memory by a kernel, from wherever they lie."""
    return _described("read", "probe.read", 3, {"WARPS": WARPS})


@functools.cache
def checksum_kernel(in_flight: int) -> CUDAKernel:
    """A reading of memory for its own sake, with ``in_flight`` loads of 16 bytes a thread under way at once."""
    return _described(f"checksum_{in_flight}", "probe.checksum", 3, {"IN_FLIGHT": in_flight, "WARPS": WARPS})
