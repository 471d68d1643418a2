"""Builds the CUDA kernels of a format and launches them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import cuda
from numba.cuda import types

from qmm.kernels import activations, ptx
from qmm.kernels.dequantize import dequantize
from qmm.kernels.formats import Format
from qmm.kernels.matvec import COLUMN_TILES, WARPS, Staging, matvec
from qmm.kernels.specialize import specialize

__all__ = ["CUDAKernel", "alignment_of", "cast_kernel", "chunks", "dequantize_kernel", "matvec_kernel", "quantize_kernel"]

LOADS = {"float32": ptx.load_float, "float16": ptx.load_half, "bfloat16": ptx.load_bfloat}
STORES = {"float32": ptx.store_float, "float16": ptx.store_half, "bfloat16": ptx.store_bfloat}
THREADS = 32 * WARPS


@dataclass(frozen=True, eq=False)
class CUDAKernel:
    """One kernel, ready to be compiled for the GPU at hand; every argument is an int64."""

    name: str
    function: Callable[..., Any]
    arguments: int
    shared_nbytes: int
    rows: int = 1
    """Rows that a warp takes at a time."""

    @property
    def signature(self) -> Any:
        return types.void(*[types.int64] * self.arguments)

    @functools.cached_property
    def compiled(self) -> Any:
        """Compiled for the current device, on first use."""
        return cuda.jit(self.signature)(self.function)

    def launch(self, blocks: int, stream: int, *arguments: int) -> None:
        """Puts a launch of ``blocks`` blocks on a stream (its handle; 0 is the default stream)."""
        handle = cuda.external_stream(stream) if stream else 0
        self.compiled[blocks, THREADS, handle, self.shared_nbytes](*arguments)


def alignment_of(address: int) -> int:
    """The largest power of two up to 16 that an address divides by."""
    return min(16, address & -address) if address else 16


def chunks(block_format: Format, k: int) -> int:
    """Chunks that a row of ``k`` weights is staged in."""
    return -(-block_format.blocks(k) // Staging.of(block_format, 16).chunk_blocks)


@functools.cache
def matvec_kernel(block_format: Format, columns: int, int8: bool, alignment: int = 16) -> CUDAKernel:
    """The product of up to ``columns`` columns (one of COLUMN_TILES) with int8 or float16 activations."""
    if columns not in COLUMN_TILES:
        raise ValueError(f"a kernel takes {COLUMN_TILES} columns, not {columns}")
    staging = Staging.of(block_format, alignment)
    constants = {**staging.constants(block_format), "COLUMNS": columns, "INT8": int8}
    function = specialize(matvec, constants, ptx.CUDATarget(staging.alignment))
    name = f"matvec_{block_format.name}_{columns}_{'int8' if int8 else 'f16'}_{staging.alignment}"
    return CUDAKernel(name, function, 13, staging.shared_nbytes, staging.rows)


@functools.cache
def dequantize_kernel(block_format: Format, alignment: int = 16) -> CUDAKernel:
    """Dequantization to float32."""
    staging = Staging.of(block_format, alignment, rows=1)
    function = specialize(dequantize, staging.constants(block_format), ptx.CUDATarget(staging.alignment))
    name = f"dequantize_{block_format.name}_{staging.alignment}"
    return CUDAKernel(name, function, 7, staging.shared_nbytes)


@functools.cache
def quantize_kernel(dtype: str, int8: bool) -> CUDAKernel:
    """Activations of ``dtype`` to blocks of 32 int8 or float16 values."""
    constants = {"INT8": int8, "WARPS": WARPS, "load_value": LOADS[dtype]}
    function = specialize(activations.quantize, constants, ptx.CUDATarget(16))
    return CUDAKernel(f"quantize_{dtype}_{'int8' if int8 else 'f16'}", function, 9, 0)


@functools.cache
def cast_kernel(dtype: str) -> CUDAKernel:
    """float32 results to an array of ``dtype`` with any strides."""
    constants = {"WARPS": WARPS, "store_value": STORES[dtype]}
    function = specialize(activations.cast, constants, ptx.CUDATarget(16))
    return CUDAKernel(f"cast_{dtype}", function, 6, 0)
