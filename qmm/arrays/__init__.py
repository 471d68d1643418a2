"""The kinds of array that activations come as and results go back as: NumPy, PyTorch, CuPy and Numba.

:class:`View` says where an array lies; an :class:`ArrayKind` is what qmm needs of one library. The optional three are
not imported here: who passes a tensor has imported its library, which is found by the tensor's class.
"""

from __future__ import annotations

import ctypes
import operator
import os
import sys
from contextlib import suppress
from typing import Any

import numpy as np

from qmm.arrays.cuda_interface import CuPyArrays, NumbaArrays
from qmm.arrays.kind import ArrayKind, FollowedError
from qmm.arrays.numpy import NumPyArrays
from qmm.arrays.torch import TorchArrays, TorchSubclasses
from qmm.arrays.view import View
from qmm.errors import ArrayError, DeviceError
from qmm.kernels.ops.op import DTYPES

__all__ = [
    "DTYPES",
    "KINDS",
    "ArrayKind",
    "FollowedError",
    "View",
    "keeper_of",
    "kind_of",
    "release_caches",
    "stream_handle",
]


_NUMPY = NumPyArrays()
_TORCH = TorchArrays()
_TORCH_SUBCLASSES = TorchSubclasses()
_CUPY = CuPyArrays()
_NUMBA = NumbaArrays()


PER_THREAD = 2
"""cudaStreamPerThread."""
_LEGACY = (1,) if os.environ.get("CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM", "0") != "0" else (0, 1)
"""Handles of the default stream that all threads share: 0 is each thread's own if cuda-python is told so."""


class _Kinds(dict[type, ArrayKind]):
    """Filled on first use of a class, so that later lookups run no Python code."""

    def __missing__(self, cls: type) -> ArrayKind:
        self[cls] = _find_kind(cls)
        return self[cls]


KINDS: dict[type, ArrayKind] = _Kinds()
"""The library of an array, by the array's class; looking up an unsupported class raises what :func:`kind_of` raises."""


def kind_of(array: Any) -> ArrayKind:
    """The library that an array is from.

    Raises:
        ArrayError: qmm does not support it.
    """
    return KINDS[type(array)]


def _find_kind(cls: type) -> ArrayKind:
    if issubclass(cls, np.ndarray):
        if cls is not np.ndarray and issubclass(cls, np.ma.MaskedArray):
            raise ArrayError(
                "a masked NumPy array is not supported, for the result would have no mask. Pass x.filled(0), or x.data"
            )
        return _NUMPY
    for base in cls.__mro__:
        root = base.__module__.partition(".")[0]
        if root == "torch" and base.__name__ == "Tensor":
            own = cls.__torch_dispatch__ is not base.__torch_dispatch__  # type: ignore[attr-defined]
            return _TORCH_SUBCLASSES if own else _TORCH
        if root == "cupy" and base.__name__ == "ndarray":
            return _CUPY
        if root in ("numba", "numba_cuda") and hasattr(base, "__cuda_array_interface__"):
            return _NUMBA
    raise ArrayError(
        f"{cls.__module__}.{cls.__qualname__} is not an array that qmm supports. Pass a NumPy, CuPy, PyTorch "
        "or Numba array: np.asarray converts a list, cupy.asarray anything with the CUDA array interface."
    )


def release_caches() -> None:
    """Let the libraries that this process has imported give back GPU memory that they merely keep. What they refuse,
    as during a capture, stays with them."""
    for kind, module in ((_TORCH, "torch"), (_CUPY, "cupy")):
        if module in sys.modules:
            with suppress(Exception):
                kind.release_cache()


def keeper_of(owner: Any, handle: int, device: int) -> object:
    """What keeps a stream from being destroyed while work is queued on it.

    A stream that is destroyed while kernels are queued on it that may start before their predecessors end (programmatic
    dependent launch) can hang the device for good: seen on an H100 and an H200 with driver 580.

    Args:
        owner: the stream's object, or the kind of array whose library uses the stream now.
        handle: of the stream.
        device: CUDA's number of the device.

    Returns:
        True if nothing destroys it; an object that does not destroy it as long as it exists; or None.
    """
    if handle in _LEGACY:
        return True
    if handle in (0, PER_THREAD):  # of each thread another one, which is destroyed when its thread ends
        return None
    if isinstance(owner, ArrayKind):
        kind, owner = owner, owner.current(device)
    else:
        root = type(owner).__module__.partition(".")[0]
        found = {"torch": _TORCH, "cupy": _CUPY, "numba": _NUMBA, "numba_cuda": _NUMBA}.get(root)
        if found is None:
            return None
        kind = found
    return None if owner is None else kind.keeper(owner)


def stream_handle(stream: Any) -> int:
    """The handle of a stream of any library; an integer is a handle already.

    Raises:
        DeviceError: qmm does not support it.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        described = stream.__cuda_stream__
        return int((described() if callable(described) else described)[1])
    for attribute in ("cuda_stream", "ptr", "handle", "value"):  # PyTorch, CuPy, Numba, ctypes
        value = getattr(stream, attribute, None)
        if value is not None:
            return int(getattr(value, "value", value) or 0)
    if isinstance(stream, ctypes.c_void_p):  # NULL, whose value is None
        return 0
    if hasattr(stream, "__index__"):
        return operator.index(stream)
    raise DeviceError(f"{stream!r} is not a stream that qmm supports: pass one of PyTorch, CuPy or Numba, or a handle")
