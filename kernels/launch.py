"""Builds the CUDA kernels of a format and launches them."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver, nvjitlink
from numba import cuda
from numba.cuda import types

from qmm.kernels import activations, probe, ptx
from qmm.kernels.cuda_target import CUDATarget
from qmm.kernels.dequantize import dequantize
from qmm.kernels.formats import Format
from qmm.kernels.matvec import COLUMN_TILES, WARPS, Staging, matvec
from qmm.kernels.specialize import specialize

__all__ = [
    "CUDAKernel",
    "alignment_of",
    "cast_kernel",
    "checksum_kernel",
    "dequantize_kernel",
    "matvec_kernel",
    "quantize_kernel",
]

LOADS = {"float32": ptx.load_float, "float16": ptx.load_half, "bfloat16": ptx.load_bfloat}
STORES = {"float32": ptx.store_float, "float16": ptx.store_half, "bfloat16": ptx.store_bfloat}
THREADS = 32 * WARPS


class CUDAKernel:
    """One kernel, compiled for a GPU when it is first launched there; every argument is an int64.

    Numba turns the Python into PTX, nvJitLink the PTX into machine code, and the driver loads and launches that: a
    launch of Numba's own costs four times as much on the host (17 against 4.8 us) and warns of every small grid.
    """

    def __init__(self, name: str, function: Callable[..., Any], arguments: int, staging: Staging | None = None) -> None:
        """Args are the name for messages, the specialized function, how many arguments it has, and how rows pass
        through shared memory if they do."""
        self.name = name
        self.function = function
        self.signature = types.void(*[types.int64] * arguments)
        self.shared_nbytes = staging.shared_nbytes if staging else 0
        self.rows = staging.rows if staging else 1
        self.chunk_blocks = staging.chunk_blocks if staging else 1
        self._argument_types = (ctypes.c_int64,) * arguments
        self._loaded: dict[int, Any] = {}
        self._lock = threading.Lock()

    def ptx(self, capability: tuple[int, int]) -> str:
        """The kernel for a compute capability. On a machine without a GPU, numba.cuda must be told of one."""
        text, _ = cuda.compile(self.function, self.signature, cc=capability, device=False, abi="numba", output="ptx")
        return str(text)

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
                kinds = driver.CUdevice_attribute
                capability = tuple(
                    _require(*driver.cuDeviceGetAttribute(kind, device), doing="reading the compute capability")
                    for kind in (
                        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                    )
                )
                ptx = self.ptx(capability)
                module = _require(*driver.cuModuleLoadData(link(ptx, capability)), doing=f"loading {self.name}")
                entry = _ENTRY.search(ptx)
                assert entry, f"{self.name}: no entry point in its PTX"
                name = entry[1].encode()
                self._loaded[device] = _require(*driver.cuModuleGetFunction(module, name), doing=f"finding {self.name}")
            return self._loaded[device]


_ENTRY = re.compile(r"\.visible \.entry (\w+)")


def link(ptx: str, capability: tuple[int, int]) -> bytes:
    """Machine code for a compute capability. nvJitLink comes with the compiler, so it knows the compiler's PTX; the
    driver's own linker may be older."""
    text = ptx.encode()
    handle = nvjitlink.create(1, [f"-arch=sm_{capability[0]}{capability[1]}"])
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, text, len(text), "qmm")
        nvjitlink.complete(handle)
        code = bytearray(nvjitlink.get_linked_cubin_size(handle))
        nvjitlink.get_linked_cubin(handle, code)
        return bytes(code)
    finally:
        nvjitlink.destroy(handle)


def _require(error: Any, *results: Any, doing: str = "") -> Any:
    """The result of a driver call that must succeed."""
    if int(error):
        raise RuntimeError(f"{doing}: the driver returned {error.name} ({int(error)})")
    return results[0] if results else None


def alignment_of(address: int) -> int:
    """The largest power of two up to 16 that an address divides by."""
    return min(16, address & -address) if address else 16


@functools.cache
def matvec_kernel(block_format: Format, columns: int, int8: bool, alignment: int = 16) -> CUDAKernel:
    """The product of up to ``columns`` columns (one of COLUMN_TILES) with int8 or float16 activations."""
    if columns not in COLUMN_TILES:
        raise ValueError(f"a kernel takes {COLUMN_TILES} columns, not {columns}")
    staging = Staging.of(block_format, alignment)
    constants = {**staging.constants(block_format), "COLUMNS": columns, "INT8": int8}
    function = specialize(matvec, constants, CUDATarget(staging.alignment))
    name = f"matvec_{block_format.name}_{columns}_{'int8' if int8 else 'f16'}_{staging.alignment}"
    return CUDAKernel(name, function, 13, staging)


@functools.cache
def dequantize_kernel(block_format: Format, alignment: int = 16) -> CUDAKernel:
    """Dequantization to float32."""
    staging = Staging.of(block_format, alignment, rows=1)
    function = specialize(dequantize, staging.constants(block_format), CUDATarget(staging.alignment))
    name = f"dequantize_{block_format.name}_{staging.alignment}"
    return CUDAKernel(name, function, 7, staging)


@functools.cache
def quantize_kernel(dtype: str, int8: bool) -> CUDAKernel:
    """Activations of ``dtype`` to blocks of 32 int8 or float16 values."""
    constants = {"INT8": int8, "WARPS": WARPS, "load_value": LOADS[dtype]}
    function = specialize(activations.quantize, constants, CUDATarget(16))
    return CUDAKernel(f"quantize_{dtype}_{'int8' if int8 else 'f16'}", function, 9)


@functools.cache
def cast_kernel(dtype: str) -> CUDAKernel:
    """float32 results to an array of ``dtype`` with any strides."""
    constants = {"WARPS": WARPS, "store_value": STORES[dtype]}
    function = specialize(activations.cast, constants, CUDATarget(16))
    return CUDAKernel(f"cast_{dtype}", function, 6)


@functools.cache
def read_kernel() -> CUDAKernel:
    """A copy of bytes to device memory by a kernel, from wherever they lie."""
    return CUDAKernel("read", specialize(probe.read, {"WARPS": WARPS}, CUDATarget(16)), 3)


@functools.cache
def checksum_kernel(in_flight: int) -> CUDAKernel:
    """A reading of memory for its own sake, with ``in_flight`` loads of 16 bytes a thread under way at once."""
    constants = {"IN_FLIGHT": in_flight, "WARPS": WARPS}
    return CUDAKernel(f"checksum_{in_flight}", specialize(probe.checksum, constants, CUDATarget(16)), 3)
