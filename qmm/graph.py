"""A sequence of products that is prepared once and run again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from qmm.arrays import ArrayKind, stream_handle
from qmm.errors import ClosedError
from qmm.loaders.closing import Resource
from qmm.tracing import outside, untraced, watched

if TYPE_CHECKING:
    from qmm.device import GPU, Product
    from qmm.engine import Engine

__all__ = ["Plan", "Step"]


class Step:
    """One product of a plan, with the arrays that it reads and writes."""

    def __init__(self, product: Product | None, x: int, y: int, check: Callable[[], None], kept: object) -> None:
        """Put one together.

        Args:
            product: what to queue; None for an empty one.
            x: the address of the activations.
            y: the address of the results.
            check: raises if the weights may not be read any more.
            kept: what must live as long as the step.
        """
        self.product, self.x, self.y, self.check, self.kept = product, x, y, check, kept


class Plan(Resource):
    """Products in a fixed order, captured into one CUDA graph. Made by :meth:`qmm.Engine.plan`; a context manager.

    Calling it queues them all: the arrays are read and written in place, in the state that they are in then. A product
    may read what one before it wrote. While one ends, the beginning of the next one's weights is already brought into
    the GPU's L2 cache (from sm_90 on, and not from mapped memory). The plan keeps the arrays alive, and the engine ends
    it when it is closed.
    """

    def __init__(self, engine: Engine, gpu: GPU, steps: Sequence[Step], kind: ArrayKind, first: Any) -> None:
        self._closed = True  # until there is something to close
        self._engine = engine
        self._kept = [step.kept for step in steps]
        self._checks = list({step.check: None for step in steps})
        self._kind, self._first = kind, first
        self._steps = len(steps)
        self._closing = threading.RLock()
        products = [(step.product, step.x, step.y) for step in steps if step.product is not None]
        # Of its own: engine.matmul may use the engine's on the same stream, between the plan's replays or in them.
        nbytes = max((product.scratch_nbytes for product, _, _ in products), default=0)
        scratch = 0
        with ExitStack() as held:
            if nbytes:
                scratch = gpu.allocate(nbytes, "a plan's scratch memory")
                held.callback(gpu.free, scratch)
            with gpu.fresh_stream() as stream:  # on the engine's, work of other threads would be captured too
                self._graph = gpu.capture(lambda: gpu.sequence(products, stream, scratch), stream)
            held.callback(self._graph.close)
            held.callback(self._kept.clear)  # once the device is done: their libraries would lend the memory to others
            held.callback(gpu.drain)
            self._held = held.pop_all()  # what close() gives up, the last one first
        self._closed = False

    def __len__(self) -> int:
        """How many products it has."""
        return self._steps

    @property
    def closed(self) -> bool:
        """Whether it was closed, by itself or with its engine."""
        return self._closed or self._engine.closed

    @untraced
    def __call__(self, stream: Any = None) -> None:
        """Queue all products.

        Args:
            stream: where: a stream of CuPy, PyTorch, Numba or cuda.core, or a handle. Without one, the stream that the
                library of the first ``x`` uses now. Replays do not overlap each other, whatever their streams.

        Raises:
            ClosedError: the plan or its engine was closed.
            MappingError: the file changed since it was mapped.
            DeviceError: CUDA failed.
        """
        if watched():
            outside(Plan.__call__)(self, stream)
            return
        first = self._first  # another thread may close the plan meanwhile
        if self.closed or first is None:
            raise ClosedError(f"{self._engine.model.path}: the plan was closed, or its engine was. Make another one.")
        for check in self._checks:
            check()
        self._graph.launch(self._kind.stream(first) if stream is None else stream_handle(stream))

    def close(self) -> None:
        """Wait for the device, and give up the graph and the arrays. Twice is harmless. If KeyboardInterrupt ends it,
        call it again.

        Raises:
            DeviceError: work that was still queued failed.
        """
        self._closed = True
        if self._engine.forked:
            return  # what CUDA holds is the parent's
        self._graph.end()
        with self._closing:
            self._held.close()
        self._first = None

    def _why_not_copied(self) -> str:
        return "copied or pickled: it reads and writes the arrays that it was made with. Make another: engine.plan(...)"

    def __repr__(self) -> str:
        return f"<Plan of {self._steps} products on {self._engine.device}{' (closed)' if self.closed else ''}>"
