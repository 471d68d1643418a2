"""NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qmm.arrays.kind import ArrayKind, as_rows, check_dtype
from qmm.arrays.view import View
from qmm.errors import ArrayError

__all__ = ["NumPyArrays"]


class NumPyArrays(ArrayKind):
    """``numpy.ndarray``; bfloat16 is that of the package ml_dtypes."""

    name = "NumPy"
    on_gpu = False

    def view(self, array: np.ndarray[Any, Any]) -> View:
        dtype = check_dtype(array.dtype.name, "a NumPy array")
        if not array.dtype.isnative:
            raise ArrayError(
                "a NumPy array of foreign byte order is not supported; use x.astype(x.dtype.newbyteorder('='))"
            )
        return View(
            array.shape, array.strides, dtype, array.__array_interface__["data"][0], None, array.flags.writeable
        )

    def empty(self, shape: tuple[int, ...], like: np.ndarray[Any, Any], stream: Any = None) -> np.ndarray[Any, Any]:
        return np.empty(shape, like.dtype)

    def to_host(self, array: np.ndarray[Any, Any]) -> npt.NDArray[np.float32]:
        return as_rows(np.ascontiguousarray(array, np.float32))

    def from_host(self, values: npt.NDArray[np.float32], target: np.ndarray[Any, Any]) -> None:
        with np.errstate(over="ignore"):  # float16 overflows to infinity, as on the GPU
            target[...] = values.reshape(target.shape).astype(target.dtype, copy=False)

    def in_place(self, array: np.ndarray[Any, Any], shape: tuple[int, int]) -> npt.NDArray[np.float32] | None:
        flags = array.flags
        if array.dtype != np.float32 or not (flags.c_contiguous and flags.aligned):
            return None
        return np.asarray(array).reshape(shape)
