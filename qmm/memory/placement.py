"""The placements: where an engine's device reads the weights, and what that holds on to."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qmm.errors import DeviceError, RegistrationError, TensorNotFoundError
from qmm.loaders.access.registered import HostRegistration
from qmm.loaders.mapping import FileMapping
from qmm.model import Tensor

if TYPE_CHECKING:
    from qmm.device import GPU

__all__ = ["DeviceCopies", "HostWeights", "MappedWeights", "Weights"]

PIECE_NBYTES = 64 << 20
"""The most bytes of a file that are copied to other memory on their way to the GPU."""


class Weights:
    """The tensors that an engine was made for, and their addresses on its device.

    It has mapping handles of its own, so that the model may be closed, and compares the file with what was mapped
    before each use of the mapping: the operating system ends the process that reads a page of a file that became
    shorter. A copy on the device is used without a look at the file.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._mappings: dict[Path, FileMapping] = {}
        for tensor in self._tensors.values():
            path = tensor.info.path
            if path not in self._mappings:
                self._mappings[path] = tensor.model.mapping(path).share()

    @property
    def nbytes(self) -> int:
        """Bytes that the placement takes beyond the file's own mapping."""
        return 0

    def address(self, tensor: Tensor) -> int:
        """The device's address of the tensor's first byte; 0 for a tensor without values.

        Raises:
            MappingError: the file changed since it was mapped.
            TensorNotFoundError: the engine was made for other tensors.
        """
        if tensor.name not in self._tensors:
            raise TensorNotFoundError(
                f"{tensor.info.path}: the engine was made for {len(self._tensors)} tensors, and {tensor.name!r} is not "
                "among them. Name it in Engine(tensors=...)."
            )
        return self._locate(tensor) if tensor.nbytes else 0

    def _locate(self, tensor: Tensor) -> int:
        raise NotImplementedError

    def check(self, tensor: Tensor) -> None:
        """What :meth:`address` looks at each time, without the address.

        Raises:
            MappingError: the file changed since it was mapped.
        """
        self._mappings[tensor.info.path].check()

    def close(self) -> None:
        """Give up everything; the device must be done with it."""
        for mapping in self._mappings.values():
            mapping.close()


class HostWeights(Weights):
    """Placement ``host``: the CPU reads the mapping."""

    def _locate(self, tensor: Tensor) -> int:
        mapping = self._mappings[tensor.info.path]
        mapping.check()
        return mapping.address + tensor.info.offset


class MappedWeights(Weights):
    """Placement ``mapped``: the GPU reads the mapping, whose pages under the tensors are registered."""

    def __init__(self, tensors: Iterable[Tensor], gpu: GPU) -> None:
        super().__init__(tensors)
        self._registrations: dict[Path, HostRegistration] = {}
        try:
            for path, mapping in self._mappings.items():
                ranges = [
                    (tensor.info.offset, tensor.nbytes)
                    for tensor in self._tensors.values()
                    if tensor.info.path == path and tensor.nbytes
                ]
                self._registrations[path] = HostRegistration.of(mapping, ranges, gpu.device)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of registered pages."""
        return sum(registration.nbytes_registered for registration in self._registrations.values())

    def _locate(self, tensor: Tensor) -> int:
        self._mappings[tensor.info.path].check()
        return self._registrations[tensor.info.path].address(tensor.info.offset, tensor.nbytes)

    def close(self) -> None:
        """Unregister what no other engine uses."""
        try:
            for registration in self._registrations.values():
                registration.close()
        finally:
            super().close()


class DeviceCopies(Weights):
    """Placement ``device``: each tensor's bytes, copied to the GPU when it is first used, with no padding."""

    def __init__(self, tensors: Iterable[Tensor], gpu: GPU, registers: bool = True) -> None:
        super().__init__(tensors)
        self._gpu = gpu
        self._registers = registers
        self._copies: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes copied so far."""
        return sum(self._tensors[name].nbytes for name in self._copies)

    def _locate(self, tensor: Tensor) -> int:
        with self._lock:
            if tensor.name not in self._copies:
                self._copies[tensor.name] = self._copy(tensor)
            return self._copies[tensor.name]

    def check(self, tensor: Tensor) -> None:
        """Nothing: the copy is used, not the file."""

    def _copy(self, tensor: Tensor) -> int:
        mapping = self._mappings[tensor.info.path]
        mapping.check()
        target = self._gpu.allocate(tensor.nbytes, f"a copy of tensor {tensor.name!r}")
        try:
            self._fill(target, mapping, tensor.info.offset, tensor.nbytes)
        except BaseException:
            with suppress(DeviceError):  # the error at hand is the one to show
                self._gpu.free(target)
            raise
        return target

    def _fill(self, target: int, mapping: FileMapping, offset: int, nbytes: int) -> None:
        """Copy bytes of a file. From registered pages the copy engine runs at the link's speed; where registering is
        refused, a slower way still works."""
        registration = None
        if self._registers:
            with suppress(RegistrationError):
                registration = HostRegistration.of(mapping, [(offset, nbytes)], self._gpu.device)
        if registration is not None:
            with registration:
                for piece in registration.pieces(offset, nbytes):
                    self._transfer(target + piece.start - offset, mapping.address + piece.start, piece.nbytes)
            return
        # By way of memory of its own: some of the pages may be registered by others, and CUDA copies from no two kinds.
        for start in range(offset, offset + nbytes, PIECE_NBYTES):
            part = mapping.view(start, min(PIECE_NBYTES, offset + nbytes - start)).copy()
            self._transfer(target + start - offset, part.ctypes.data, part.nbytes)

    def _transfer(self, target: int, source: int, nbytes: int) -> None:
        self._gpu.copy(target, source, nbytes, self._gpu.stream)
        self._gpu.synchronize(self._gpu.stream)

    def close(self) -> None:
        """Free the copies."""
        try:
            for address in self._copies.values():
                self._gpu.free(address)
            self._copies.clear()
        finally:
            super().close()
