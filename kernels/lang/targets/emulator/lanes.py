"""The emulator's lanes, each a greenlet that runs until it has to wait, and their warps."""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from greenlet import greenlet

from qmm.errors import EmulatorError
from qmm.kernels.lang.operation import Operation
from qmm.kernels.lang.targets.emulator.barriers import Copy, Delivery, NamedBarrier

if TYPE_CHECKING:
    from qmm.kernels.lang.targets.emulator.cta import CTA

__all__ = ["Lane", "Warp", "named"]

CALL = Operation.__call__.__code__


class Lane(greenlet):
    """One thread of a CTA.

    Attributes:
        cta: the CTA.
        thread: its number there.
        index: its number in its warp.
        may_read_results: whether the kernels before have ended, as far as this lane knows.
        waits: what it waits for, if it does.
        unclaimed: copies that it has started, and that no barrier knows of yet.
    """

    def __init__(self, cta: CTA, thread: int, function: Callable[[], None]) -> None:
        super().__init__(function, cta.hub)
        self.cta = cta
        self.thread = thread
        self.index = thread & 31
        self.warp = cta.warps[thread >> 5]
        self.may_read_results = cta.after_predecessors
        self.waits: Any = None
        self.unclaimed: list[Copy] = []
        self.deliveries: list[Delivery] = []
        self.gr_context = contextvars.copy_context()  # it holds NumPy's settings for overflow

    def __str__(self) -> str:
        return f"CTA {self.cta.index} warp {self.thread >> 5} lane {self.index}"

    def pause(self, waits: Any) -> None:
        """Let others run until this lane is ready again."""
        self.waits = waits
        self.cta.hub.switch()
        self.waits = None

    # Called by the meanings of operations - --------------------------------------------------------------------------

    def wait_for_predecessors(self) -> None:
        """Note that the kernels before have ended."""
        self.may_read_results = self.may_read_results or "predecessors" not in self.cta.settings.faults

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Start a copy that :meth:`arrive_after_copies` tells a barrier of."""
        self.unclaimed.append(self.cta.mbarriers.start(target, source, nbytes))

    def bulk_copy(self, target: int, source: int, nbytes: int, barrier: int) -> None:
        """Start a copy whose bytes a barrier counts."""
        mbarriers = self.cta.mbarriers
        copy = mbarriers.start(target, source, nbytes)
        mbarriers.deliver(Delivery([copy], mbarriers.at(barrier), nbytes))

    def arrive_after_copies(self, barrier: int) -> None:
        """An arrival when the lane's copies so far are done."""
        copies, self.unclaimed = self.unclaimed, []
        mbarriers = self.cta.mbarriers
        mbarriers.deliver(Delivery(copies, mbarriers.at(barrier), 0, self))

    def together(self, function: Callable[..., Any], literals: tuple[int, ...], arguments: tuple[Any, ...]) -> Any:
        """Take part in an instruction of the whole warp.

        Args:
            function: from a sequence of 32 for each argument to the results of the lanes, or None.
            literals: which arguments are literals, given as they are.
            arguments: this lane's.

        Returns:
            This lane's result.
        """
        warp = self.warp
        if warp.complete(self, function, arguments):
            warp.results = function(*warp.columns(function, literals))
            self.cta.ready += [other for other in warp.lanes if other is not self]
        else:
            self.pause(function)
        return warp.results[self.index] if warp.results is not None else None

    def at_barrier(self, number: int, threads: int, waits: bool) -> None:
        """Come to a named barrier, with the whole warp.

        Args:
            number: of the barrier.
            threads: how many complete it.
            waits: whether the warp waits for the others.
        """
        cta, warp = self.cta, self.warp
        what = f"{'barrier' if waits else 'an arrival at barrier'} {number} of {threads} threads"
        if not warp.complete(self, what, None):
            self.pause(what)
            return
        barrier = cta.named_barriers.setdefault(number, NamedBarrier(threads))
        if barrier.threads != threads:
            raise EmulatorError(
                f"{self} is at barrier {number} for {threads} threads, others are for {barrier.threads}"
            )
        if warp in barrier.here:
            raise EmulatorError(f"the warp of {self} is twice at {what} before it completes")
        barrier.here.append(warp)
        if waits:
            barrier.waiting.append(warp)
        else:
            cta.ready += [other for other in warp.lanes if other is not self]
        if 32 * len(barrier.here) == threads:
            del cta.named_barriers[number]
            for waiting in barrier.waiting:
                cta.ready += [other for other in waiting.lanes if other is not self]
        elif waits:
            self.pause(what)


class Warp:
    """32 lanes, and the arguments of those that have reached an instruction of the whole warp."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.results: Any = None
        self._count = 0
        self._instruction: Any = None
        self._place: Any = None
        self._arguments: list[Any] = [None] * 32

    def complete(self, lane: Lane, instruction: Any, arguments: Any) -> bool:
        """Note that a lane has reached an instruction; returns whether it is the last of the warp.

        The caller is a method of the lane, called by the meaning of an operation.

        Raises:
            EmulatorError: other lanes are at another one.
        """
        frame: Any = sys._getframe(3)
        if frame.f_code is CALL:
            frame = frame.f_back
        place = frame.f_code, frame.f_lasti
        if self._count == 0:
            self._instruction, self._place = instruction, place
        elif instruction != self._instruction or place != self._place:
            raise EmulatorError(
                f"{lane} is at {named(instruction)} ({_line_of(*place)}), while {self._count} lanes of its warp are at "
                f"{named(self._instruction)} ({_line_of(*self._place)})"
            )
        self._arguments[lane.index] = arguments
        self._count += 1
        if self._count < 32:
            return False
        self._count = 0
        return True

    def columns(self, instruction: Any, literals: tuple[int, ...]) -> list[Any]:
        """The arguments of the 32 lanes, a sequence of 32 for each; of a literal its value.

        Raises:
            EmulatorError: lanes have different literals.
        """
        columns: list[Any] = list(zip(*self._arguments, strict=True))
        for i in literals:
            if len(set(columns[i])) > 1:
                raise EmulatorError(f"{named(instruction)}: lanes of a warp have different literals {set(columns[i])}")
            columns[i] = columns[i][0]
        return columns


def _line_of(code: Any, at: int) -> str:
    """The file and line of a Python instruction."""
    line = next((line for start, end, line in code.co_lines() if start <= at < end), None)
    return f"{code.co_filename}, line {line}"


def named(instruction: Any) -> str:
    """The name of an instruction in messages."""
    return str(getattr(instruction, "__name__", instruction))
