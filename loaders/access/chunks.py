"""What this process has registered with CUDA: each page once, for as long as it has a user.

Registered ranges must not overlap, so that all registrations of a process share this table. Each chunk was registered
by one call, and holds a handle on its mapping: pages that could not be unregistered stay mapped.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from qmm.children import PerProcess
from qmm.cuda import CudaCallError, call, on_device, register_flags
from qmm.loaders.access.pages import Span, cut, gaps
from qmm.loaders.mapping import FileMapping

__all__ = ["Chunk", "acquire", "registered", "release"]


@dataclass(eq=False, slots=True)
class Chunk:
    """Pages that one call registered.

    Attributes:
        mapping: the file.
        span: its bytes, whole pages.
        device_address: of its first byte; the host's may differ.
        users: how many registrations use it.
    """

    mapping: FileMapping
    span: Span
    device_address: int = 0
    users: int = 1

    @property
    def host_address(self) -> int:
        """The CPU's address of its first byte."""
        return self.mapping.address + self.span.start

    def overlaps(self, span: Span) -> bool:
        """Whether they have a byte in common."""
        return self.span.start < span.end and span.start < self.span.end


registered: PerProcess[list[Chunk]] = PerProcess(list)
"""The table. In a forked child it is empty: what CUDA holds is the parent's."""
_lock = PerProcess(threading.RLock)  # reentrant: the garbage collector may close a dropped registration anywhere


def acquire(mapping: FileMapping, spans: list[Span], chunk_nbytes: int) -> list[Chunk]:
    """Register what is not registered yet, and count a user of all of it.

    Args:
        mapping: the file.
        spans: whole pages of it, ascending, disjoint.
        chunk_nbytes: most bytes in one call.

    Returns:
        The chunks that cover the spans, ascending; some may reach further.

    Raises:
        CudaCallError: a call failed. What this one had registered is unregistered again.
    """
    with _lock.now:
        chunks: list[Chunk] = []
        try:
            # Counted before anything is registered, so that no registration that is dropped meanwhile takes them away.
            for chunk in list(registered.now):
                same_file = chunk.mapping.address == mapping.address
                if same_file and any(chunk.overlaps(span) for span in spans) and chunk in registered.now:
                    chunk.users += 1
                    chunks.append(chunk)
            taken = sorted(chunk.span for chunk in chunks)
            for span in spans:
                for gap in gaps(span, taken):
                    for piece in cut(gap, chunk_nbytes):
                        _register(Chunk(mapping.share(), piece), chunks)
        except BaseException:
            _uncount(chunks)
            raise
        return sorted(chunks, key=lambda chunk: chunk.span)


def release(chunks: list[Chunk], device: int) -> CudaCallError | None:
    """Uncount a user of each chunk, and unregister those that have no other. The device must be done with them.

    Args:
        chunks: from :func:`acquire`. The list is emptied on the way, so that a call that KeyboardInterrupt ended can be
            made again.
        device: CUDA's number of the device that reads them.

    Returns:
        The first failure, unless CUDA itself is gone. What could not be unregistered stays in the table.
    """
    with _lock.now:
        try:
            with on_device(device):
                return _uncount(chunks)
        except CudaCallError as error:  # of making the device current
            return _uncount(chunks) if error.gone else error


def _register(chunk: Chunk, chunks: list[Chunk]) -> None:
    """Register a chunk, and add it to the table and to ``chunks``: before the call, so that it is unregistered if
    KeyboardInterrupt comes right after it."""
    registered.now.append(chunk)
    chunks.append(chunk)
    try:
        call("cudaHostRegister", chunk.host_address, chunk.span.nbytes, register_flags())
    except CudaCallError:  # what is registered there is somebody else's, who unregisters it
        chunks.remove(chunk)
        _forget(chunk)
        raise
    chunk.device_address = int(call("cudaHostGetDevicePointer", chunk.host_address, 0))


def _uncount(chunks: list[Chunk]) -> CudaCallError | None:
    """Empty ``chunks``, and unregister those that have no user left; the first failure."""
    failure = None
    while chunks:
        chunk = chunks.pop()
        chunk.users -= 1
        if not chunk.users:
            try:
                call("cudaHostUnregister", chunk.host_address)
            except CudaCallError as error:
                if not error.gone:
                    failure = failure or error
                    continue
            _forget(chunk)
    return failure


def _forget(chunk: Chunk) -> None:
    registered.now.remove(chunk)
    chunk.mapping.close()
