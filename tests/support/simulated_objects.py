"""What a simulated CUDA (:mod:`simulated_cuda`) is made of."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Capture", "Event", "Executable", "Item", "Stream"]


class Item:
    """Queued work: what it uses of the device's memory, and what it waits for."""

    def __init__(self, blocks: frozenset[int] = frozenset(), after: tuple[Item, ...] = (), early: bool = False) -> None:
        self.blocks, self.after, self.early = blocks, after, early
        self.done = False
        self.then: list[Callable[[], None]] = []

    def finish(self) -> None:
        for item in self.after:
            item.finish()
        if not self.done:
            self.done = True
            for then in self.then:
                then()


class Stream:
    """A stream, with its work in order."""

    def __init__(self, handle: int, number: int) -> None:
        self.handle, self.number = handle, number
        self.items: list[Item] = []
        self.capture: Capture | None = None
        self.alive = True

    def __int__(self) -> int:
        return self.handle

    @property
    def pending(self) -> list[Item]:
        self.items = [item for item in self.items if not item.done]
        return self.items

    def finish(self) -> None:
        """The device has done all that was queued here."""
        for item in list(self.items):
            item.finish()


class Event:
    def __init__(self) -> None:
        self.items: list[Item] = []
        self.captured = False
        self.alive = True


class Capture:
    """A capture, which becomes a graph. It and its executables share the graph's user objects."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.blocks: set[int] = set()
        self.retained: list[Callable[[], None]] = []
        self.streams: list[Stream] = []
        self.holders = 1

    def drop(self) -> None:
        self.holders -= 1
        assert self.holders >= 0, "a graph was destroyed twice"
        if not self.holders:
            for destroyed in self.retained:
                destroyed()


class Executable:
    def __init__(self, graph: Capture) -> None:
        self.graph, self.last = graph, Item()
        self.last.done = True
        graph.holders += 1
