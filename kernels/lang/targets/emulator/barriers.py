"""The emulator's barriers: mbarriers in shared memory, the asynchronous copies that they count, and named barriers.

Copies land as late as possible: one at a time, when no lane can go on, and only if somebody waits for it; or, with
``Settings.late`` off, at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from greenlet import getcurrent

from qmm.errors import EmulatorError
from qmm.kernels.lang.targets.emulator.memory import SHARED_START, Region, who

if TYPE_CHECKING:
    from qmm.kernels.lang.targets.emulator.cta import CTA
    from qmm.kernels.lang.targets.emulator.lanes import Lane, Warp

__all__ = ["Copy", "Delivery", "MBarrier", "MBarriers", "NamedBarrier"]


@dataclass(eq=False)
class Copy:
    """An asynchronous copy: so many bytes from an offset in a region to one in shared memory."""

    target: int
    region: Region
    source: int
    nbytes: int


@dataclass(eq=False)
class Delivery:
    """Copies that end together, and what they then report to a barrier: that so many bytes arrived, or that a lane
    arrives."""

    copies: list[Copy]
    barrier: MBarrier
    nbytes: int
    lane: Lane | None = None


@dataclass(eq=False)
class MBarrier:
    """An mbarrier."""

    address: int
    expected: int
    pending: int
    nbytes: int = 0
    phase: int = 0
    waiting: list[Lane] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)

    def __str__(self) -> str:
        still = f"{self.pending} of {self.expected} arrivals and {self.nbytes} bytes to come"
        return f"the barrier at shared {self.address - SHARED_START} in phase {self.phase} ({still})"


@dataclass(eq=False)
class NamedBarrier:
    """A barrier of whole warps, by number (``barrier.cta``)."""

    threads: int
    here: list[Warp] = field(default_factory=list)
    waiting: list[Warp] = field(default_factory=list)


class MBarriers:
    """The mbarriers of a CTA, by address, and the copies in flight to it."""

    def __init__(self, cta: CTA) -> None:
        self._cta = cta
        self._barriers: dict[int, MBarrier] = {}

    def initialize(self, address: int, count: int) -> None:
        """Initialize a barrier of so many arrivals.

        Raises:
            EmulatorError: it is initialized already, does not fit, or the number is invalid.
        """
        if address in self._barriers:
            raise EmulatorError(f"{who()} initializes {self._barriers[address]} again")
        if count < 1:
            raise EmulatorError(f"{who()}: a barrier of {count} arrivals")
        self._cta.shared.barriers.add(self._cta.shared.reserve(address, 8, 8, "initializes a barrier of"))
        self._barriers[address] = MBarrier(address, count, count)

    def at(self, address: int) -> MBarrier:
        """The barrier at an address.

        Raises:
            EmulatorError: there is none.
        """
        found = self._barriers.get(address)
        if found is None:
            raise EmulatorError(f"{who()}: there is no barrier at shared {address - SHARED_START}")
        return found

    def arrive(self, barrier: MBarrier) -> None:
        """One arrival.

        Raises:
            EmulatorError: the phase has all its arrivals.
        """
        if barrier.pending == 0:
            raise EmulatorError(f"{who()} arrives where nobody is expected: {barrier}")
        barrier.pending -= 1
        self._step(barrier)

    def expect(self, barrier: MBarrier, nbytes: int) -> None:
        """Expect so many more bytes.

        Raises:
            EmulatorError: the number is invalid.
        """
        if not 0 <= nbytes < 1 << 20:
            raise EmulatorError(f"{who()}: {nbytes} bytes are no count of a barrier")
        barrier.nbytes += nbytes

    def wait(self, barrier: MBarrier, parity: int) -> None:
        """Wait until a phase of that parity is complete; a slow lane checks again when its turn comes."""
        if "waits" in self._cta.settings.faults:
            return
        lane: Any = getcurrent()
        while barrier.phase & 1 == parity:
            barrier.waiting.append(lane)
            lane.pause(f"parity {parity} of {barrier}")

    def start(self, target: int, source: int, nbytes: int) -> Copy:
        """Start a copy from global to shared memory, all at multiples of 16; its target must not be accessed until it
        lands.

        Raises:
            EmulatorError: it is not allowed.
        """
        if nbytes <= 0 or nbytes & 15:
            raise EmulatorError(f"{who()} copies {nbytes} bytes, no multiple of 16")
        self._cta.shared.place(target, nbytes, 16)
        region, offset = self._cta.memory.source(source, nbytes, 16)
        return Copy(self._cta.shared.reserve(target, nbytes, 16, "copies to"), region, offset, nbytes)

    def deliver(self, delivery: Delivery) -> None:
        """Register copies that end together."""
        delivery.barrier.deliveries.append(delivery)
        if delivery.lane is not None:
            delivery.lane.deliveries.append(delivery)
        if not self._cta.settings.late:
            self._land(delivery)

    def land_one(self) -> bool:
        """Complete one of the copies that some lane waits for, if there is one."""
        for barrier in self._barriers.values():
            if barrier.waiting and barrier.deliveries:
                self._land(self._cta.lots.choice(barrier.deliveries))
                return True
        return False

    def copies_under_way(self) -> bool:
        """Whether any copy is in flight."""
        return any(barrier.deliveries for barrier in self._barriers.values())

    def _step(self, barrier: MBarrier) -> None:
        """Go on to the next phase if this one is complete."""
        if barrier.pending == 0 and barrier.nbytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected
            self._cta.ready += barrier.waiting
            barrier.waiting.clear()

    def _land(self, delivery: Delivery) -> None:
        """Complete copies; a lane's earlier ones before its later ones."""
        lane = delivery.lane
        if lane is not None:
            while lane.deliveries[0] is not delivery:
                self._land(lane.deliveries[0])
            lane.deliveries.pop(0)
        for copy in delivery.copies:
            self._cta.shared.put(copy.target, bytes(copy.region.data[copy.source : copy.source + copy.nbytes]))
        barrier = delivery.barrier
        barrier.deliveries.remove(delivery)
        if lane is not None:
            self.arrive(barrier)
        else:
            barrier.nbytes -= delivery.nbytes
            self._step(barrier)
