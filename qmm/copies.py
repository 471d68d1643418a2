"""Copies between host arrays and a device.

CUDA refuses to copy to or from host memory of which some pages are registered and some are not, as where somebody has
registered a neighbour of the array. Such an array goes through pages of its own.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmm.errors import DeviceError

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["copy_in", "copy_out"]


def copy_in(device: Device, target: int, array: npt.NDArray[Any], stream: int) -> None:
    """Copy a contiguous host array to the device, on a stream, which is waited for before the array may be changed.

    Raises:
        DeviceError: CUDA refused.
    """
    if array.nbytes and not _copied(device, target, array.ctypes.data, array.nbytes, stream):
        pages = _own_pages(array.nbytes)
        pages[:] = array.reshape(-1).view(np.uint8)
        device.copy(target, pages.ctypes.data, array.nbytes, stream)
        device.synchronize(stream)


def copy_out(device: Device, array: npt.NDArray[Any], source: int, stream: int) -> None:
    """Copy from the device into a contiguous host array, on a stream, and wait for it.

    Raises:
        DeviceError: CUDA refused.
    """
    if array.nbytes and not _copied(device, array.ctypes.data, source, array.nbytes, stream):
        pages = _own_pages(array.nbytes)
        device.copy(pages.ctypes.data, source, array.nbytes, stream)
        device.synchronize(stream)
        array.reshape(-1).view(np.uint8)[:] = pages
    device.synchronize(stream)


def _copied(device: Device, target: int, source: int, nbytes: int, stream: int) -> bool:
    """Copy, unless CUDA refuses the array's pages."""
    try:
        device.copy(target, source, nbytes, stream)
    except DeviceError as error:
        if getattr(error.__cause__, "name", "") != "cudaErrorInvalidValue":
            raise
        return False
    return True


def _own_pages(nbytes: int) -> npt.NDArray[np.uint8]:
    """Host memory in pages that nobody has registered."""
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
