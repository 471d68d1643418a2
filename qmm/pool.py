"""Device memory that is allocated and freed in the order of a stream, so that neither waits for other streams."""

from __future__ import annotations

from typing import Any, Final

from qmm.cuda import attribute, call, driver, runtime

__all__ = ["Pool"]

RETAINED_NBYTES: Final = 64 << 20
"""Free memory that a pool keeps for its next allocations; what is beyond goes back to the device."""


class Pool:
    """A memory pool of CUDA's on the current device.

    ``cudaMalloc`` and ``cudaFree``, which wait for all streams of the device, take its place on the few devices that
    have no pools (attribute ``MemoryPoolsSupported``).
    """

    def __init__(self, device: int) -> None:
        """``device`` is CUDA's number of the current device."""
        self._pool: Any = None
        if attribute("MemoryPoolsSupported", device):
            cuda = runtime()
            properties = cuda.cudaMemPoolProps()
            properties.allocType = cuda.cudaMemAllocationType.cudaMemAllocationTypePinned
            properties.location.type = cuda.cudaMemLocationType.cudaMemLocationTypeDevice
            properties.location.id = device
            self._pool = call("cudaMemPoolCreate", properties)
            threshold = cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
            call("cudaMemPoolSetAttribute", self._pool, threshold, driver().cuuint64_t(RETAINED_NBYTES))

    def allocate(self, nbytes: int, stream: int) -> int:
        """The address of ``nbytes``, for work that a stream does after what is queued on it.

        Raises:
            CudaCallError: there is not enough.
        """
        if self._pool is None:
            return int(call("cudaMalloc", nbytes))
        return int(call("cudaMallocFromPoolAsync", max(1, nbytes), self._pool, stream))

    def free(self, address: int, stream: int) -> None:
        """Free memory once the work is done that is queued on a stream now."""
        if self._pool is None:
            call("cudaStreamSynchronize", stream)
            call("cudaFree", address)
        else:
            call("cudaFreeAsync", address, stream)

    def trim(self) -> None:
        """Give the device back what is free, for others."""
        if self._pool is not None:
            call("cudaMemPoolTrimTo", self._pool, 0)

    def close(self) -> None:
        """Give everything back; the device is done with it."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            call("cudaMemPoolDestroy", pool)
