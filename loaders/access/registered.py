"""Registering the pages of a mapped file with CUDA, so that kernels can read them where they are.

What can go wrong, and what is done about it (each was seen on an H200 with driver 580):

* Only PROT_READ + MAP_SHARED mappings with the ReadOnly flag work. FileMapping makes no others.
* Registered ranges must not overlap. All registrations of a process share one table (:mod:`.chunks`).
* One call of 512 GiB or more fails. Longer ranges are cut.
* A refused call leaves the runtime's last error set. :func:`qmm.cuda.call` clears it.
* The device's address may differ from the host's. It is asked for.
"""

from __future__ import annotations

import mmap
import operator
from collections.abc import Iterable
from typing import Final, SupportsIndex

from qmm.children import process
from qmm.cuda import CudaCallError, attribute, on_device
from qmm.errors import ClosedError, RegistrationError
from qmm.loaders.access.chunks import Chunk, acquire, release
from qmm.loaders.access.pages import Span, covering_pages, gaps
from qmm.loaders.closing import Resource
from qmm.loaders.mapping import FileMapping

__all__ = ["REQUIRED_ATTRIBUTES", "HostRegistration"]

CHUNK_NBYTES: Final = 256 << 30  # half of the size that driver 580 refuses in one call

REQUIRED_ATTRIBUTES: Final = {
    "CanMapHostMemory": "the device cannot map host memory",
    "HostRegisterSupported": "the device or its driver cannot register host memory",
    "HostRegisterReadOnlySupported": "the device or its driver cannot register read-only memory",
}
"""Device attributes without which nothing can be registered, and what their absence means."""

NO_MEMORY: Final = ("cudaErrorMemoryAllocation", "cudaErrorOperatingSystem")
LOCKABLE: Final = (
    "Registering locks pages: is there so much memory, and may the process lock it (ulimit -l, the container's limit)?"
)
WAY_OUT: Final = 'Use placement="device" (a copy in GPU memory) or placement="host" (the CPU).'


class HostRegistration(Resource):
    """Registered pages of one mapped file. A context manager; share it between threads freely.

    Registrations of one file share pages: each page is registered once in the process, and unregistered by the last
    registration that uses it. In a forked child they are closed.
    """

    def __init__(self, mapping: FileMapping, chunks: list[Chunk], device: int) -> None:
        """Use :meth:`of`."""
        self.path = mapping.path
        self.device = device
        self._mapping = mapping
        self._chunks = chunks
        self._process = process.now
        self._closed = False

    @classmethod
    def of(
        cls,
        mapping: FileMapping,
        ranges: Iterable[tuple[SupportsIndex, SupportsIndex]],
        device: SupportsIndex = 0,
        *,
        chunk_nbytes: SupportsIndex = CHUNK_NBYTES,
    ) -> HostRegistration:
        """Register the pages under ``ranges`` for reading by the GPU.

        Args:
            mapping: The file. The registration takes its own handle; the caller may close this one.
            ranges: ``(offset, nbytes)`` of each tensor, in bytes from the start of the file, any order, may overlap.
            device: CUDA's number of the device whose support is checked; all devices can use the pages.
            chunk_nbytes: Most bytes in one call, a multiple of the page size.

        Raises:
            RegistrationError: The device or the driver refuses. What this call had registered is unregistered again.
            MappingError: A range is not in the file, or the file changed since it was mapped.
            ClosedError: ``mapping`` was closed.
        """
        device, chunk_nbytes = operator.index(device), operator.index(chunk_nbytes)
        if chunk_nbytes <= 0 or chunk_nbytes % mmap.PAGESIZE:
            raise ValueError(f"chunk_nbytes is {chunk_nbytes}; it must be a positive multiple of {mmap.PAGESIZE}")
        wanted = [Span(*mapping.require(offset, nbytes)) for offset, nbytes in ranges]
        mapping.check()
        spans = covering_pages([(span.start, span.nbytes) for span in wanted], mmap.PAGESIZE)
        try:
            with on_device(device):
                _check_device(device)
                return cls(mapping.share(), acquire(mapping, spans, chunk_nbytes), device)
        except CudaCallError as reason:
            raise RegistrationError(_refusal(mapping, spans, device, reason)) from reason

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that this one was forked from."""
        return self._closed or self._process != process.now

    @property
    def nbytes_registered(self) -> int:
        """Bytes of registered pages that this registration uses, shared with others or not; 0 once closed."""
        return sum(chunk.span.nbytes for chunk in self._chunks)

    def host_address(self, offset: SupportsIndex) -> int:
        """The CPU's address of byte ``offset`` of the file.

        Raises:
            MappingError: It is not in the file.
            ClosedError: The registration was closed.
        """
        self._require_open()
        start, _ = self._mapping.require(offset, 1)
        return self._mapping.address + start

    def address(self, offset: SupportsIndex, nbytes: SupportsIndex) -> int:
        """The device's address of bytes ``offset`` to ``offset + nbytes`` of the file, ``nbytes`` at least 1.

        It is what ``cudaHostGetDevicePointer`` says, good on every device of the process until ``close``.

        Raises:
            RegistrationError: They are not all registered here, or lie in chunks that do not follow each other on the
                device.
            MappingError: They are not all in the file.
            ClosedError: The registration was closed.
        """
        self._require_open()
        wanted = Span(*self._mapping.require(offset, nbytes))
        chunks = [chunk for chunk in self._chunks if chunk.overlaps(wanted)]
        missing = gaps(wanted, [chunk.span for chunk in chunks])
        if missing or not chunks:
            first = missing[0] if missing else wanted
            raise RegistrationError(
                f"{self.path}: bytes {wanted.start} to {wanted.end} were asked for, but {first.start} to {first.end} "
                "are not registered. Give HostRegistration.of the range of every tensor that will be used."
            )
        bases = {chunk.device_address - chunk.span.start for chunk in chunks}
        if len(bases) > 1:
            raise RegistrationError(
                f"{self.path}: bytes {wanted.start} to {wanted.end} lie in {len(chunks)} registered chunks whose "
                f"device addresses do not follow each other. {WAY_OUT}"
            )
        return bases.pop() + wanted.start

    def close(self) -> None:
        """Unregister the pages that no other registration uses, then let the mapping go. The device must be done with
        them.

        Twice is harmless; so is closing after CUDA itself has shut down; and after KeyboardInterrupt it goes on.

        Raises:
            RegistrationError: A call failed, most often because a kernel did: its error shows here first. Pages that
                could not be unregistered stay mapped.
        """
        self._closed = True
        failure = None if self._process != process.now else release(self._chunks, self.device)
        self._mapping.close()
        if failure is not None:
            raise RegistrationError(
                f"{self.path}: closing its registration on device {self.device}: {failure}"
            ) from failure

    def __repr__(self) -> str:
        return f"<HostRegistration of {self.path}: {self.nbytes_registered} bytes in {len(self._chunks)} chunks>"

    def _require_open(self) -> None:
        if self.closed:
            forked = self._process != process.now
            why = "belongs to the process that this one was forked from" if forked else "was closed"
            raise ClosedError(f"{self.path}: the registration {why}. Register the mapping again.")


def _check_device(device: int) -> None:
    for name, meaning in REQUIRED_ATTRIBUTES.items():
        if not attribute(name, device):
            raise CudaCallError(f"attribute cudaDevAttr{name} is 0: {meaning}")


def _refusal(mapping: FileMapping, spans: list[Span], device: int, reason: CudaCallError) -> str:
    nbytes = sum(span.nbytes for span in spans)
    memory = f"{LOCKABLE} " if reason.name in NO_MEMORY else ""
    return f"{mapping.path}: {nbytes} bytes cannot be registered on CUDA device {device}: {reason}. {memory}{WAY_OUT}"
