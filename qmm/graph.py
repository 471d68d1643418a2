"""CUDA graphs: work that is captured once and replayed, and the timing of work by replays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from qmm.cuda import CudaCallError, call, on_device, refuse, runtime
from qmm.device import Device
from qmm.errors import ClosedError
from qmm.loaders.closing import Resource

__all__ = ["Graph", "capture", "replay", "time_ms"]


class Graph(Resource):
    """A captured sequence of work, which can be replayed."""

    def __init__(self, device: Device, graph: object) -> None:
        self._device = device
        self._stopped = self._ended = False
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

    @property
    def _in_use(self) -> bool:
        return self._device._in_use

    def launch(self, stream: int, owner: object = None) -> bool:
        """Put one replay on a stream.

        Args:
            stream: its handle.
            owner: of the stream, see :meth:`qmm.device.Device.queue`.

        Returns:
            Whether it was; not if the stream is being captured, since a replay cannot be.

        Raises:
            ClosedError: it was closed.
            DeviceError: CUDA refused.
        """
        replayed: bool = self._device.put("launching a graph", self._launch, stream, owner)
        return replayed

    def _launch(self, stream: int, owner: object) -> bool:
        if self._stopped or self._ended:
            raise ClosedError("the graph was closed by another thread. Create another one.")
        streams = self._device.streams
        use = streams.begin(stream, owner)
        if use.life is not None:
            return False
        try:
            (error,) = runtime().cudaGraphLaunch(self._executable, stream)
            if error:
                refuse("cudaGraphLaunch", error)
        finally:  # also after an interrupt, when it may be queued
            streams.end(use)
        return True

    def stop(self) -> None:
        """Refuse replays from now on."""
        with self._device.lock:
            self._stopped = True

    def close(self) -> None:
        """Free it; the device must be done with it. Closing twice is harmless."""
        if self.closed:
            return
        with self._device.lock:
            self._ended = True
            with self._device.errors("freeing a graph"), on_device(self._device.number):
                self._held.close()
                self._device.streams.forget_graphs()


def capture(device: Device, work: Callable[[], object], stream: int, batch: int = 1) -> Graph:
    """Capture what ``work()`` queues on a stream as a graph, instead of running it.

    Args:
        device: where.
        work: launches and copies. The graph gets the workspace that they need.
        stream: a handle other than 0.
        batch: calls of ``work`` in one replay.

    Raises:
        DeviceError: something in it cannot be captured.
    """
    mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    with device.errors("capturing a graph"), on_device(device.number):
        call("cudaStreamBeginCapture", stream, mode)
        try:
            with device.lock:
                device.streams.follow(stream)
            for _ in range(batch):
                work()
        except BaseException:  # a stream that is still capturing is unusable
            with suppress(CudaCallError):  # the failure may have ended it
                call("cudaGraphDestroy", call("cudaStreamEndCapture", stream))
            raise
        return Graph(device, call("cudaStreamEndCapture", stream))


@contextmanager
def replay(device: Device, work: Callable[[], object], stream: int, batch: int = 1) -> Iterator[Callable[[], object]]:
    """Capture calls of ``work()``, for use inside the ``with`` block; arguments as for :func:`capture`.

    Yields:
        A function that puts one replay on the stream.
    """
    with capture(device, work, stream, batch) as graph:
        yield lambda: graph.launch(stream)
        device.synchronize(stream)


def time_ms(device: Device, work: Callable[[], object], stream: int, repeats: int, batch: int = 8) -> list[float]:
    """Milliseconds of device time that ``work()`` takes.

    Replays of a graph are timed, so Python's time between launches is not included.

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
        on_device(device.number),
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
