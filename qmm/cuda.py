"""Calling the CUDA runtime through cuda-python, with errors that name the call. Imports CUDA at the first call."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from qmm import extras

__all__ = ["CudaCallError", "advice", "attribute", "call", "current_device", "drive", "register_flags", "runtime"]

# What calls that release something return when nothing is left to release: the driver or the device's context is on its
# way out, or somebody called cudaDeviceReset.
GONE: Final = frozenset(
    {
        "cudaErrorContextIsDestroyed",
        "cudaErrorCudartUnloading",
        "cudaErrorHostMemoryNotRegistered",
        "cudaErrorInitializationError",
    }
)


STICKY: Final = frozenset({214, 220, 226, *range(700, 703), 710, *range(714, 720)})
"""Numbers of errors, the same in the runtime and the driver, after which a process can do nothing more on its device:
``cudaErrorECCUncorrectable`` (214), ``cudaErrorIllegalAddress`` (700), ``cudaErrorLaunchFailure`` (719), and so on."""
LOST: Final = (
    "A kernel of this process failed, here or earlier, qmm's or another's, and the device takes no more work from the "
    "process: start a new one."
)
FORKED: Final = (
    "CUDA was in use when this process was forked, which it does not survive: start the process with the spawn method, "
    "or use CUDA in children only."
)


class CudaCallError(Exception):
    """A runtime call failed; its message is ``cudaHostRegister returned cudaErrorInvalidValue (1)``.

    Attributes:
        name: CUDA's name of the error, such as ``"cudaErrorInvalidValue"``.
        number: CUDA's number of it; 0 where there was no call.
    """

    def __init__(self, message: str, name: str = "", number: int = 0) -> None:
        super().__init__(message)
        self.name = name
        self.number = number

    @property
    def gone(self) -> bool:
        """Whether a call that releases something failed because CUDA has released it already."""
        return self.name in GONE


@functools.cache
def runtime() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        CudaCallError: cuda-python is not installed.
    """
    _first_process()
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as reason:
        message = f"cuda-python cannot be imported ({reason}); {extras.for_gpu()}"
        raise CudaCallError(message) from reason


def call(function: str, *arguments: Any) -> Any:
    """The result of ``cuda.bindings.runtime.<function>(*arguments)``, None if it has none, a tuple if it has several.

    Raises:
        CudaCallError: It did not return cudaSuccess. The runtime's last error is cleared: otherwise the next innocent
            caller who asks for it gets it, such as the check after somebody's kernel launch.
    """
    error, *results = getattr(runtime(), function)(*arguments)
    if int(error) != 0:
        runtime().cudaGetLastError()
    return _result(function, error, results)


def drive(function: str, *arguments: Any) -> Any:
    """The same of the driver: of ``cuda.bindings.driver.<function>(*arguments)``."""
    error, *results = getattr(importlib.import_module("cuda.bindings.driver"), function)(*arguments)
    return _result(function, error, results)


def _result(function: str, error: Any, results: list[Any]) -> Any:
    if int(error) != 0:
        message = f"{function} returned {error.name} ({int(error)}){advice(int(error))}"
        raise CudaCallError(message, error.name, int(error))
    return tuple(results) if len(results) > 1 else results[0] if results else None


def register_flags() -> int:
    """The flags under which ``cudaHostRegister`` takes a read-only, shared mapping, and no others."""
    cuda = runtime()
    return int(cuda.cudaHostRegisterPortable | cuda.cudaHostRegisterMapped | cuda.cudaHostRegisterReadOnly)


def advice(number: int) -> str:
    """What to do about an error of this number beyond its name, as the end of a message; mostly nothing."""
    if number in STICKY:
        return f". {LOST}"
    return f". {FORKED}" if _first_process() != os.getpid() else ""


@functools.cache
def _first_process() -> int:
    """The process that used CUDA first; a forked child inherits the answer."""
    return os.getpid()


def attribute(name: str, device: int) -> int:
    """The device attribute ``name``, without its prefix ``cudaDevAttr``."""
    value: int = call("cudaDeviceGetAttribute", getattr(runtime().cudaDeviceAttr, f"cudaDevAttr{name}"), device)
    return value


@contextmanager
def current_device(device: int) -> Iterator[None]:
    """Make ``device`` this thread's current one inside the block."""
    before = call("cudaGetDevice")
    try:
        # Also where it is current already: from CUDA 12 on this makes its primary context, and reports if it cannot.
        call("cudaSetDevice", device)
        yield
    finally:
        if before != device:
            call("cudaSetDevice", before)
