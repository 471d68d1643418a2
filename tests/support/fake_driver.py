"""A CUDA driver for machines without one: it loads code, takes launches, and notes both."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cuda.bindings import driver

from qmm.kernels.runtime.cache import CachedKernel, Code
from qmm.kernels.runtime.launch import CUDAKernel

__all__ = ["SHARED_NBYTES", "Driver", "Launched"]

SHARED_NBYTES = 232448
"""The most shared memory that a block may ask it for."""
ANSWERS = {
    driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9,
    driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: SHARED_NBYTES,
}


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

    def kernel(self, arguments: int, threads: int = 96, shared: bool = False) -> CUDAKernel:
        """A kernel of so many arguments that is found in the cache, so that nothing is compiled."""

        def build() -> None:
            raise AssertionError("it is in the cache")

        self.arguments = arguments
        kernel = CUDAKernel("example", build, arguments, {"arguments": arguments}, threads, shared)
        CachedKernel(kernel.name, kernel.key, (9, 0)).put(Code("example", b"\x7fELF example"))
        return kernel

    def __getattr__(self, name: str) -> Any:
        return (lambda *arguments: (0,)) if name.startswith("cu") else getattr(driver, name)

    def cuDeviceGetAttribute(self, kind: Any, device: int) -> tuple[int, int]:  # noqa: N802
        return 0, ANSWERS.get(kind, 0)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:  # noqa: N802
        return (0, code) if self.accepts(code) else (driver.CUresult.CUDA_ERROR_INVALID_IMAGE, None)

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        return (0, name) if name in module else (driver.CUresult.CUDA_ERROR_NOT_FOUND, None)

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> tuple[int]:  # noqa: N802
        self.functions.append((attribute, value))
        return (0,)

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
