"""The emulator's memory: global memory that ends where its regions end, and a CTA's shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from greenlet import getcurrent

from qmm.errors import EmulatorError

__all__ = ["FIRST", "FORBIDDEN", "SHARED_START", "UNWRITTEN", "WRITTEN", "Memory", "Region", "SharedMemory", "who"]

SHARED_START = 1024
"""Where a CTA's own shared memory starts in the shared window; the driver keeps the first KiB for itself."""
FIRST = 1 << 52
"""Where global memory starts: addresses that no process has."""
NAN = 0xFF
"""The value of every unwritten byte: NaN in every float type."""
UNWRITTEN, WRITTEN, FORBIDDEN = range(3)
"""States of a byte of memory; forbidden are barriers, and what a copy in flight will overwrite."""


def who() -> str:
    """The lane whose turn it is, for messages."""
    lane = getcurrent()
    return str(lane) if hasattr(lane, "cta") else "the host"


class Region:
    """A piece of global memory.

    Attributes:
        name: for messages.
        start: its first byte's address.
        end: the address after its last byte.
        constant: whether no kernel writes it: it may be read before the kernels before have ended.
        data: its bytes.
        reads: how often each byte was read, int32.
        prefetched: 1 for each byte that a kernel has prefetched to L2.
    """

    def __init__(self, name: str, address: int, content: bytes | int, constant: bool) -> None:
        nbytes = content if isinstance(content, int) else len(content)
        self.name = name
        self.start = address
        self.end = address + nbytes
        self.constant = constant
        self.data = bytearray([NAN]) * nbytes if isinstance(content, int) else bytearray(content)
        self.state = bytearray([UNWRITTEN if isinstance(content, int) else WRITTEN]) * nbytes
        self.reads = np.zeros(nbytes, np.int32)
        self.prefetched = bytearray(nbytes)

    def __repr__(self) -> str:
        return f"{self.name} [{self.start:#x}, {self.end:#x})"

    def array(self, dtype: Any) -> np.ndarray:
        """A flat view of its bytes as a NumPy dtype."""
        return np.frombuffer(self.data, dtype)

    def unwritten(self) -> int:
        """How many bytes were not written."""
        return self.state.count(UNWRITTEN)

    def put(self, at: int, content: bytes) -> None:
        """Set bytes from an offset on."""
        self.data[at : at + len(content)] = content
        self.state[at : at + len(content)] = b"\1" * len(content)


class Memory:
    """Global memory: regions, with nothing in between."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._next = FIRST

    def add(
        self, name: str, content: bytes | int, *, constant: bool = False, address: int | None = None, shift: int = 0
    ) -> Region:
        """Add a region.

        Args:
            name: for messages.
            content: its bytes, or how many unwritten ones.
            constant: whether no kernel may write it.
            address: where it lies; without one, at a multiple of 4096 past all that were placed so.
            shift: how many bytes past that.

        Raises:
            ValueError: it would overlap another one.
        """
        region = Region(name, (self._next if address is None else address) + shift, content, constant)
        if any(region.start < other.end and other.start < region.end for other in self.regions):
            raise ValueError(f"{region} overlaps one of {self.regions}")
        self.regions.append(region)
        if address is None:
            self._next = (region.end + 2 * 4096) & -4096
        return region

    def find(self, address: int, nbytes: int, doing: str = "access") -> Region:
        """The region that holds all of these bytes; ``doing`` is for the message.

        Raises:
            EmulatorError: there is none.
        """
        for region in self.regions:
            if region.start <= address and address + nbytes <= region.end:
                return region
        raise EmulatorError(
            f"{who()}: {nbytes} bytes at {address:#x} are not within any of {self.regions}"
            f"{self._nearest(address, nbytes, doing)}"
        )

    def _nearest(self, address: int, nbytes: int, doing: str) -> str:
        """How far an access is from the nearest region, for messages."""
        if not self.regions:
            return f" (a {doing})"
        end = address + nbytes
        region = min(self.regions, key=lambda region: max(region.start - address, end - region.end))
        if address < region.start:
            return f"; the {doing} begins {region.start - address} bytes before {region.name}"
        return f"; the {doing} ends {end - region.end} bytes past the end of {region.name}"

    def source(self, address: int, nbytes: int, alignment: int) -> tuple[Region, int]:
        """Count a read: the region that holds these bytes, and their offset.

        Raises:
            EmulatorError: they may not be read.
        """
        region = self._accessed(address, nbytes, alignment, "read")
        at = address - region.start
        if region.state.find(UNWRITTEN, at, at + nbytes) >= 0:
            raise EmulatorError(f"{who()} reads {nbytes} bytes at {address:#x} of {region}, which nobody has written")
        region.reads[at : at + nbytes] += 1
        return region, at

    def read(self, address: int, nbytes: int, alignment: int) -> tuple[bytearray, int]:
        """Where a lane finds these bytes: a buffer and an offset.

        Raises:
            EmulatorError: they may not be read.
        """
        region, at = self.source(address, nbytes, alignment)
        return region.data, at

    def write(self, address: int, content: bytes, alignment: int) -> None:
        """Store bytes for a lane.

        Raises:
            EmulatorError: they may not be written.
        """
        region = self._accessed(address, len(content), alignment, "write")
        if region.constant:
            raise EmulatorError(
                f"{who()} writes {len(content)} bytes at {address:#x} of {region}, which must not change"
            )
        region.put(address - region.start, content)

    def prefetch(self, address: int, nbytes: int) -> None:
        """Prefetch bytes to L2, which only marks them here.

        Raises:
            EmulatorError: they are no multiples of 16, or not within a region.
        """
        if nbytes <= 0 or nbytes & 15 or address & 15:
            raise EmulatorError(f"{who()} prefetches {nbytes} bytes at {address:#x}: both must be multiples of 16")
        region = self.find(address, nbytes, "prefetch")
        at = address - region.start
        region.prefetched[at : at + nbytes] = b"\1" * nbytes

    def _accessed(self, address: int, nbytes: int, alignment: int, doing: str) -> Region:
        region = self.find(address, nbytes, doing)
        if address & (alignment - 1):
            raise EmulatorError(
                f"{who()}: an access at {address:#x} ({region.name}) must be at a multiple of {alignment}"
            )
        lane = getcurrent()
        if not region.constant and hasattr(lane, "cta") and not lane.may_read_results:
            raise EmulatorError(f"{lane} uses {region} before it waits for the kernels that may write it")
        return region


class SharedMemory:
    """The shared memory of a CTA, at addresses from ``start`` on.

    What was never written is NaN bytes. Blocks of it may be read as long as no result depends on it, and kernels do for
    rows past the last. A single number that a lane reads, such as a scale or a sum, must have been written.
    """

    def __init__(self, nbytes: int) -> None:
        self.start = SHARED_START
        self.data = bytearray([NAN]) * nbytes
        self.state = bytearray([UNWRITTEN]) * nbytes
        self.barriers: set[int] = set()

    def place(self, address: int, nbytes: int, alignment: int) -> int:
        """The offset of these bytes, which are within what the launch asked for.

        Raises:
            EmulatorError: they are not.
        """
        at = address - SHARED_START
        if at < 0 or at + nbytes > len(self.data):
            raise EmulatorError(f"{who()}: {nbytes} bytes at shared {at} are not within {len(self.data)} of its CTA")
        if address & (alignment - 1):
            raise EmulatorError(f"{who()}: an access at shared {at} must be at a multiple of {alignment}")
        return at

    def look(self, address: int, nbytes: int, alignment: int) -> int:
        """The offset of bytes that a lane reads, written or not.

        Raises:
            EmulatorError: they may not be read.
        """
        at = address - self.start
        if at < 0 or at + nbytes > len(self.data) or address & (alignment - 1):
            self.place(address, nbytes, alignment)  # raises with the reason
        if self.state.find(FORBIDDEN, at, at + nbytes) >= 0:
            self._forbid("reads", at, nbytes)
        return at

    def field(self, address: int, nbytes: int, alignment: int) -> tuple[bytearray, int]:
        """Where a lane finds a field of a block: a buffer and an offset. An unaligned field is read by the aligned
        words around it, which must lie in shared memory too.

        Raises:
            EmulatorError: they may not be read.
        """
        widest = alignment if alignment >= 16 else min(4, alignment)
        if nbytes >= 4 and widest < 4:
            self.place(address & -4, nbytes + 4, 4)
            widest = 1
        return self.data, self.look(address, nbytes, min(nbytes, widest))

    def read(self, address: int, nbytes: int, alignment: int) -> tuple[bytearray, int]:
        """Where a lane finds bytes that were written: a buffer and an offset.

        Raises:
            EmulatorError: they were not, or may not be read.
        """
        at = self.look(address, nbytes, alignment)
        if self.state.find(UNWRITTEN, at, at + nbytes) >= 0:
            raise EmulatorError(f"{who()} reads {nbytes} bytes at shared {at}, which nobody has written")
        return self.data, at

    def write(self, address: int, content: bytes, alignment: int) -> None:
        """Store bytes for a lane.

        Raises:
            EmulatorError: they may not be written.
        """
        at = self.place(address, len(content), alignment)
        if self.state.find(FORBIDDEN, at, at + len(content)) >= 0:
            self._forbid("writes", at, len(content))
        self.put(at, content)

    def put(self, at: int, content: bytes) -> None:
        """Set bytes from an offset on."""
        self.data[at : at + len(content)] = content
        self.state[at : at + len(content)] = b"\1" * len(content)

    def reserve(self, address: int, nbytes: int, alignment: int, doing: str) -> int:
        """Forbid bytes to all lanes until :meth:`put` sets them; returns their offset.

        Raises:
            EmulatorError: they are not there, or forbidden already.
        """
        at = self.place(address, nbytes, alignment)
        if self.state.find(FORBIDDEN, at, at + nbytes) >= 0:
            self._forbid(doing, at, nbytes)
        self.state[at : at + nbytes] = bytes([FORBIDDEN]) * nbytes
        return at

    def _forbid(self, doing: str, at: int, nbytes: int) -> None:
        of_barrier = any(at < barrier + 8 and barrier < at + nbytes for barrier in self.barriers)
        why = "a barrier" if of_barrier else "the target of a copy in flight"
        raise EmulatorError(f"{who()} {doing} {nbytes} bytes at shared {at}: {why}")
