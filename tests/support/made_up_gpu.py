"""A GPU for ``qmm smoke`` that is none: registering does nothing, and kernels read host memory."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

import qmm.cli.smoke
import qmm.device
import qmm.direct

__all__ = ["MadeUpDevice", "MadeUpRegistration", "install"]


class MadeUpDevice:
    """A GPU whose kernels read host memory, as one does at equal addresses."""

    stream = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> MadeUpDevice:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def read_host(device: MadeUpDevice, address: int, nbytes: int, stream: int) -> bytes:
    return ctypes.string_at(address, nbytes)


class MadeUpRegistration:
    """A registration of nothing: the device's addresses are the host's."""

    def __init__(self, mapping: Any) -> None:
        self.base = mapping.address
        self.nbytes_registered = mapping.nbytes

    @classmethod
    def of(cls, mapping: Any, ranges: Any, device: int) -> MadeUpRegistration:
        return cls(mapping)

    def address(self, offset: int, nbytes: int) -> int:
        return int(self.base + offset)

    def host_address(self, offset: int) -> int:
        return int(self.base + offset)

    def close(self) -> None:
        pass

    def __enter__(self) -> MadeUpRegistration:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the place of the first GPU."""
    described = SimpleNamespace(name="Test GPU", capability=(9, 0), maps_read_only=True)
    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", lambda number: described)
    monkeypatch.setattr(qmm.cli.smoke, "require_compiler", lambda: None)
    monkeypatch.setattr(qmm.cli.smoke, "first_contact", lambda mapping, device, gpu: None)
    monkeypatch.setattr(qmm.cli.smoke, "HostRegistration", MadeUpRegistration)
    monkeypatch.setattr(qmm.cli.smoke, "call", lambda function, address: SimpleNamespace(type=0))
    monkeypatch.setattr(qmm.device, "Device", MadeUpDevice)
    monkeypatch.setattr(qmm.direct, "read_bytes", read_host)
