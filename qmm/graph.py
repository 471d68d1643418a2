"""CUDA graphs: work that is captured once and replayed, and plans of products on top of them."""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from qmm.arrays import stream_handle
from qmm.cuda import CudaCallError, call, current_device, runtime
from qmm.device import Device, Prepared
from qmm.errors import ClosedError
from qmm.kernels.ops.matvec.plan import NOTHING, Product, Region
from qmm.loaders.closing import Resource
from qmm.tracing import outside, untraced, watched

__all__ = ["Graph", "Plan", "Step", "capture", "queue_sequence", "replay", "time_ms"]


class Graph(Resource):
    """A captured sequence of work, which can be replayed."""

    def __init__(self, device: Device, graph: object) -> None:
        self._device = device
        self._ended = False
        self._held = ExitStack()
        self._held.callback(call, "cudaGraphDestroy", graph)
        try:
            self._executable = call("cudaGraphInstantiate", graph, 0)
        except BaseException:
            self._held.close()
            self._ended = True
            raise
        self._held.callback(call, "cudaGraphExecDestroy", self._executable)

    @property
    def closed(self) -> bool:
        """Whether it was closed, or this is a forked child."""
        return self._ended or self._device.forked

    def launch(self, stream: int) -> None:
        """Put one replay on a stream.

        Raises:
            ClosedError: it was closed.
            DeviceError: CUDA refused.
        """
        self._device.put("launching a graph", self._launch, stream)

    def _launch(self, stream: int) -> None:
        if self._ended:
            raise ClosedError("the graph was closed by another thread. Create another one.")
        call("cudaGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """Free it; the device must be done with it. Closing twice is harmless."""
        if self.closed:
            return
        with self._device.lock:
            self._ended = True
            with self._device.errors("freeing a graph"), current_device(self._device.number):
                self._held.close()


def capture(device: Device, work: Callable[[], object], stream: int, batch: int = 1) -> Graph:
    """Capture what ``work()`` queues on a stream as a graph, instead of running it.

    Args:
        device: where.
        work: launches and copies. It must not allocate: call it once before.
        stream: a handle other than 0.
        batch: calls of ``work`` in one replay.

    Raises:
        DeviceError: something in it cannot be captured.
    """
    mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    with device.errors("capturing a graph"), current_device(device.number), _no_collection():
        call("cudaStreamBeginCapture", stream, mode)
        try:
            for _ in range(batch):
                work()
        except BaseException:  # a stream that is still capturing is unusable
            with suppress(CudaCallError):  # the failure may have ended it
                call("cudaGraphDestroy", call("cudaStreamEndCapture", stream))
            raise
        return Graph(device, call("cudaStreamEndCapture", stream))


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the block: a dropped engine would wait for the device, which ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def replay(device: Device, work: Callable[[], object], stream: int, batch: int = 1) -> Iterator[Callable[[], None]]:
    """Capture calls of ``work()``, for use inside the ``with`` block; arguments as for :func:`capture`.

    Yields:
        A function that puts one replay on the stream.
    """
    with capture(device, work, stream, batch) as graph:
        yield lambda: graph.launch(stream)
        device.synchronize(stream)


def time_ms(device: Device, work: Callable[[], object], stream: int, repeats: int, batch: int = 8) -> list[float]:
    """Milliseconds of device time that ``work()`` takes.

    Replays of a graph are timed, so Python's time between launches, about 0.1 ms a product, is not included.

    Args:
        device: where.
        work: as for :func:`capture`.
        stream: as for :func:`capture`.
        repeats: replays.
        batch: calls in one replay.

    Returns:
        The time of one call, as the mean of each replay.
    """
    with (
        replay(device, work, stream, batch) as again,
        device.errors("timing"),
        current_device(device.number),
        device.events() as (start, end),
    ):
        times = []
        for _ in range(repeats + 1):
            call("cudaEventRecord", start, stream)
            again()
            call("cudaEventRecord", end, stream)
            call("cudaEventSynchronize", end)
            times.append(float(call("cudaEventElapsedTime", start, end)) / batch)
        return times[1:]  # the first replay uploads the graph


class Step(NamedTuple):
    """One product of a sequence: prepared, with the addresses of its weight, activations and results."""

    prepared: Prepared
    weights: int
    x: int
    y: int

    @property
    def product(self) -> Product:
        """What was planned."""
        assert isinstance(self.prepared.work, Product)
        return self.prepared.work


def queue_sequence(
    device: Device, steps: Sequence[Step], stream: int, workspace: int, share_activations: bool = True
) -> None:
    """Put products on a stream, one after the other.

    While a product ends, the beginning of the next one's weights is prefetched to L2. A product with the same
    activations as the one before, quantized the same way, does not quantize them again.

    Args:
        device: where.
        steps: the products; they share the workspace.
        stream: a stream's handle.
        workspace: the address of the largest workspace that one of them needs; 0 if none needs any.
        share_activations: if False, each product quantizes its activations.
    """
    quantized: Step | None = None
    with device.lock:
        for step, following in itertools.zip_longest(steps, steps[1:]):
            shared = share_activations and quantized is not None and _same_activations(quantized, step)
            skip = step.product.quantize_launches if shared else 0
            _set_next_prefetch(step, following)
            try:
                device.queue(step.prepared, step.weights, step.x, step.y, stream, workspace, skip)
            finally:
                _set_next_prefetch(step, None)
            if step.product.quantized is not None and not skip:
                quantized = step
            if quantized and _writes_activations(step, quantized):
                quantized = None


def _same_activations(first: Step, second: Step) -> bool:
    """Whether the second product would quantize the same activations to the same place as the first."""
    return (
        first.x == second.x
        and first.product.quantized is not None
        and first.product.quantized == second.product.quantized
        and first.product.x == second.product.x
    )


def _writes_activations(step: Step, quantized: Step) -> bool:
    """Whether a product's results overlap, or may overlap, another's activations."""
    (x_low, x_high), (y_low, y_high) = quantized.product.x.reach, step.product.y.reach
    return quantized.x + x_low < step.y + y_high and step.y + y_low < quantized.x + x_high


def _set_next_prefetch(step: Step, following: Step | None) -> None:
    """Set the weights of another product that a product's launches prefetch to L2, or none."""
    number = step.product.prefetches
    if number is None:
        return
    region: Region = following.product.prefetch_region if following else NOTHING
    launch = step.prepared.launches[number]
    launch.cell("next_weights").value = following.weights if following and region != NOTHING else 0
    launch.cell("next_row_nbytes").value = region.row_nbytes
    launch.cell("next_rows").value = region.rows
    launch.cell("next_nbytes").value = region.nbytes


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
        stream_of: Callable[[], int],
        kept: list[Any],
        name: str,
    ) -> None:
        """Capture a sequence.

        Args:
            device: where it runs.
            steps: its products, without empty ones.
            length: the number of products that the user passed.
            checks: functions that raise if the weights must not be read any more.
            stream_of: the stream that the library of the first ``x`` uses now.
            kept: the arrays, to keep them alive.
            name: of the model, for messages.
        """
        self._closed = True  # until there is something to close
        self._device, self._length, self._checks, self._name = device, length, list(checks), name
        self._stream_of: Callable[[], int] | None = stream_of
        self._kept = kept
        # Its own workspace: engine.matmul may use the engine's on the same stream, between or during replays.
        nbytes = max((step.product.workspace_nbytes for step in steps), default=0)
        with ExitStack() as held:
            workspace = held.enter_context(device.temporary_buffer(nbytes, "a plan's workspace")) if nbytes else 0
            with device.temporary_stream() as stream:  # not the engine's: it would capture other threads' work
                work = functools.partial(queue_sequence, device, steps, stream, workspace)
                self._graph = held.enter_context(capture(device, work, stream))
            held.callback(self._let_go)
            held.callback(device.drain)
            self._held = held.pop_all()  # what close() releases, the last one first
        self._closed = False

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
                library of the first ``x`` uses now. Replays do not overlap each other, whatever their streams.

        Raises:
            ClosedError: the plan or its engine was closed.
            MappingError: the file changed since it was mapped.
            DeviceError: CUDA failed.
        """
        if watched():
            outside(Plan.__call__)(self, stream)
            return
        if self.closed:
            raise ClosedError(f"{self._name}: the plan was closed, or its engine was. Create another one.")
        for check in self._checks:
            check()
        if stream is None:
            stream_of = self._stream_of  # None if another thread closes the plan: the graph then raises
            stream = stream_of() if stream_of is not None else 0
        self._graph.launch(stream_handle(stream))

    def close(self) -> None:
        """Wait for the device, and release the graph and the arrays. Closing twice is harmless; if KeyboardInterrupt
        ends it, call it again.

        Raises:
            DeviceError: work that was still queued failed.
        """
        if not self._device.forked and hasattr(self, "_held"):
            self._closed = True
            self._held.close()

    def _let_go(self) -> None:
        """Drop the arrays, once the device is done: their libraries reuse the memory."""
        self._kept.clear()
        self._stream_of = None

    def _why_not_copied(self) -> str:
        return "copied or pickled: it reads and writes particular arrays. Create another: engine.plan(...)"

    def __repr__(self) -> str:
        return f"<Plan of {self._length} products on cuda:{self._device.number}{' (closed)' if self._closed else ''}>"
