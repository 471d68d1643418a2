"""A CTA of the emulator: its lanes, its shared memory, and whose turn it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from greenlet import getcurrent

from qmm.errors import EmulatorError
from qmm.kernels.lang.fields import HOW, FieldAccess
from qmm.kernels.lang.targets.emulator.barriers import MBarriers, NamedBarrier
from qmm.kernels.lang.targets.emulator.lanes import Lane, Warp, named
from qmm.kernels.lang.targets.emulator.memory import FIRST, Memory, SharedMemory, who

__all__ = ["CTA", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How kernels are run.

    Attributes:
        late: whether asynchronous copies land as late as possible; else at once.
        slow: the number of a warp that has its turn only where no other can go on.
        seed: of the random choice of whose turn it is.
        faults: faults injected by tests, which show that they notice them: "waits" (lanes go on without
            waiting for an mbarrier), "predecessors" (nor for the kernels before), or the name of a mask
            (:mod:`qmm.kernels.lang.masks`), which kernels then lack.
    """

    late: bool = True
    slow: int | None = None
    seed: int = 0
    faults: frozenset[str] = frozenset()


class CTA:
    """One CTA of a launch.

    Attributes:
        index: its number.
        count: how many the grid has.
        threads: how many lanes it has, a multiple of 32.
        memory: global memory.
        shared: its shared memory.
        fields: how its lanes read block fields; None if they may not.
        after_predecessors: whether the kernels before had ended when it started.
        mbarriers: those in its shared memory.
        named_barriers: the named barriers at which warps have arrived, by number.
        ready: the lanes that can go on.
        lots: the random generator that chooses between them.
    """

    def __init__(
        self,
        memory: Memory,
        shared_nbytes: int,
        fields: FieldAccess | None,
        index: int,
        count: int,
        threads: int,
        after_predecessors: bool,
        settings: Settings,
    ) -> None:
        self.memory = memory
        self.shared = SharedMemory(shared_nbytes)
        self.fields = fields
        self.index = index
        self.count = count
        self.threads = threads
        self.after_predecessors = after_predecessors
        self.settings = settings
        self.warps = [Warp() for _ in range(threads >> 5)]
        self.ready: list[Lane] = []
        self.mbarriers = MBarriers(self)
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.lots = random.Random(f"{settings.seed} {index}")
        self.hub = getcurrent()

    def run(self, kernel: Callable[..., None], arguments: Mapping[str, int]) -> None:
        """Run all lanes to their end.

        Raises:
            EmulatorError: the kernel broke a rule; the message says which.
        """
        with np.errstate(all="ignore"):
            for thread in range(self.threads):
                lane = Lane(self, thread, lambda: kernel(**arguments))
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

    def field(self, address: int, nbytes: int) -> tuple[bytearray, int]:
        """Where a lane finds a field of a block: a buffer and an offset.

        Raises:
            EmulatorError: it may not be read.
        """
        if self.fields is None:
            raise EmulatorError(f"{who()} loads a field of a block, but the kernel has no FieldAccess: give it {HOW}")
        if self.fields.space == "shared":
            if address >= FIRST:  # shared memory lies far below
                raise EmulatorError(
                    f"{who()} loads {nbytes} bytes of a block at {address:#x}, an address of global memory, as if it "
                    f'were shared: give the kernel fields=FieldAccess({self.fields.alignment}, "global")'
                )
            return self.shared.field(address, nbytes, self.fields.alignment)
        return self.memory.read(address, nbytes, min(nbytes, self.fields.alignment))

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
            elif not self.mbarriers.land_one():
                return

    def _require_end(self) -> None:
        """Check that no lane waits, and that no copy is in flight."""
        stuck: dict[str, int] = {}
        for warp in self.warps:
            for lane in warp.lanes:
                if not lane.dead:
                    where = f"warp {lane.thread >> 5} at {named(lane.waits)}"
                    stuck[where] = stuck.get(where, 0) + 1
        if stuck:
            found = "; ".join(f"{count} lanes of {where}" for where, count in stuck.items())
            raise EmulatorError(f"CTA {self.index} waits for ever: {found}")
        if self.mbarriers.copies_under_way():
            raise EmulatorError(f"CTA {self.index} ended while copies were in flight")
        if any(lane.unclaimed for warp in self.warps for lane in warp.lanes):
            raise EmulatorError(f"CTA {self.index} ended with copies that no barrier knew of")
        if self.named_barriers:
            raise EmulatorError(
                f"CTA {self.index} ended while warps were expected at barriers {list(self.named_barriers)}"
            )
