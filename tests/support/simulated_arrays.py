"""A made-up library of arrays and streams, and a weight to multiply them by, for a simulated CUDA."""

from __future__ import annotations

import weakref
from typing import Any

from simulated_objects import Stream

from qmm.arrays import ArrayKind, View
from qmm.kernels.ops.op import WeightLayout

__all__ = ["WEIGHTS", "Array", "Arrays", "K", "M", "Own", "Weight"]

K, M = 32, 8
WEIGHTS = 0x100
"""Where the weight lies."""


class Array:
    """Float32 in a device's memory that is not qmm's."""

    def __init__(self, shape: tuple[int, ...], address: int, named: int = 0) -> None:
        self.shape, self.address, self.named = shape, address, named


class Own(Stream):
    """A stream's object of the library."""


class Arrays(ArrayKind):
    """The library, which keeps its current stream.

    Attributes:
        made: the arrays that it gave, with the streams that they are for.
        recorded: the addresses of those that it was told of, with the streams.
        cached_nbytes: its own memory, for :meth:`empty_bytes`.
    """

    name = "made up"

    def __init__(self, now: int, recycles: bool = True, records: bool = True) -> None:
        self.now, self.recycles, self.records, self.names_streams = now, recycles, records, not recycles
        self.made: list[tuple[Any, Any]] = []
        self.recorded: list[tuple[int, Any]] = []
        self.cached_nbytes = 0

    def view(self, array: Any) -> View:
        return View(array.shape, (4 * array.shape[1], 4), "float32", array.address, 0, True)

    def empty(self, shape: tuple[int, ...], like: Any, stream: Any = None) -> Any:
        made = Array(shape, 0x8000 + 0x1000 * len(self.made))
        self.made.append((weakref.ref(made), stream))
        return made

    def empty_bytes(self, nbytes: int, like: Any, stream: Any = None) -> Any:
        if nbytes > self.cached_nbytes:
            raise MemoryError
        return self.empty((1, nbytes), like, stream)

    def stream(self, array: Any) -> int:
        return self.now

    def current(self, device: int) -> Any:
        return self

    def keeper(self, stream: Any) -> object:
        return stream is self

    def owns(self, stream: Any) -> bool:
        return isinstance(stream, Own)

    def record(self, array: Any, stream: Any) -> bool:
        self.recorded.append((array.address, stream))
        return self.records

    def filled_on(self, array: Any) -> int:
        return int(array.named)


class Weight:
    """A tensor and where it lies, in one."""

    name, shape, k, m = "w", (M, K), K, M
    format = type("Format", (), {"name": "Q4_0"})
    model = type("Model", (), {"path": "model.gguf"})

    def layout(self) -> WeightLayout:
        return WeightLayout.at(WEIGHTS)

    def lease(self) -> int:
        return WEIGHTS
