"""The placement of an engine: the residency of each of its tensors, and the bytes that they hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qmm.errors import TensorNotFoundError
from qmm.loaders.access.registered import HostRegistration
from qmm.loaders.mapping import FileMapping
from qmm.memory.residency import CopyResidency, HostResidency, MappedResidency, Residency
from qmm.model import Tensor

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["Weights"]


class Weights:
    """The tensors of an engine, and the residency of each.

    It has its own handles on the mappings, so the model may be closed.
    """

    def __init__(self, tensors: Iterable[Tensor], placement: str, device: Device | None) -> None:
        """Give tensors the residency of a placement.

        Args:
            tensors: the tensors that will be used.
            placement: ``"host"`` (the CPU reads the mapping), ``"mapped"`` (the GPU does; the pages under the tensors
                are registered now) or ``"device"`` (copies on the GPU, each when it is first used).
            device: the GPU; None for ``"host"``.

        Raises:
            RegistrationError: CUDA refuses to register the pages.
        """
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._mappings: dict[Path, FileMapping] = {}
        self._registrations: dict[Path, HostRegistration] = {}
        self._residencies: dict[str, Residency] = {}
        try:
            for tensor in self._tensors.values():
                path = tensor.info.path
                if path not in self._mappings:
                    self._mappings[path] = tensor.model.mapping(path).share()
            if placement == "mapped" and device is not None:
                self._register(device.number)
            for tensor in self._tensors.values():
                self._residencies[tensor.name] = self._resident(tensor, placement, device)
        except BaseException:
            self.close()
            raise

    def _register(self, device: int) -> None:
        for path, mapping in self._mappings.items():
            ranges = [
                (tensor.info.offset, tensor.nbytes)
                for tensor in self._tensors.values()
                if tensor.info.path == path and tensor.nbytes
            ]
            self._registrations[path] = HostRegistration.of(mapping, ranges, device)

    def _resident(self, tensor: Tensor, placement: str, device: Device | None) -> Residency:
        mapping = self._mappings[tensor.info.path]
        if device is None:
            return HostResidency(tensor, mapping)
        if placement == "mapped":
            return MappedResidency(tensor, mapping, self._registrations[tensor.info.path])
        return CopyResidency(tensor, mapping, device)

    @property
    def nbytes(self) -> int:
        """Bytes that are held beyond the file's own mapping: registered pages, and copies."""
        copies = sum(residency.nbytes for residency in self._residencies.values())
        return copies + sum(registration.nbytes_registered for registration in self._registrations.values())

    def __getitem__(self, tensor: Tensor) -> Residency:
        """A tensor's residency.

        Raises:
            TensorNotFoundError: the engine is for other tensors.
        """
        try:
            return self._residencies[tensor.name]
        except KeyError:
            raise TensorNotFoundError(
                f"{tensor.info.path}: the engine is for {len(self._tensors)} tensors, and {tensor.name!r} is not "
                "among them. Name it in Engine(tensors=...)."
            ) from None

    def close(self) -> None:
        """Release everything; the device must be done with it."""
        try:
            for residency in self._residencies.values():
                residency.release()
        finally:
            try:
                for registration in self._registrations.values():
                    registration.close()
            finally:
                for mapping in self._mappings.values():
                    mapping.close()
