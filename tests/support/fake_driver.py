"""A CUDA driver for machines without one: it loads code, takes launches, and notes both."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from cuda.bindings import driver

from qmm import cuda
from qmm.kernels.lang.constants import Constants
from qmm.kernels.runtime import launch
from qmm.kernels.runtime.cache import CachedKernel, Code
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["ANSWERS", "SHARED_NBYTES", "Driver", "Launched", "install"]

SHARED_NBYTES = 232448
"""The most shared memory that a CTA may ask it for."""
ANSWERS = {"ComputeCapabilityMajor": 9, "ComputeCapabilityMinor": 0, "MaxSharedMemoryPerBlockOptin": SHARED_NBYTES}
"""Attributes of the device."""


@dataclass(frozen=True)
class Launched:
    """What a launch was asked to be, with its arguments as they were then."""

    function: Any
    blocks: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared_nbytes: int
    stream: int
    early: bool
    arguments: tuple[int, ...]


class Driver:
    """Loads the code which is right; all else but launches succeeds and does nothing.

    Attributes:
        accepts: whether code is right.
        arguments: how many, 64 bits each, the kernels have that are launched.
        refuses: the error that launches end with, if any.
        functions: attributes that were set of functions.
        launches: those that were made.
    """

    def __init__(self) -> None:
        self.accepts: Callable[[bytes], bool] = lambda code: code.startswith(b"\x7fELF")
        self.arguments = 0
        self.refuses: Any = driver.CUresult.CUDA_SUCCESS
        self.functions: list[tuple[Any, int]] = []
        self.launches: list[Launched] = []

    def kernel(self, function: Callable[..., None], threads: int = 96, shared: bool = False) -> Kernel:
        """A kernel that is found in the cache, so that nothing is compiled."""
        kernel = Kernel("example", function, Constants(), threads, shared=shared)
        self.arguments = len(kernel.parameters)
        CachedKernel(kernel.name, kernel.described(), (9, 0)).put(Code("example", b"\x7fELF example"))
        return kernel

    def __getattr__(self, name: str) -> Any:
        return (lambda *arguments: (0,)) if name.startswith("cu") else getattr(driver, name)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:  # noqa: N802
        return (0, code) if self.accepts(code) else (driver.CUresult.CUDA_ERROR_INVALID_IMAGE, None)

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        return (0, name) if name in module else (driver.CUresult.CUDA_ERROR_NOT_FOUND, None)

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> tuple[int]:  # noqa: N802
        self.functions.append((attribute, value))
        return (0,)

    def cuStreamGetId(self, stream: Any) -> tuple[Any, int]:  # noqa: N802
        return (0, int(stream))

    def cuStreamIsCapturing(self, stream: Any) -> tuple[Any, int]:  # noqa: N802
        return (0, 0)

    def cuLaunchKernelEx(self, config: Any, function: Any, packed: int, extra: int) -> tuple[Any]:  # noqa: N802
        assert extra == 0
        addresses = (ctypes.c_void_p * self.arguments).from_address(packed)
        kind = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attributes = config.attrs[: config.numAttrs]
        launched = Launched(
            function,
            (config.gridDimX, config.gridDimY, config.gridDimZ),
            (config.blockDimX, config.blockDimY, config.blockDimZ),
            config.sharedMemBytes,
            int(config.hStream),
            any(one.id == kind and one.value.programmaticStreamSerializationAllowed for one in attributes),
            tuple(ctypes.c_int64.from_address(address).value for address in addresses),
        )
        self.launches.append(launched)
        return (self.refuses,)


def install(patch: pytest.MonkeyPatch) -> Driver:
    """Put one in the place of CUDA's, on a machine with one device."""
    made = Driver()
    patch.setattr(cuda, "driver", lambda: made)
    patch.setattr(cuda, "attribute", lambda name, device: ANSWERS[name])
    patch.setattr(launch, "_loaded", {})
    return made
