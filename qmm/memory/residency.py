"""The residency of tensors: the memory that a tensor is in now, and the address at which the device reads it.

A :class:`Residency` is one tensor's; the placement of an engine decides which kind it is. Addresses are asked for when
work is queued, not when it is prepared, so that a tensor may move.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from qmm.errors import ClosedError, DeviceError
from qmm.kernels.ops.op import WeightLayout
from qmm.loaders.access.registered import HostRegistration
from qmm.loaders.mapping import FileMapping
from qmm.model import Tensor

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["CopyResidency", "HostResidency", "MappedResidency", "Residency"]


class Residency:
    """The memory that one tensor is in.

    Attributes:
        where: ``"host"``, ``"mapped"`` or ``"device"``.
        tensor: which.
    """

    where: str

    def __init__(self, tensor: Tensor, mapping: FileMapping) -> None:
        """``mapping`` is the engine's own handle on the tensor's file."""
        self.tensor = tensor
        self.mapping = mapping

    @property
    def nbytes(self) -> int:
        """Device memory that it takes."""
        return 0

    def layout(self) -> WeightLayout:
        """The properties of its memory that plans depend on."""
        return WeightLayout.at(self.lease(), self.where == "mapped")

    def lease(self) -> int:
        """The address of its first byte, for work that is queued now; 0 for a tensor without values.

        Raises:
            MappingError: the file changed since it was mapped. The operating system ends a process that reads a page
                of a file that became shorter, so this is checked each time.
            DeviceError: a copy does not fit the device.
        """
        raise NotImplementedError

    def check(self) -> None:
        """The checks of :meth:`lease`, without the address.

        Raises:
            MappingError: the file changed since it was mapped.
        """
        self.mapping.check()

    def release(self) -> None:
        """Release what it holds beyond the mapping; the device must be done with it."""


class HostResidency(Residency):
    """The CPU reads the mapping."""

    where = "host"

    def lease(self) -> int:
        """The host's address."""
        if not self.tensor.nbytes:
            return 0
        self.mapping.check()
        return self.mapping.address + self.tensor.info.offset


class MappedResidency(Residency):
    """The GPU reads the mapping, whose pages under the tensor are registered."""

    where = "mapped"

    def __init__(self, tensor: Tensor, mapping: FileMapping, registration: HostRegistration) -> None:
        super().__init__(tensor, mapping)
        self._registration = registration
        self._address = registration.address(tensor.info.offset, tensor.nbytes) if tensor.nbytes else 0

    def lease(self) -> int:
        """The device's address of the mapping."""
        if self._address:
            self.mapping.check()
        return self._address


class CopyResidency(Residency):
    """The tensor's bytes, copied to the GPU when it is first used, with no padding. The file is not read again."""

    where = "device"

    def __init__(self, tensor: Tensor, mapping: FileMapping, device: Device) -> None:
        super().__init__(tensor, mapping)
        self._device = device
        self._address = 0
        self._released = False
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of the copy, once there is one."""
        return self.tensor.nbytes if self._address else 0

    def lease(self) -> int:
        """The address of the copy; the first use copies."""
        if not self._address and self.tensor.nbytes:
            with self._lock:
                if self._released:  # by another thread, after this one's call began
                    raise ClosedError(f"{self.tensor.info.path}: the engine was closed. Create another one.")
                if not self._address:
                    copy = self._copy()
                    if self.nbytes:  # a signal handler or a finalizer of this thread has copied it meanwhile
                        self._device.free(copy)
                    else:
                        self._address = copy
        return self._address

    def check(self) -> None:
        """Checks nothing: the copy is used, not the file."""

    def _copy(self) -> int:
        self.mapping.check()
        nbytes = self.tensor.nbytes
        target = self._device.allocate(nbytes, f"a copy of tensor {self.tensor.name!r}")
        try:
            self._device.uploads.copy(target, self.mapping, self.tensor.info.offset, nbytes)
            self.mapping.check()  # it may have been written to while it was copied
        except BaseException:
            with suppress(DeviceError):  # the first error takes precedence
                self._device.synchronize(self._device.stream)  # it may have come before a transfer was waited for
                self._device.free(target)
            raise
        return target

    def release(self) -> None:
        """Free the copy, and make no other."""
        self._released = True
        with self._lock:  # another thread may be copying
            if self._address:
                self._device.free(self._address)
                self._address = 0
