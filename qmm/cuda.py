"""The one place that calls CUDA's runtime and driver, through cuda-python, and turns failures into errors.

An error names the call. CUDA is imported at the first call. Launches go to the driver, with arguments packed once:
4.9 us on the host (H100), where cuda.core takes 5.0 and Numba four times as much. Streams come as handles of other
libraries, which cuda.core would have to wrap first; ``kernels/README.md`` has what else of it was measured.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, NamedTuple, NoReturn

from qmm import extras

__all__ = [
    "ANYWHERE",
    "CudaCallError",
    "Function",
    "advice",
    "attribute",
    "call",
    "capture_of",
    "current_device",
    "drive",
    "driver",
    "launch_config",
    "load_function",
    "on_device",
    "refuse",
    "refuse_launch",
    "register_flags",
    "runtime",
]

# What releasing calls return if CUDA has released everything already: the driver or the context is shutting down, or
# cudaDeviceReset was called.
GONE: Final = frozenset(
    {
        "cudaErrorContextIsDestroyed",
        "cudaErrorCudartUnloading",
        "cudaErrorHostMemoryNotRegistered",
        "cudaErrorInitializationError",
    }
)


STICKY: Final = frozenset({214, 220, 226, *range(700, 703), 710, *range(714, 720)})
"""Numbers of errors, the same in runtime and driver, after which a process cannot use its device any more:
``cudaErrorECCUncorrectable`` (214), ``cudaErrorIllegalAddress`` (700), ``cudaErrorLaunchFailure`` (719), and so on."""
LOST: Final = (
    "A kernel of this process failed, here or earlier, qmm's or another's, and the device takes no more work from the "
    "process: start a new one."
)
ANYWHERE: Final = 4
"""cudaMemcpyDefault: the addresses of a copy say where they are."""
OUT_OF_MEMORY: Final = 2
"""cudaErrorMemoryAllocation, CUDA_ERROR_OUT_OF_MEMORY."""
CAPTURE_IMPLICIT: Final = 906
"""cudaErrorStreamCaptureImplicit."""
BLOCKED: Final = (
    "CUDA forbids the default stream while a stream is captured that would wait for it: use another stream, or "
    "capture a non-blocking one."
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

    @property
    def out_of_memory(self) -> bool:
        """Whether it is for want of memory; the runtime and the driver have the same number for that."""
        return self.number == OUT_OF_MEMORY

    @property
    def captured(self) -> bool:
        """Whether a capture was in the way, and the call may succeed once it has ended."""
        return self.name.startswith(("cudaErrorStreamCapture", "CUDA_ERROR_STREAM_CAPTURE"))


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
        CudaCallError: It did not return cudaSuccess. The runtime's last error is cleared: else the next
            unrelated check for it, such as after another library's launch, would report it.
    """
    error, *results = getattr(runtime(), function)(*arguments)
    if error:
        refuse(function, error)
    return _result(results)


def refuse(function: str, error: Any) -> NoReturn:
    """Raise what :func:`call` does where a function returned an error."""
    runtime().cudaGetLastError()
    raise _failure(function, error)


@functools.cache
def driver() -> Any:
    """The module ``cuda.bindings.driver``."""
    return importlib.import_module("cuda.bindings.driver")


def drive(function: str, *arguments: Any) -> Any:
    """The same for the driver: ``cuda.bindings.driver.<function>(*arguments)``."""
    error, *results = getattr(driver(), function)(*arguments)
    if error:
        raise _failure(function, error)
    return _result(results)


class Function(NamedTuple):
    """A kernel that is loaded on a device.

    Attributes:
        handle: the driver's.
        launch: ``cuLaunchKernelEx(config, handle, packed, 0)``, which returns ``(error,)``. It is called as it is, for
            its speed, with a configuration of :func:`launch_config` and the address of the addresses of the arguments;
            :func:`refuse_launch` says what an error means.
    """

    handle: Any
    launch: Callable[[Any, Any, int, int], tuple[Any]]


def refuse_launch(name: str, error: Any) -> NoReturn:
    """Raise CudaCallError for a failed launch of the kernel of that name."""
    raise _failure(f"cuLaunchKernelEx of {name}", error)


def load_function(code: bytes, entry: str, shared_nbytes: int) -> Function:
    """Load machine code into the current device's context.

    Args:
        code: a cubin.
        entry: the name of the kernel in it.
        shared_nbytes: the most dynamic shared memory that it will be launched with; 0 for the default limit.

    Raises:
        CudaCallError: the driver refused.
    """
    module = drive("cuModuleLoadData", code)
    handle = drive("cuModuleGetFunction", module, entry.encode())
    if shared_nbytes:
        most = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        drive("cuFuncSetAttribute", handle, most, shared_nbytes)
    return Function(handle, driver().cuLaunchKernelEx)


def launch_config(ctas: int, threads: int, shared_nbytes: int, early: bool) -> Any:
    """A launch configuration, whose ``hStream`` is set before each launch.

    Args:
        ctas: CTAs of the grid.
        threads: of a CTA.
        shared_nbytes: dynamic shared memory of a CTA.
        early: whether it may start before its predecessor ends (programmatic dependent launch).
    """
    cuda = driver()
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = ctas, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_nbytes
    if early:
        attribute = cuda.CUlaunchAttribute()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    return config


def _result(results: list[Any]) -> Any:
    return tuple(results) if len(results) > 1 else results[0] if results else None


def _failure(function: str, error: Any) -> CudaCallError:
    message = f"{function} returned {error.name} ({int(error)}){advice(int(error))}"
    return CudaCallError(message, error.name, int(error))


def register_flags() -> int:
    """The flags under which ``cudaHostRegister`` takes a read-only, shared mapping, and no others."""
    cuda = runtime()
    return int(cuda.cudaHostRegisterPortable | cuda.cudaHostRegisterMapped | cuda.cudaHostRegisterReadOnly)


def advice(number: int) -> str:
    """Advice on an error of this number, as the end of a message; mostly empty."""
    if number in STICKY:
        return f". {LOST}"
    if number == CAPTURE_IMPLICIT:
        return f". {BLOCKED}"
    return f". {FORKED}" if _first_process() != os.getpid() else ""


@functools.cache
def _first_process() -> int:
    """The process that used CUDA first; a forked child inherits the answer."""
    return os.getpid()


def attribute(name: str, device: int) -> int:
    """The device attribute ``name``, without its prefix ``cudaDevAttr``."""
    value: int = call("cudaDeviceGetAttribute", getattr(runtime().cudaDeviceAttr, f"cudaDevAttr{name}"), device)
    return value


def capture_of(stream: int) -> tuple[int, Any]:
    """The number of the capture that a stream is in, unique in the process, and the graph that it becomes so far; 0 if
    the stream is not capturing."""
    status, number, graph, *_ = call("cudaStreamGetCaptureInfo", stream)
    return (int(number), graph) if int(status) else (0, None)


def on_device(device: int) -> OnDevice:
    """Make ``device`` this thread's current one inside the block, for calls that allocate, free, load or wait.

    While any stream of the process is captured, such calls can fail and spoil the capture. In the block they do not:
    nothing in it concerns what is captured, which is what the relaxed mode says. cudaDeviceSynchronize is refused even
    so, and spoils the capture.
    """
    return OnDevice(device)


class OnDevice:
    """The block of :func:`on_device`. One inside of another costs little."""

    __slots__ = ("_before", "_current", "_device", "_mode", "_nested")

    def __init__(self, device: int) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._before = _inside.device
        # An interrupt may have ended a block before it said so: then another device may be current by now.
        self._nested = self._before == self._device == call("cudaGetDevice")
        if self._nested:
            return
        relaxed = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        self._mode = call("cudaThreadExchangeStreamCaptureMode", relaxed)
        try:
            self._current = call("cudaGetDevice")
            call("cudaSetDevice", self._device)  # see current_device
        except BaseException:
            call("cudaThreadExchangeStreamCaptureMode", self._mode)
            raise
        _inside.device = self._device

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._nested:
            _inside.device = self._before
            try:
                if self._current != self._device:
                    call("cudaSetDevice", self._current)
            finally:
                call("cudaThreadExchangeStreamCaptureMode", self._mode)


class _Inside(threading.local):
    """The device of the innermost :func:`on_device` block that this thread is in."""

    device: int | None = None


_inside = _Inside()


@contextmanager
def current_device(device: int) -> Iterator[None]:
    """Make ``device`` this thread's current one inside the block."""
    before = call("cudaGetDevice")
    try:
        # Even if it is current already: from CUDA 12 on this creates its primary context, or reports the failure.
        call("cudaSetDevice", device)
        yield
    finally:
        if before != device:
            call("cudaSetDevice", before)
