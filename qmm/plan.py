"""Plans: sequences of products that are captured into a CUDA graph and replayed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from qmm.arrays import ArrayKind, kind_of, stream_handle
from qmm.device import Device
from qmm.errors import ClosedError
from qmm.graph import capture
from qmm.loaders.closing import Resource
from qmm.sequence import Step, queue_sequence
from qmm.tracing import outside, untraced, watched

__all__ = ["Plan"]


class Plan(Resource):
    """Products in a fixed order, captured into one CUDA graph: what :meth:`qmm.Engine.plan` returns; a context manager.

    Calling it queues them all: the arrays are read and written in place, in the state that they are in then. A product
    may read what one before it wrote. Products that follow each other with the same ``x`` quantize it once. While one
    ends, the beginning of the next one's weights is prefetched to the GPU's L2 cache (from sm_90 on, and not from
    mapped memory). The plan keeps the arrays alive, and the engine closes it when it is closed.
    """

    def __init__(
        self,
        device: Device,
        steps: Sequence[Step],
        length: int,
        checks: Sequence[Callable[[], None]],
        kind: ArrayKind,
        kept: list[Any],
        name: str,
    ) -> None:
        """Capture a sequence.

        Args:
            device: where it runs.
            steps: its products, without empty ones.
            length: the number of products that the user passed.
            checks: functions that raise if the weights must not be read any more.
            kind: of the first ``x``.
            kept: the arrays, to keep them alive, with the first ``x`` first.
            name: of the model, for messages.
        """
        self._closed = True  # until there is something to close
        self._closing = threading.RLock()
        self._device, self._length, self._checks, self._name = device, length, list(checks), name
        self._kind = kind
        self._kept = kept
        self._filled_on = {kind_of(array).filled_on(array) for pair in kept for array in pair} - {0}
        self._queue = functools.partial(queue_sequence, device, steps)
        with ExitStack() as held:
            with device.temporary_stream() as stream:  # not the engine's: it would capture other threads' work
                work = functools.partial(self._queue, stream)
                self._graph = held.enter_context(capture(device, work, stream))
            held.callback(self._let_go)
            held.callback(device.drain, graphs=False)  # raises what failed
            self._held = held.pop_all()  # what close() releases, the last one first
        self._closed = False

    @property
    def _in_use(self) -> bool:
        return self._device._in_use

    def __len__(self) -> int:
        """How many products it has."""
        return self._length

    @property
    def closed(self) -> bool:
        """Whether it was closed, by itself or with its engine; or this is a forked child."""
        return self._closed or self._device.forked

    @untraced
    def __call__(self, stream: Any = None) -> None:
        """Queue all products.

        Args:
            stream: where: a stream of CuPy, PyTorch, Numba or cuda.core, or a handle. Without one, the stream that the
                library of the first ``x`` uses now. Replays do not overlap each other, whatever their streams. If it is
                being captured, the products become part of that graph, which then needs the arrays and the engine.

        Raises:
            ClosedError: the plan or its engine was closed.
            MappingError: the file changed since it was mapped.
            DeviceError: CUDA failed.
        """
        if watched():
            outside(Plan.__call__)(self, stream)
            return
        if self._closed or self._device.forked:  # `closed`, without its call
            raise ClosedError(f"{self._name}: the plan was closed, or its engine was. Create another one.")
        for check in self._checks:
            check()
        owner = stream
        if stream is None:
            owner, kept = self._kind, self._kept[:1]  # none if another thread closes the plan: the graph then raises
            stream = owner.stream(kept[0][0]) if kept else 0
        handle = stream_handle(stream)
        for named in self._filled_on:
            if named != handle:
                self._device.order(named, handle)
        if not self._graph.launch(handle, owner):
            self._queue(handle)

    def close(self) -> None:
        """Wait for the engine's work, and release the graph and the arrays. Closing twice is harmless; if
        KeyboardInterrupt ends it, call it again.

        Raises:
            DeviceError: work that was still queued failed; or a stream that the engine used is being captured, so that
                it cannot be waited for. Nothing is released then: close again once the capture has ended.
        """
        if not self._device.forked and hasattr(self, "_held"):
            self._closed = True
            with self._closing:  # another thread would release what this one still waits for
                if not self._graph.closed:
                    self._graph.stop()  # other threads may be about to launch it
                    self._device.settle(self, graphs=False)  # those use the arrays, which are the user's to keep
                self._held.close()

    def _let_go(self) -> None:
        """Drop the arrays, once the device is done: their libraries reuse the memory."""
        self._kept.clear()

    def _why_not_copied(self) -> str:
        return "copied or pickled: it reads and writes particular arrays. Create another: engine.plan(...)"

    def __repr__(self) -> str:
        return f"<Plan of {self._length} products on cuda:{self._device.number}{' (closed)' if self._closed else ''}>"
