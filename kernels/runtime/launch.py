"""Loads kernels on a device, from the cache or compiled, and launches them.

Numba is imported to compile (:mod:`qmm.kernels.runtime.build`), not to launch.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from collections.abc import Mapping
from types import ModuleType

from qmm import cuda
from qmm.children import PerProcess
from qmm.kernels.runtime.cache import CachedKernel, Code
from qmm.kernels.runtime.compiler import check_cuda, compiling
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["Launch", "load", "ptx"]

_loaded: dict[tuple[Kernel, int], cuda.Function] = {}
_lock = PerProcess(threading.Lock)


def load(kernel: Kernel, device: int) -> cuda.Function:
    """A kernel on the current device, compiled and loaded on first use.

    Raises:
        CudaCallError: the driver refused the kernel.
        DeviceError: a setting of Numba forbids compiling.
    """
    found = _loaded.get((kernel, device))
    if found is None:
        with _lock.now:
            found = _loaded.get((kernel, device))
            if found is None:
                found = _loaded[kernel, device] = _load(kernel, device)
    return found


def _load(kernel: Kernel, device: int) -> cuda.Function:
    capability = (
        cuda.attribute("ComputeCapabilityMajor", device),
        cuda.attribute("ComputeCapabilityMinor", device),
    )
    shared_nbytes = cuda.attribute("MaxSharedMemoryPerBlockOptin", device) if kernel.shared else 0
    cached = CachedKernel(kernel.name, kernel.described(), capability)
    found = cached.get()
    if found is not None:
        try:
            return cuda.load_function(found.code, found.entry, shared_nbytes)
        except cuda.CudaCallError as reason:  # refused for any other reason: compile it here
            if reason.out_of_memory:
                raise
    with compiling():
        code = Code(*_build().compiled(kernel, capability))
    function = cuda.load_function(code.code, code.entry, shared_nbytes)
    cached.put(code)
    return function


def ptx(kernel: Kernel, capability: tuple[int, int]) -> str:
    """A kernel's PTX for a compute capability. The compilers are needed, a GPU is not.

    Raises:
        DeviceError: a setting of Numba forbids compiling.
    """
    with _lock.now, compiling():
        return str(_build().assembly_of(kernel, capability))


def _build() -> ModuleType:
    """The module that compiles, with Numba.

    Raises:
        DeviceError: a setting of Numba forbids it.
    """
    check_cuda()
    from qmm.kernels.runtime import build

    return build


class Launch:
    """A launch that can be repeated, its arguments packed once; not for several threads at once."""

    def __init__(
        self,
        kernel: Kernel,
        device: int,
        ctas: int,
        arguments: Mapping[str, int],
        shared_nbytes: int = 0,
        early: bool = False,
    ) -> None:
        """Prepare a launch; the kernel is compiled, if need be.

        Args:
            kernel: what to launch.
            device: CUDA's number of the device, which is the current one.
            ctas: how many CTAs.
            arguments: integers of any type, one for each parameter of the kernel, by name.
            shared_nbytes: dynamic shared memory of a CTA.
            early: whether it may start before its predecessor ends; the kernel must then wait itself.

        Raises:
            TypeError: arguments are missing or unknown.
            CudaCallError: the driver refused the kernel.
            DeviceError: a setting of Numba forbids compiling.
        """
        kernel.check(arguments)
        self.kernel = kernel
        values = [operator.index(arguments[name]) for name in kernel.parameters]
        self._values = (ctypes.c_int64 * len(values))(*values)
        start = ctypes.addressof(self._values)
        self._addresses = (ctypes.c_void_p * len(values))(*[start + 8 * i for i in range(len(values))])
        self._packed = ctypes.addressof(self._addresses)
        self._read: list[object] = []  # keeps the arrays alive
        self._handle, self._launch = load(kernel, device)
        shape = (ctas, kernel.threads, shared_nbytes)
        self._config = cuda.launch_config(*shape, early)
        self._late = cuda.launch_config(*shape, False) if early else self._config
        self._stream: int | None = None
        self._cells: dict[str, ctypes.c_int64] = {}

    def cell(self, name: str) -> ctypes.c_int64:
        """An argument, to be changed before the next launch by setting its ``value``."""
        cell = self._cells.get(name)
        if cell is None:
            offset = 8 * self.kernel.parameters.index(name)
            cell = self._cells[name] = ctypes.c_int64.from_buffer(self._values, offset)
        return cell

    def read_from(self, name: str, values: ctypes.Array[ctypes.c_int64], index: int) -> None:
        """From now on, take an argument from an element of an array, as it is when the launch is queued."""
        self._addresses[self.kernel.parameters.index(name)] = ctypes.addressof(values) + 8 * index
        self._read.append(values)

    def queue(self, stream: int, early: bool = True) -> None:
        """Put the launch on a stream (its handle; 0 is the default stream).

        Args:
            stream: where.
            early: if False, it starts after its predecessor whatever it was prepared for.

        Raises:
            CudaCallError: the driver refused; the message names the kernel.
        """
        if stream != self._stream:
            self._config.hStream = self._late.hStream = stream
            self._stream = stream
        (error,) = self._launch(self._config if early else self._late, self._handle, self._packed, 0)
        if error:
            cuda.refuse_launch(self.kernel.name, error)
