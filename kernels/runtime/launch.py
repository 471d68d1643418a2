"""Describes the CUDA kernels of a format, compiles them when they are first needed, and launches them.

Numba is imported to compile (:mod:`qmm.kernels.runtime.build`), not to launch.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from cuda.bindings import driver

from qmm.kernels.formats import Format
from qmm.kernels.ops.matvec.plan import COLUMN_TILES, WARPS, Schedule, Tiling
from qmm.kernels.runtime.cache import CachedKernel, Code
from qmm.kernels.runtime.compiler import check_cuda, compiling
from qmm.signals import handlers_held

__all__ = [
    "CUDAKernel",
    "DriverCallError",
    "Launch",
    "alignment_of",
    "cast_kernel",
    "checksum_kernel",
    "dequantize_kernel",
    "matvec_kernel",
    "quantize_kernel",
    "read_kernel",
]

DTYPES = ("float32", "float16", "bfloat16")
"""Of activations and results."""
THREADS = 32 * WARPS


class DriverCallError(RuntimeError):
    """A driver call failed; ``number`` is CUDA's of the error."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


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
        threads: int = THREADS,
        shared: bool = False,
    ) -> None:
        """Describe a kernel; nothing is built yet.

        Args:
            name: for messages.
            build: makes the specialized function.
            arguments: how many it has.
            key: everything that tells the function from others, apart from the source of this package.
            threads: of a block.
            shared: whether launches ask for shared memory, as much as the device has for a block if need be.
        """
        self.name = name
        self.key = key
        self.arguments = arguments
        self.shared = shared
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
        return _build().signature(self.arguments)

    def ptx(self, capability: tuple[int, int]) -> str:
        """The kernel for a compute capability. On a machine without a GPU, numba.cuda must be told of one."""
        with compiling():
            return str(_build().assembly_of(self.function, self.arguments, self.threads, capability))

    def launch(self, device: int, blocks: int, stream: int, *arguments: int, shared_nbytes: int = 0) -> None:
        """Put a launch of ``blocks`` blocks on a stream (its handle; 0 is the default stream) of the current device.

        Raises:
            DriverCallError: the driver refused; the message names the kernel and the call.
        """
        Launch(self, device, blocks, arguments, shared_nbytes, early=False).queue(stream)

    def loaded(self, device: int) -> Any:
        """The driver's function for a device, the current one; compiled and loaded if that was not done yet."""
        return self._loaded.get(device) or self._load(device)

    def _load(self, device: int) -> Any:
        with self._lock:
            if device not in self._loaded:
                self._loaded[device] = self._made(device)
            return self._loaded[device]

    def _made(self, device: int) -> Any:
        """The driver's function, from the cache if it has the kernel."""
        capability = (
            _attribute("COMPUTE_CAPABILITY_MAJOR", device),
            _attribute("COMPUTE_CAPABILITY_MINOR", device),
        )
        cached = CachedKernel(self.name, self.key, capability)
        found = cached.get()
        if found is not None:
            with suppress(RuntimeError):  # refused, whatever the reason: the code compiled here and now is tried next
                return self._function_of(found, device)
        with compiling():
            code = Code(*_build().compiled(self.function, self.arguments, self.threads, capability))
        function = self._function_of(code, device)
        cached.put(code)
        return function

    def _function_of(self, code: Code, device: int) -> Any:
        """The driver's function, in the current device's context.

        Raises:
            DriverCallError: the driver refused the code.
        """
        module = _require(*driver.cuModuleLoadData(code.code), doing=f"loading {self.name}")
        function = _require(*driver.cuModuleGetFunction(module, code.entry.encode()), doing=f"finding {self.name}")
        if self.shared:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            nbytes = _attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", device)
            error = driver.cuFuncSetAttribute(function, most, nbytes)
            _require(*error, doing=f"asking for {nbytes} bytes of shared memory for {self.name}")
        return function


class Launch:
    """A launch of a kernel that can be repeated, its arguments packed once; not for several threads at once.

    Attributes:
        arguments: those of the kernel; some may be changed before each launch.
    """

    def __init__(
        self, kernel: CUDAKernel, device: int, blocks: int, arguments: Sequence[int], shared_nbytes: int, early: bool
    ) -> None:
        """Prepare a launch; the kernel is compiled, if need be.

        Args:
            kernel: what to launch.
            device: where; it is the current device.
            blocks: how many.
            arguments: of the kernel, whole numbers all, of any kind.
            shared_nbytes: shared memory of a block.
            early: whether it may start before the kernel before it ends; it must be written so as to wait itself.

        Raises:
            DriverCallError: the driver refused the kernel.
        """
        if len(arguments) != kernel.arguments:
            raise TypeError(f"{kernel.name} takes {kernel.arguments} arguments, not {len(arguments)}")
        self.kernel = kernel
        self.arguments = (ctypes.c_int64 * len(arguments))(*map(operator.index, arguments))
        start = ctypes.addressof(self.arguments)
        self._addresses = (ctypes.c_void_p * len(arguments))(*[start + 8 * i for i in range(len(arguments))])
        self._packed = ctypes.addressof(self._addresses)
        self._function = kernel.loaded(device)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
        config.sharedMemBytes = shared_nbytes
        if early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        self._config = config
        self._stream: int | None = None

    def queue(self, stream: int) -> None:
        """Put the launch on a stream (its handle; 0 is the default stream).

        Raises:
            DriverCallError: the driver refused; the message names the kernel.
        """
        if stream != self._stream:
            self._config.hStream = stream
            self._stream = stream
        (error,) = driver.cuLaunchKernelEx(self._config, self._function, self._packed, 0)
        if error:
            _require(error, doing=f"launching {self.kernel.name}")


def _attribute(name: str, device: int) -> int:
    """A device attribute by its name in the driver's enumeration."""
    kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_require(*driver.cuDeviceGetAttribute(kind, device), doing=f"reading {name}"))


def _require(error: Any, *results: Any, doing: str = "") -> Any:
    """The result of a driver call that must succeed."""
    if int(error):
        raise DriverCallError(f"{doing}: the driver returned {error.name} ({int(error)})", int(error))
    return results[0] if results else None


def _build() -> ModuleType:
    """The module that compiles, with Numba.

    Raises:
        DeviceError: a setting of Numba forbids it.
    """
    check_cuda()
    with handlers_held():  # a Ctrl-C would become an ImportError in Numba's C parts
        from qmm.kernels.runtime import build
    return build


def alignment_of(address: int) -> int:
    """The largest power of two up to 16 that an address divides by."""
    return min(16, address & -address) if address else 16


def _described(
    name: str,
    template: str,
    arguments: int,
    constants: Mapping[str, Any],
    alignment: int = 16,
    threads: int = THREADS,
    shared: bool = False,
) -> CUDAKernel:
    """A kernel by what :func:`qmm.kernels.runtime.build.specialized` takes: the same values build it and are its
    key."""

    def build() -> Callable[..., Any]:
        return _build().specialized(template, constants, alignment)

    key = {
        "template": template,
        "constants": constants,
        "alignment": alignment,
        "arguments": arguments,
        "threads": threads,
    }
    return CUDAKernel(name, build, arguments, key, threads, shared)


@functools.cache
def matvec_kernel(block_format: Format, schedule: Schedule) -> CUDAKernel:
    """The product with up to ``schedule.activations.columns`` columns."""
    tiling, activations = schedule.tiling, schedule.activations
    constants = {
        **tiling.constants(block_format, schedule.bulk, product=True),
        "ARRIVAL_BY_FULL": block_format.runs > 4 and block_format.has_minimum,  # else ptxas spills (Q2_K, sm_100)
        "AT_ONCE": activations.at_once(block_format),
        "COLUMNS": activations.columns,
        "FIRST_STAGES": schedule.first_stages,
        "FUSED": schedule.fused,
        "INT8": activations.int8,
        "PROGRAMMATIC": schedule.bulk,
        "ROUNDS": max(1, 8 // activations.columns),
        "RUN_MINIMA": activations.sums > 0 and block_format.run_minima,
        "RUN_NBYTES": activations.run_nbytes,
        "RUN_STEP": activations.run_step(block_format),
        # Loaded by pairs of columns, or ptxas spills.
        "SCALES_APART": activations.columns >= (16 >> (block_format.runs > 4) >> (activations.sums > 0)),
        "SUMS": activations.sums,
        "SUMS_APART": activations.columns == COLUMN_TILES[-1],
        "X_BULK": schedule.x_bulk,
        "X_NBYTES": activations.nbytes(1),
        "X_SHARED": schedule.x_shared,
    }
    mode = "int8" if activations.int8 else "f16"
    name = f"matvec_{block_format.name}_{activations.columns}_{mode}_{tiling.alignment}"
    return _described(name, "matvec.kernel.matvec", 17, constants, tiling.alignment, tiling.threads, shared=True)


@functools.cache
def dequantize_kernel(block_format: Format, tiling: Tiling, bulk: bool) -> CUDAKernel:
    """Dequantization to float32."""
    constants = tiling.constants(block_format, bulk, product=False)
    name = f"dequantize_{block_format.name}_{tiling.alignment}"
    return _described(name, "dequantize.dequantize", 7, constants, tiling.alignment, tiling.threads, shared=True)


@functools.cache
def quantize_kernel(dtype: str, int8: bool, programmatic: bool = True) -> CUDAKernel:
    """Activations of ``dtype`` to blocks of 32 int8 or float16 values."""
    constants = {"INT8": int8, "PROGRAMMATIC": programmatic, "WARPS": WARPS, "DTYPE": dtype}
    return _described(f"quantize_{dtype}_{'int8' if int8 else 'f16'}", "quantize.quantize", 13, constants)


@functools.cache
def cast_kernel(dtype: str) -> CUDAKernel:
    """float32 results to an array of ``dtype`` with any strides."""
    constants = {"WARPS": WARPS, "DTYPE": dtype}
    return _described(f"cast_{dtype}", "quantize.cast", 7, constants)


@functools.cache
def read_kernel() -> CUDAKernel:
    """A copy of bytes to device memory by a kernel, from wherever they lie."""
    return _described("read", "read.read", 3, {"WARPS": WARPS})


@functools.cache
def checksum_kernel(in_flight: int) -> CUDAKernel:
    """A reading of memory for its own sake, with ``in_flight`` loads of 16 bytes a thread under way at once."""
    return _described(f"checksum_{in_flight}", "read.checksum", 3, {"IN_FLIGHT": in_flight, "WARPS": WARPS})
