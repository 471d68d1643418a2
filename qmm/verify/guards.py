"""Memory between guards: an access before its first byte or after its last faults.

On the host it lies between pages without access rights; a GPU that reads such pages, registered or not, faults too. On
a GPU it is mapped into the middle of a reserved address range (CUDA's virtual memory management).
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
from contextlib import ExitStack
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qmm.cuda import CudaCallError, call, current_device, drive, register_flags, runtime
from qmm.errors import DeviceError, MappingError
from qmm.loaders.closing import Closing

__all__ = ["DeviceGuard", "Guard", "HostGuard"]

GAP: Final = 1 << 20
"""Bytes on either side of host memory that fault."""
PROT_NONE: Final = 0
MAP_FIXED: Final = 0x10
MAP_NORESERVE: Final = 0x4000


class Guard(Closing):
    """Memory between guards.

    Attributes:
        address: of its first byte.
        nbytes: how many there are; whole pages.
    """

    address: int
    nbytes: int

    def put(self, offset: int, data: npt.NDArray[Any]) -> None:
        """Store bytes from an offset on."""
        raise NotImplementedError

    def fill(self, offset: int, nbytes: int, value: int) -> None:
        """Store a byte so many times from an offset on."""
        raise NotImplementedError

    def get(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """A copy of bytes from an offset on."""
        raise NotImplementedError


class HostGuard(Guard):
    """Host memory of an anonymous file (memfd), mapped shared, as a model's file is.

    Args:
        nbytes: how many are needed.
        device: the CUDA device that it is registered with, for reading; None for none.

    Raises:
        MappingError: there is not enough memory.
        DeviceError: CUDA refuses to register it.
    """

    def __init__(self, nbytes: int, device: int | None = None) -> None:
        self.nbytes = max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        self._resources = ExitStack()
        try:
            self.address = self._map()
            self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))
            if device is not None:
                self._register(device)
        except BaseException:
            self._resources.close()
            raise

    def _map(self) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        around = self.nbytes + 2 * GAP
        nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        start = libc.mmap(None, around, PROT_NONE, nothing, -1, 0)
        if start == ctypes.c_void_p(-1).value:
            raise MappingError(f"{around} bytes of addresses cannot be had: {os.strerror(ctypes.get_errno())}")
        self._resources.callback(libc.munmap, start, around)
        file = os.memfd_create("qmm")
        try:
            os.ftruncate(file, self.nbytes)
            inside = mmap.PROT_READ | mmap.PROT_WRITE
            found = libc.mmap(start + GAP, self.nbytes, inside, mmap.MAP_SHARED | MAP_FIXED, file, 0)
        finally:
            os.close(file)
        if found != start + GAP:
            raise MappingError(f"{self.nbytes} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}")
        return int(found)

    def _register(self, device: int) -> None:
        try:
            with current_device(device):
                call("cudaHostRegister", self.address, self.nbytes, register_flags())
                self._resources.callback(call, "cudaHostUnregister", self.address)
                self.address = int(call("cudaHostGetDevicePointer", self.address, 0))
        except CudaCallError as reason:
            raise DeviceError(f"{self.nbytes} bytes between guards cannot be registered: {reason}") from reason

    def put(self, offset: int, data: npt.NDArray[Any]) -> None:
        """Store bytes from an offset on."""
        self._bytes[offset : offset + data.nbytes] = data.reshape(-1).view(np.uint8)

    def fill(self, offset: int, nbytes: int, value: int) -> None:
        """Store a byte so many times from an offset on."""
        self._bytes[offset : offset + nbytes] = value

    def get(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """A copy of bytes from an offset on."""
        return self.view(offset, nbytes).copy()

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The bytes from an offset on themselves, until it is closed."""
        return self._bytes[offset : offset + nbytes]

    def close(self) -> None:
        """Unregister and unmap it. Closing twice is harmless."""
        self._resources.close()


class DeviceGuard(Guard):
    """Memory of a GPU.

    Args:
        nbytes: how many are needed.
        device: CUDA's number of the GPU.

    Raises:
        DeviceError: there is not enough memory, or CUDA failed otherwise.
    """

    def __init__(self, nbytes: int, device: int) -> None:
        self._device = device
        self._resources = ExitStack()
        try:
            with current_device(device):
                self._map(nbytes)
        except CudaCallError as reason:
            self._resources.close()
            raise DeviceError(f"{nbytes} bytes between guards on CUDA device {device}: {reason}") from reason

    def _map(self, nbytes: int) -> None:
        driver = importlib.import_module("cuda.bindings.driver")
        there = driver.CUmemAllocationProp()
        there.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        there.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        there.location.id = self._device
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        page = int(drive("cuMemGetAllocationGranularity", there, least))
        self.nbytes = max(1, -(-nbytes // page)) * page
        around = self.nbytes + 2 * page
        start = int(drive("cuMemAddressReserve", around, page, 0, 0))
        self._resources.callback(drive, "cuMemAddressFree", start, around)
        memory = drive("cuMemCreate", self.nbytes, there, 0)
        self._resources.callback(drive, "cuMemRelease", memory)
        self.address = start + page
        drive("cuMemMap", self.address, self.nbytes, 0, memory, 0)
        self._resources.callback(drive, "cuMemUnmap", self.address, self.nbytes)
        access = driver.CUmemAccessDesc()
        access.location = there.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        drive("cuMemSetAccess", self.address, self.nbytes, [access], 1)

    def put(self, offset: int, data: npt.NDArray[Any]) -> None:
        """Store bytes from an offset on."""
        with current_device(self._device):
            data = np.ascontiguousarray(data)
            kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
            call("cudaMemcpy", self.address + offset, data.ctypes.data, data.nbytes, kind)

    def fill(self, offset: int, nbytes: int, value: int) -> None:
        """Store a byte so many times from an offset on."""
        with current_device(self._device):
            call("cudaMemset", self.address + offset, value, nbytes)
            call("cudaDeviceSynchronize")  # other streams would not wait for it

    def get(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """A copy of bytes from an offset on."""
        out = np.empty(nbytes, np.uint8)
        with current_device(self._device):
            kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
            call("cudaMemcpy", out.ctypes.data, self.address + offset, nbytes, kind)
        return out

    def close(self) -> None:
        """Free it. Closing twice is harmless."""
        with current_device(self._device):
            self._resources.close()
