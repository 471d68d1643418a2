"""CuPy and Numba arrays, which share the CUDA array interface."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import numpy as np

from qmm.arrays.kind import ArrayKind, check_dtype
from qmm.arrays.view import View
from qmm.cuda import call
from qmm.errors import ArrayError
from qmm.kernels.ops.op import ITEM_NBYTES

__all__ = ["CuPyArrays", "NumbaArrays"]


class CudaInterfaceArrays(ArrayKind):
    """What CuPy's and Numba's arrays share: the CUDA array interface."""

    def view(self, array: Any) -> View:
        described = array.__cuda_array_interface__
        dtype = check_dtype(np.dtype(array.dtype).name, f"a {self.name} array")
        if not np.dtype(array.dtype).isnative:
            raise ArrayError(f"a {self.name} array of foreign byte order ({array.dtype}) is not supported; convert it")
        shape = tuple(map(int, described["shape"]))
        strides = described.get("strides")
        if strides is None:
            strides, step = [], ITEM_NBYTES[dtype]
            for length in reversed(shape):
                strides.insert(0, step)
                step *= length
        address, read_only = described["data"]
        return View(shape, tuple(map(int, strides)), dtype, int(address or 0), self._device(array), not read_only)

    def _device(self, array: Any) -> int:
        raise NotImplementedError


class CuPyArrays(CudaInterfaceArrays):
    """``cupy.ndarray``; bfloat16 is that of the package ml_dtypes."""

    name = "CuPy"

    def _device(self, array: Any) -> int:
        return int(array.device.id)

    def signature(self, array: Any) -> tuple[int, Hashable]:
        data = array.data
        return data.ptr, (array.shape, array.strides, array.dtype, data.device_id)

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def empty(self, shape: tuple[int, ...], like: Any, stream: Any = None) -> Any:
        with like.device, nullcontext() if stream is None else stream:
            return sys.modules["cupy"].empty(shape, like.dtype)

    def empty_bytes(self, nbytes: int, like: Any, stream: Any = None) -> Any:
        with like.device, nullcontext() if stream is None else stream:
            return sys.modules["cupy"].empty(nbytes, np.uint8)

    def stream(self, array: Any) -> int:
        return int(sys.modules["cupy"].cuda.get_current_stream(array.data.device_id).ptr)

    def owns(self, stream: Any) -> bool:
        return isinstance(stream, sys.modules["cupy"].cuda.Stream)

    def keeper(self, stream: Any) -> object:
        return stream if self.owns(stream) else None

    def current(self, device: int) -> Any:
        return sys.modules["cupy"].cuda.get_current_stream(device)

    def release_cache(self) -> None:
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


class NumbaArrays(CudaInterfaceArrays):
    """``numba.cuda`` device arrays; new ones are allocated on the current device. They are freed by cuMemFree, which
    waits for what uses them."""

    name = "Numba"
    recycles = False
    names_streams = True

    def _device(self, array: Any) -> int:
        address, _ = array.__cuda_array_interface__["data"]
        if not address:  # an empty array
            return int(call("cudaGetDevice"))
        return int(call("cudaPointerGetAttributes", address).device)

    def signature(self, array: Any) -> tuple[int, Hashable]:
        data = array.gpu_data
        return data.device_pointer_value or 0, (array.shape, array.strides, array.dtype, id(data.context))

    def empty(self, shape: tuple[int, ...], like: Any, stream: Any = None) -> Any:
        from numba import cuda

        return cuda.device_array(shape, like.dtype)

    def empty_bytes(self, nbytes: int, like: Any, stream: Any = None) -> Any:
        from numba import cuda

        return cuda.device_array(nbytes, np.uint8)

    def filled_on(self, array: Any) -> int:
        named = getattr(array, "stream", 0)  # 0, or a stream of Numba's
        return int(named) if named else 0

    def keeper(self, stream: Any) -> object:
        return None if stream.external else stream
