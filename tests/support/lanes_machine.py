"""A GPU of one block at a time, lane by lane, on the CPU: memory, barriers, asynchronous copies, and whose turn it is.

Each lane is a greenlet that runs until it has to wait, for a barrier or for the other lanes of its warp; then another
one is chosen by lot. Whatever hardware would let pass unnoticed is a :class:`LaneError` here:

* an access outside the memory that a launch was given, or at an address that its width does not divide;
* a read of bytes whose copy is still under way, or that a kernel before may still be writing;
* lanes of a warp that do not meet at the same instruction, where that instruction needs all of them;
* a barrier with more arrivals than it expects, lanes that wait for ever, copies that nobody waited for.

Copies land as late as possible: one at a time, when no lane can go on, and only if somebody waits for it.

What was never written is poison (0xFF, a NaN as a number). Global memory of that kind may not be read at all; in shared
memory kernels may read blocks of it as long as no result depends on it, and do for rows past the last. A lane that
reads a number of shared memory on its own account, such as a scale or a sum, must find one.
"""

from __future__ import annotations

import contextvars
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet

__all__ = ["SHARED_WINDOW", "Block", "LaneError", "Memory", "Region", "Settings", "meet", "together"]

SHARED_WINDOW = 1024
"""Where a block's own shared memory starts in the shared window; the driver keeps the first KiB for itself."""
POISON = 0xFF
UNWRITTEN, WRITTEN, FORBIDDEN = range(3)
"""States of a byte of memory; forbidden are barriers, and what a copy under way will overwrite."""


class LaneError(Exception):
    """A kernel did what it must not do."""


@dataclass(frozen=True)
class Settings:
    """How kernels are run.

    Attributes:
        late: whether asynchronous copies land as late as possible; else at once.
        slow: the number of a warp that has its turn only where no other can go on.
        seed: for the lots that decide whose turn it is.
        faults: what goes wrong on purpose, so that tests can show that they notice: "waits" (lanes go on without
            waiting for a barrier), "predecessors" (nor for the kernel before), and the masks of ``lanes_masks.py``, by
            name, which the kernels then lack.
    """

    late: bool = True
    slow: int | None = None
    seed: int = 0
    faults: frozenset[str] = frozenset()


class Region:
    """A piece of global memory, of exactly the bytes that it was made of.

    Attributes:
        constant: whether no kernel writes it: it may be read before the kernels before have ended.
        reads: how often each byte was read.
        brought: 1 for each byte that was brought into L2.
    """

    def __init__(self, name: str, address: int, content: bytes | int, constant: bool) -> None:
        nbytes = content if isinstance(content, int) else len(content)
        self.name = name
        self.start = address
        self.end = address + nbytes
        self.constant = constant
        self.data = bytearray([POISON]) * nbytes if isinstance(content, int) else bytearray(content)
        self.state = bytearray([UNWRITTEN if isinstance(content, int) else WRITTEN]) * nbytes
        self.reads = np.zeros(nbytes, np.int32)
        self.brought = bytearray(nbytes)

    def __repr__(self) -> str:
        return f"{self.name} [{self.start:#x}, {self.end:#x})"

    def unwritten(self) -> int:
        """How many bytes nobody has written."""
        return self.state.count(UNWRITTEN)


class Memory:
    """Global memory: regions, with nothing in between."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, name: str, address: int, content: bytes | int, constant: bool = False) -> Region:
        """Make a region of these bytes, or of so many unwritten ones.

        Raises:
            ValueError: it would meet another one.
        """
        region = Region(name, address, content, constant)
        if any(region.start < other.end and other.start < region.end for other in self.regions):
            raise ValueError(f"{region} meets one of {self.regions}")
        self.regions.append(region)
        return region

    def find(self, address: int, nbytes: int) -> Region:
        """The region that holds these bytes, all of them.

        Raises:
            LaneError: there is none.
        """
        for region in self.regions:
            if region.start <= address and address + nbytes <= region.end:
                return region
        raise LaneError(f"{who()}: {nbytes} bytes at {address:#x} are not within any of {self.regions}")

    def read(self, address: int, nbytes: int, alignment: int) -> tuple[bytearray, int]:
        """Where a lane finds these bytes: a buffer and an offset."""
        region = self.find(address, nbytes)
        _require_aligned(address, alignment, region.name)
        _require_settled(region)
        at = address - region.start
        if region.state.find(UNWRITTEN, at, at + nbytes) >= 0:
            raise LaneError(f"{who()} reads {nbytes} bytes at {address:#x} of {region}, which nobody has written")
        region.reads[at : at + nbytes] += 1
        return region.data, at

    def write(self, address: int, content: bytes, alignment: int) -> None:
        """Store bytes for a lane."""
        region = self.find(address, len(content))
        _require_aligned(address, alignment, region.name)
        _require_settled(region)
        if region.constant:
            raise LaneError(f"{who()} writes {len(content)} bytes at {address:#x} of {region}, which must not change")
        at = address - region.start
        region.data[at : at + len(content)] = content
        region.state[at : at + len(content)] = b"\1" * len(content)


def who() -> str:
    """The lane whose turn it is."""
    lane = getcurrent()
    return str(lane) if isinstance(lane, Lane) else "the host"


def _require_aligned(address: int, alignment: int, where: str) -> None:
    if address & (alignment - 1):
        raise LaneError(f"{who()}: an access at {address:#x} ({where}) must be at a multiple of {alignment}")


def _require_settled(region: Region) -> None:
    lane = getcurrent()
    if not region.constant and isinstance(lane, Lane) and not lane.settled:
        raise LaneError(f"{lane} uses {region} before it waits for the kernels that may write it")


class Lane(greenlet):
    """One thread of a block.

    Attributes:
        settled: whether the kernels before have ended, as far as this lane knows.
        waits: for what, if it does.
        loose: copies that it has started, and no barrier takes part in yet.
    """

    def __init__(self, block: Block, thread: int, function: Callable[[], None]) -> None:
        super().__init__(function, block.hub)
        self.block = block
        self.thread = thread
        self.index = thread & 31
        self.warp = block.warps[thread >> 5]
        self.settled = block.settled
        self.waits: Any = None
        self.loose: list[Copy] = []
        self.deliveries: list[Delivery] = []
        self.gr_context = contextvars.copy_context()  # NumPy keeps in it what it does about overflow

    def __str__(self) -> str:
        return f"block {self.block.index} warp {self.thread >> 5} lane {self.index}"

    def pause(self, waits: Any) -> None:
        """Let others run until somebody puts this lane among those that are ready."""
        self.waits = waits
        self.block.hub.switch()
        self.waits = None


class Warp:
    """32 lanes, and what those have brought that are at an instruction which needs all of them."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.count = 0
        self.instruction: Any = None
        self.place: Any = None
        self.arguments: list[Any] = [None] * 32
        self.results: Any = None

    def complete(self, lane: Lane, instruction: Any, arguments: Any, depth: int) -> bool:
        """Note that a lane has come to an instruction; whether it is the last of the warp.

        Args:
            lane: which.
            instruction: to which; the twin's function.
            arguments: what it brings.
            depth: how many calls up the kernel is.
        """
        frame = sys._getframe(depth)
        place = frame.f_code, frame.f_lasti
        if self.count == 0:
            self.instruction, self.place = instruction, place
        elif instruction != self.instruction or place != self.place:
            raise LaneError(
                f"{lane} is at {named(instruction)} ({_line_of(*place)}), while {self.count} lanes of its warp are at "
                f"{named(self.instruction)} ({_line_of(*self.place)})"
            )
        self.arguments[lane.index] = arguments
        self.count += 1
        if self.count < 32:
            return False
        self.count = 0
        return True


def _line_of(code: Any, at: int) -> str:
    """Where an instruction of Python stands."""
    line = next((line for start, end, line in code.co_lines() if start <= at < end), None)
    return f"{code.co_filename}, line {line}"


@dataclass(eq=False)
class Copy:
    """An asynchronous copy: so many bytes from an offset in a region to one in shared memory."""

    target: int
    region: Region
    source: int
    nbytes: int


@dataclass(eq=False)
class Delivery:
    """Copies that end together, and what they then tell a barrier: that so many bytes came, or that a lane arrives."""

    copies: list[Copy]
    barrier: Barrier
    nbytes: int
    lane: Lane | None = None


@dataclass(eq=False)
class Barrier:
    """A barrier in shared memory (``mbarrier``)."""

    address: int
    expected: int
    pending: int
    nbytes: int = 0
    phase: int = 0
    waiting: list[Lane] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)

    def __str__(self) -> str:
        still = f"{self.pending} of {self.expected} arrivals and {self.nbytes} bytes to come"
        return f"the barrier at shared {self.address - SHARED_WINDOW} in phase {self.phase} ({still})"


@dataclass(eq=False)
class Meeting:
    """A barrier of whole warps, by number (``barrier.cta``)."""

    threads: int
    here: list[Warp] = field(default_factory=list)
    waiting: list[Warp] = field(default_factory=list)


class Block:
    """One block of a launch, and its shared memory.

    Attributes:
        settled: whether the kernels before had ended when it started.
    """

    def __init__(
        self,
        memory: Memory,
        index: int,
        count: int,
        threads: int,
        shared_nbytes: int,
        settled: bool,
        settings: Settings,
    ) -> None:
        self.memory = memory
        self.index = index
        self.count = count
        self.threads = threads
        self.settled = settled
        self.settings = settings
        self.shared = bytearray([POISON]) * shared_nbytes
        self.state = bytearray([UNWRITTEN]) * shared_nbytes
        self.warps = [Warp() for _ in range(threads >> 5)]
        self.ready: list[Lane] = []
        self.barriers: dict[int, Barrier] = {}
        self.meetings: dict[int, Meeting] = {}
        self.lots = random.Random(f"{settings.seed} {index}")
        self.hub = getcurrent()

    # Turns ------------------------------------------------------------------------------------------------------------

    def run(self, kernel: Callable[..., None], arguments: Sequence[int]) -> None:
        """Run all lanes to their end."""
        with np.errstate(all="ignore"):
            for thread in range(self.threads):
                lane = Lane(self, thread, lambda: kernel(*arguments))
                lane.warp.lanes.append(lane)
                self.ready.append(lane)
        try:
            self._take_turns()
            self._require_end()
        finally:
            for warp in self.warps:
                for lane in warp.lanes:
                    if not lane.dead:
                        lane.throw()

    def _take_turns(self) -> None:
        """Run lanes until none can go on."""
        ready, lot = self.ready, self.lots.random
        slow = None if self.settings.slow is None else self.warps[self.settings.slow % len(self.warps)]
        later: list[Lane] = []
        while True:
            while ready:
                i = int(lot() * len(ready))
                lane = ready[i]
                ready[i] = ready[-1]
                ready.pop()
                if lane.warp is slow:
                    later.append(lane)
                else:
                    lane.switch()
            if later:
                later.pop(int(lot() * len(later))).switch()
            elif not self._land_one():
                return

    def _require_end(self) -> None:
        """No lane may be left that waits, and nothing under way."""
        stuck: dict[str, int] = {}
        for warp in self.warps:
            for lane in warp.lanes:
                if not lane.dead:
                    where = f"warp {lane.thread >> 5} at {named(lane.waits)}"
                    stuck[where] = stuck.get(where, 0) + 1
        if stuck:
            found = "; ".join(f"{count} lanes of {where}" for where, count in stuck.items())
            raise LaneError(f"block {self.index} waits for ever: {found}")
        if any(barrier.deliveries for barrier in self.barriers.values()):
            raise LaneError(f"block {self.index} ended while copies were under way")
        if any(lane.loose for warp in self.warps for lane in warp.lanes):
            raise LaneError(f"block {self.index} ended with copies that no barrier knew of")
        if self.meetings:
            raise LaneError(f"block {self.index} ended while warps were expected at barriers {list(self.meetings)}")

    # Shared memory ----------------------------------------------------------------------------------------------------

    def place(self, address: int, nbytes: int, alignment: int) -> int:
        """The offset of these bytes, which are within what the launch asked for."""
        at = address - SHARED_WINDOW
        if at < 0 or at + nbytes > len(self.shared):
            raise LaneError(f"{who()}: {nbytes} bytes at shared {at} are not within {len(self.shared)} of its block")
        if address & (alignment - 1):
            raise LaneError(f"{who()}: an access at shared {at} must be at a multiple of {alignment}")
        return at

    def look(self, address: int, nbytes: int, alignment: int) -> int:
        """The offset of bytes that a lane reads, written or not: kernels do read blocks of rows that are not there."""
        at = address - SHARED_WINDOW
        if at < 0 or at + nbytes > len(self.shared) or address & (alignment - 1):
            self.place(address, nbytes, alignment)
        if self.state.find(FORBIDDEN, at, at + nbytes) >= 0:
            self._forbid("reads", at, nbytes)
        return at

    def read(self, address: int, nbytes: int, alignment: int) -> int:
        """The offset of bytes that a lane reads, and that were written."""
        at = self.look(address, nbytes, alignment)
        if self.state.find(UNWRITTEN, at, at + nbytes) >= 0:
            raise LaneError(f"{who()} reads {nbytes} bytes at shared {at}, which nobody has written")
        return at

    def write(self, address: int, content: bytes, alignment: int) -> None:
        """Store bytes for a lane."""
        nbytes = len(content)
        at = self.place(address, nbytes, alignment)
        if self.state.find(FORBIDDEN, at, at + nbytes) >= 0:
            self._forbid("writes", at, nbytes)
        self.shared[at : at + nbytes] = content
        self.state[at : at + nbytes] = b"\1" * nbytes

    def _forbid(self, what: str, at: int, nbytes: int) -> None:
        of_barrier = any(
            at < barrier - SHARED_WINDOW + 8 and barrier - SHARED_WINDOW < at + nbytes for barrier in self.barriers
        )
        why = "a barrier" if of_barrier else "the target of a copy under way"
        raise LaneError(f"{who()} {what} {nbytes} bytes at shared {at}: {why}")

    # Barriers ---------------------------------------------------------------------------------------------------------

    def initialize(self, address: int, expected: int) -> None:
        """Make a barrier."""
        at = self.place(address, 8, 8)
        if address in self.barriers:
            raise LaneError(f"{who()} initializes {self.barriers[address]} again")
        if expected < 1:
            raise LaneError(f"{who()}: a barrier of {expected} arrivals")
        self.state[at : at + 8] = bytes([FORBIDDEN]) * 8
        self.barriers[address] = Barrier(address, expected, expected)

    def barrier(self, address: int) -> Barrier:
        """The barrier at an address."""
        found = self.barriers.get(address)
        if found is None:
            raise LaneError(f"{who()}: there is no barrier at shared {address - SHARED_WINDOW}")
        return found

    def arrive(self, barrier: Barrier) -> None:
        """One arrival."""
        if barrier.pending == 0:
            raise LaneError(f"{who()} arrives where nobody is expected: {barrier}")
        barrier.pending -= 1
        self._step(barrier)

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        """So many more bytes to wait for."""
        if not 0 <= nbytes < 1 << 20:
            raise LaneError(f"{who()}: {nbytes} bytes are no count of a barrier")
        barrier.nbytes += nbytes

    def wait(self, address: int, parity: int) -> None:
        """Wait until a phase of that parity is over; whoever is slow looks again when its turn comes."""
        barrier = self.barrier(address)
        if "waits" in self.settings.faults:
            return
        lane = getcurrent()
        while barrier.phase & 1 == parity:
            barrier.waiting.append(lane)
            lane.pause(f"parity {parity} of {barrier}")

    def _step(self, barrier: Barrier) -> None:
        """Go on to the next phase if all is there."""
        if barrier.pending == 0 and barrier.nbytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected
            self.ready += barrier.waiting
            barrier.waiting.clear()

    # Asynchronous copies ----------------------------------------------------------------------------------------------

    def start_copy(self, target: int, source: int, nbytes: int) -> Copy:
        """Start a copy from global to shared memory, all at multiples of 16; what it will write is forbidden now."""
        if nbytes <= 0 or nbytes & 15:
            raise LaneError(f"{who()} copies {nbytes} bytes, no multiple of 16")
        region = self.memory.find(source, nbytes)
        _require_aligned(source, 16, region.name)
        _require_settled(region)
        offset = source - region.start
        if region.state.find(UNWRITTEN, offset, offset + nbytes) >= 0:
            raise LaneError(f"{who()} copies {nbytes} bytes at {source:#x} of {region}, which nobody has written")
        at = self.place(target, nbytes, 16)
        if self.state.find(FORBIDDEN, at, at + nbytes) >= 0:
            self._forbid("copies to", at, nbytes)
        self.state[at : at + nbytes] = bytes([FORBIDDEN]) * nbytes
        region.reads[offset : offset + nbytes] += 1
        return Copy(at, region, offset, nbytes)

    def deliver(self, delivery: Delivery) -> None:
        """Copies have been started that end together."""
        delivery.barrier.deliveries.append(delivery)
        if delivery.lane is not None:
            delivery.lane.deliveries.append(delivery)
        if not self.settings.late:
            self._land(delivery)

    def _land(self, delivery: Delivery) -> None:
        """Some copies are done; before a lane's later copies, its earlier ones."""
        lane = delivery.lane
        if lane is not None:
            while lane.deliveries[0] is not delivery:
                self._land(lane.deliveries[0])
            lane.deliveries.pop(0)
        for copy in delivery.copies:
            end = copy.target + copy.nbytes
            self.shared[copy.target : end] = copy.region.data[copy.source : copy.source + copy.nbytes]
            self.state[copy.target : end] = b"\1" * copy.nbytes
        barrier = delivery.barrier
        barrier.deliveries.remove(delivery)
        if lane is not None:
            self.arrive(barrier)
        else:
            barrier.nbytes -= delivery.nbytes
            self._step(barrier)

    def _land_one(self) -> bool:
        """Let one of the copies be done that somebody waits for, if there is one."""
        for barrier in self.barriers.values():
            if barrier.waiting and barrier.deliveries:
                self._land(self.lots.choice(barrier.deliveries))
                return True
        return False


def named(instruction: Any) -> str:
    """What messages call an instruction."""
    return str(getattr(instruction, "__name__", instruction)).strip("_")


def together(instruction: Callable[[list[Any]], Any], *arguments: Any) -> Any:
    """Bring a lane's arguments to an instruction of the whole warp; called by its twin, which the kernel calls.

    Args:
        instruction: from the arguments of the 32 lanes to their 32 results; or to None.
        arguments: this lane's.

    Returns:
        This lane's result.
    """
    lane: Any = getcurrent()
    warp = lane.warp
    if warp.complete(lane, instruction, arguments, 3):
        warp.results = instruction(warp.arguments)
        lane.block.ready += [other for other in warp.lanes if other is not lane]
    else:
        lane.pause(instruction)
    return warp.results[lane.index] if warp.results is not None else None


def meet(number: int, threads: int, waits: bool) -> None:
    """Bring a warp to a barrier of so many threads, by number; called by a twin, which the kernel calls.

    Args:
        number: of the barrier.
        threads: how many complete it; 0 for all of the block.
        waits: whether the warp waits for the others.
    """
    lane: Any = getcurrent()
    block, warp = lane.block, lane.warp
    threads = threads or block.threads
    what = f"{'barrier' if waits else 'an arrival at barrier'} {number} of {threads} threads"
    if not warp.complete(lane, what, None, 3):
        lane.pause(what)
        return
    meeting = block.meetings.setdefault(number, Meeting(threads))
    if meeting.threads != threads:
        raise LaneError(f"{lane} is at barrier {number} for {threads} threads, others are for {meeting.threads}")
    if warp in meeting.here:
        raise LaneError(f"the warp of {lane} is twice at {what} before it completes")
    meeting.here.append(warp)
    if waits:
        meeting.waiting.append(warp)
    else:
        block.ready += [other for other in warp.lanes if other is not lane]
    if 32 * len(meeting.here) == threads:
        del block.meetings[number]
        for waiting in meeting.waiting:
            block.ready += [other for other in waiting.lanes if other is not lane]
    elif waits:
        lane.pause(what)
