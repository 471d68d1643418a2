"""A GPU as other work of the process leaves it: streams that are busy for a given time, and the memory that is free.

Nothing here needs more than the CUDA driver, and nothing waits but what says so.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex

from cuda.bindings import driver, runtime

__all__ = [
    "checked",
    "free_nbytes",
    "pool_nbytes",
    "is_busy",
    "keep_busy",
    "new_stream",
    "registered",
    "seconds_of",
    "stream_of_its_own",
    "synchronize",
]

# One thread that looks at the clock; the rest of the GPU is free for others.
SPIN = """
.version 7.0
.target sm_75
.address_size 64
.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .u64 %start, %now, %limit;
    .reg .pred %again;
    ld.param.u64 %limit, [nanoseconds];
    mov.u64 %start, %globaltimer;
look:
    mov.u64 %now, %globaltimer;
    sub.u64 %now, %now, %start;
    setp.lt.u64 %again, %now, %limit;
    @%again bra look;
    ret;
}
"""


def checked(returned: tuple[Any, ...]) -> Any:
    """What a call of ``cuda.bindings`` returned, without its error, which must be none."""
    error, *results = returned
    assert int(error) == 0, error
    return results[0] if len(results) == 1 else tuple(results)


def synchronize() -> None:
    """Wait for all work on the device."""
    checked(runtime.cudaDeviceSynchronize())


@functools.cache
def _spin() -> Any:
    from qmm.kernels.runtime.build import link  # imports Numba, which a child may not need

    which = runtime.cudaDeviceAttr
    names = (which.cudaDevAttrComputeCapabilityMajor, which.cudaDevAttrComputeCapabilityMinor)
    major, minor = (int(checked(runtime.cudaDeviceGetAttribute(name, 0))) for name in names)
    module = checked(driver.cuModuleLoadData(link(SPIN, (major, minor))))
    function = checked(driver.cuModuleGetFunction(module, b"spin"))
    _launch(function, 0, 0)  # the first launch loads it, which may wait for other work
    synchronize()
    return function


def _launch(function: Any, stream: int, nanoseconds: int) -> None:
    value = ctypes.c_uint64(nanoseconds)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(value))
    checked(driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, ctypes.addressof(arguments), 0))


def keep_busy(stream: SupportsIndex, seconds: float = 0.5) -> None:
    """Queue work on a stream, by its handle, that takes that long; other streams go on."""
    checked(runtime.cudaSetDevice(0))
    _launch(_spin(), operator.index(stream), round(seconds * 1e9))


def is_busy(stream: SupportsIndex) -> bool:
    """Whether work on a stream is not done yet."""
    (error,) = runtime.cudaStreamQuery(operator.index(stream))
    runtime.cudaGetLastError()  # "not ready" is none
    assert error in (runtime.cudaError_t.cudaSuccess, runtime.cudaError_t.cudaErrorNotReady), error
    return error == runtime.cudaError_t.cudaErrorNotReady


def new_stream() -> int:
    """The handle of a new stream that does not wait for the default stream, as those of PyTorch."""
    checked(runtime.cudaSetDevice(0))
    return int(checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))


@contextmanager
def stream_of_its_own() -> Iterator[int]:
    """A new stream for the ``with`` block; its work is waited for at the end."""
    stream = new_stream()
    try:
        yield stream
    finally:
        runtime.cudaStreamSynchronize(stream)
        runtime.cudaStreamDestroy(stream)


@contextmanager
def registered(address: int, nbytes: int, flags: int = 0) -> Iterator[None]:
    """Host memory that somebody else has registered with CUDA, for the ``with`` block."""
    checked(runtime.cudaSetDevice(0))
    checked(runtime.cudaHostRegister(address, nbytes, flags))
    try:
        yield
    finally:
        runtime.cudaHostUnregister(address)


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes, on the host."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pool_nbytes(engine: Any) -> int:
    """GPU memory of an engine that is in use now, whatever other processes do."""
    attribute = runtime.cudaMemPoolAttr.cudaMemPoolAttrUsedMemCurrent
    return int(checked(runtime.cudaMemPoolGetAttribute(engine.gpu.pool._pool, attribute)))


def free_nbytes() -> int:
    """Free memory on the device, for all processes."""
    return int(checked(runtime.cudaMemGetInfo())[0])
