"""Device memory, and locked host memory, allocated and freed without waiting for what the device does.

``cudaMalloc`` and what frees, ``cudaFreeHost`` too, wait for all streams of the device, whoever uses them. Memory of a
pool does not: it is allocated and freed in the order of a stream, here one of the pool's own, on which nothing else is
queued.
"""

from __future__ import annotations

from typing import Any, Final

from qmm.arrays import release_caches
from qmm.cuda import CudaCallError, attribute, call, driver, runtime
from qmm.errors import OutOfMemoryError

__all__ = ["WAY_OUT", "Pool", "new_stream"]

RETAINED_NBYTES: Final = 64 << 20
"""Free memory that a pool keeps for its next allocations; what is beyond goes back to the device."""
NONBLOCKING: Final = 1
"""cudaStreamNonBlocking: work on the default stream is not waited for."""
WAY_OUT: Final = (
    "Let libraries give back what they merely cache (torch.cuda.empty_cache(), "
    "cupy.get_default_memory_pool().free_all_blocks()), delete arrays, multiply fewer rows at a time, or choose "
    'placement="mapped" or "host".'
)


def new_stream() -> int:
    """A new stream of the current device, which work on the default stream does not wait for.

    Raises:
        CudaCallError: CUDA refused; for want of memory, though libraries gave back what they merely cached.
    """
    try:
        return int(call("cudaStreamCreateWithFlags", NONBLOCKING))
    except CudaCallError as reason:
        if not reason.out_of_memory:
            raise
        release_caches()
        return int(call("cudaStreamCreateWithFlags", NONBLOCKING))


class Pool:
    """A memory pool of one device. All methods want the device to be current (:func:`qmm.cuda.on_device`).

    ``cudaMalloc`` and ``cudaFree`` take its place where there are no pools: on a few devices (attribute
    ``MemoryPoolsSupported``), and for host memory before CUDA 13 (``HostMemoryPoolsSupported``).
    """

    def __init__(self, device: int, host: bool = False) -> None:
        """``device`` is CUDA's number of it; ``host`` asks for the host's memory, in pages that are locked. Nothing is
        asked of CUDA before :meth:`open`."""
        self._device = device
        self._host = host
        self._stream = 0
        self._pool: Any = None
        self._addresses: dict[int, bool] = {}

    def open(self) -> None:
        """Create the pool; if an interrupt ended that, it goes on.

        Raises:
            CudaCallError: CUDA refused.
        """
        self._stream = self._stream or new_stream()
        if self._pool is None and self._supported():
            cuda = runtime()
            properties = cuda.cudaMemPoolProps()
            properties.allocType = cuda.cudaMemAllocationType.cudaMemAllocationTypePinned
            properties.location = self._location(self._host)
            self._pool = call("cudaMemPoolCreate", properties)
            if self._host:
                access = cuda.cudaMemAccessDesc()
                access.location = self._location(host=False)
                access.flags = cuda.cudaMemAccessFlags.cudaMemAccessFlagsProtReadWrite
                call("cudaMemPoolSetAccess", self._pool, [access], 1)
            threshold = cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
            call("cudaMemPoolSetAttribute", self._pool, threshold, driver().cuuint64_t(RETAINED_NBYTES))

    def _supported(self) -> bool:
        name = "HostMemoryPoolsSupported" if self._host else "MemoryPoolsSupported"
        try:
            return bool(attribute(name, self._device))
        except (AttributeError, CudaCallError):  # the bindings or the driver do not know it
            return False

    def _location(self, host: bool) -> Any:
        cuda = runtime()
        location = cuda.cudaMemLocation()
        if host:
            location.type, location.id = cuda.cudaMemLocationType.cudaMemLocationTypeHost, 0
        else:
            location.type, location.id = cuda.cudaMemLocationType.cudaMemLocationTypeDevice, self._device
        return location

    def allocate(self, nbytes: int) -> int | None:
        """The address of ``nbytes``, for any stream; None if there is not enough.

        Raises:
            CudaCallError: CUDA refused for another reason.
        """
        if not self._stream:
            raise CudaCallError("the device was closed")
        try:
            if self._pool is None:
                address = int(call("cudaMallocHost" if self._host else "cudaMalloc", nbytes))
            else:
                address = int(call("cudaMallocFromPoolAsync", max(1, nbytes), self._pool, self._stream))
        except CudaCallError as reason:
            if not reason.out_of_memory:
                raise
            return None
        self._addresses[address] = True
        call("cudaStreamSynchronize", self._stream)  # now any stream may use it
        return address

    def allocate_at_last(self, nbytes: int, what: str) -> int:
        """The same once more, after all that is merely kept was given back, by other libraries too.

        Raises:
            OutOfMemoryError: there is not enough all the same; ``what`` begins the message.
            CudaCallError: CUDA refused for another reason.
        """
        call("cudaStreamSynchronize", self._stream)
        if self._pool is not None:
            call("cudaMemPoolTrimTo", self._pool, 0)
        release_caches()
        address = self.allocate(nbytes)
        if address is None:
            free_nbytes, _ = call("cudaMemGetInfo")
            raise OutOfMemoryError(f"{what} cannot be had: {free_nbytes} bytes are free. {WAY_OUT}")
        return address

    def free(self, address: int) -> None:
        """Free memory that the device is done with. Freeing twice is harmless."""
        if self._addresses.pop(address, False):
            self._undo(address)

    def _undo(self, address: int) -> None:
        if self._pool is None:
            call("cudaFreeHost" if self._host else "cudaFree", address)
        else:
            call("cudaFreeAsync", address, self._stream)

    def close(self) -> None:
        """Free everything; the device is done with it. Twice is harmless."""
        while self._addresses:
            self._undo(self._addresses.popitem()[0])
        if self._stream:
            call("cudaStreamSynchronize", self._stream)
        if self._pool is not None:
            pool, self._pool = self._pool, None
            call("cudaMemPoolDestroy", pool)
        if self._stream:
            stream, self._stream = self._stream, 0
            call("cudaStreamDestroy", stream)
