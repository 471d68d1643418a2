"""What a device has queued on each stream: when it is done, the workspace it uses, the arrays that must outlive it.

A stream may be destroyed while work is queued on it. Its handle can then be given to a new stream, and 2
(``cudaStreamPerThread``) is another stream in each thread. So a handle tells streams apart only if something keeps its
stream from being destroyed (:func:`qmm.arrays.keeper_of`). Other streams are told apart by the number that the driver
gives them, and their work is followed by events.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from qmm import cuda
from qmm.arrays import keeper_of
from qmm.cuda import CudaCallError, call, capture_of, drive, on_device
from qmm.graph_life import GraphLife

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["IDLE_NBYTES", "NO_TIMING", "Streams", "Use"]

IDLE_NBYTES: Final = 64 << 20
"""Workspace of streams whose work is done is given back once all streams together have more than this."""
LEAST_NBYTES: Final = 1 << 18
"""The smallest workspace."""
REMEMBERED: Final = 16
"""How many streams are remembered, with their workspaces, once their work is done."""
HELD: Final = 8
"""Once arrays of more calls than these are held, those of work that is done are dropped."""
NO_TIMING: Final = 2
"""cudaEventDisableTiming: cheaper to record."""
AGAIN: Final = "Nothing was released yet: close again once the capture has ended."
"""What to do about work that cannot be waited for."""
IMPLICIT: Final = "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"
"""What CUDA says of the default stream while a stream is captured that would wait for it (a "blocking" one)."""


class Use:
    """What the device knows of one stream, or of one stream in one capture.

    Attributes:
        handle: of the stream, as the driver's bindings take it.
        address, nbytes: its workspace, which no other stream uses.
        event: recorded after each call on a stream that the user may destroy while work is queued; None on another.
        owner: what keeps the stream from being destroyed; if nothing does, what :func:`keeper_of` was asked about.
        life: of the graph that a capture becomes; else None.
    """

    __slots__ = ("address", "event", "handle", "life", "nbytes", "owner")

    def __init__(self, handle: Any, event: Any = None, life: GraphLife | None = None) -> None:
        self.handle = handle
        self.address = self.nbytes = 0
        self.owner: object = None
        self.event = event
        self.life = life


class Streams:
    """The streams that a device has queued work on. For the thread that holds the device's lock.

    Attributes:
        crowded: whether they have more than IDLE_NBYTES of workspace together: the next call that needs any looks
            which streams are done.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        known = cuda.driver()
        self._capturing, self._number = known.cuStreamIsCapturing, known.cuStreamGetId
        self._record = known.cuEventRecord
        self._handles: dict[int, Any] = {}  # as the driver's bindings take them
        self._kept: dict[int, Use] = {}  # by handle
        self._others: dict[int, Use] = {}  # by number
        self._captures: dict[tuple[int, int, int], Use] = {}  # by capture, handle and thread
        self._events: list[Any] = []  # free ones: never destroyed before the end, since somebody may be waiting
        self._held: deque[tuple[Any, object]] = deque()
        self._retired: list[tuple[Any, int]] = []  # workspaces that grew, each with the event after its last use
        self.crowded = False
        self._present: Use | None = None  # the one that gets workspace now

    def begin(self, stream: int, owner: object = None) -> Use:
        """What is known of a stream on which work will be queued now, until :meth:`end`.

        Args:
            stream: its handle.
            owner: see :meth:`qmm.device.Device.queue`.

        Raises:
            CudaCallError: it is no stream.
        """
        use = self._kept.get(stream)
        handle = self._handle(stream) if use is None else use.handle
        error, capturing = self._capturing(handle)
        if error:
            drive("cuStreamIsCapturing", handle)
        if capturing:  # when asked for the number, the driver would spoil the capture
            return self._captured(stream, handle)
        if use is not None:
            return use
        error, number = self._number(handle)
        if error:
            drive("cuStreamGetId", handle)
        use = self._others.get(number)
        if use is None or (owner is not use.owner and type(owner) is not int):
            return self._found(stream, handle, number, owner)
        return use

    def end(self, use: Use) -> None:
        """Note that a call's work is queued."""
        if use.event is not None:
            (error,) = self._record(use.event, use.handle)
            if error:
                drive("cuEventRecord", use.event, use.handle)

    def _handle(self, stream: int) -> Any:
        handle = self._handles.get(stream)
        if handle is None:
            if len(self._handles) > 1024:
                self._handles.clear()
            try:
                handle = self._handles[stream] = cuda.driver().CUstream(stream)
            except OverflowError as reason:
                raise CudaCallError(f"{stream} is not the handle of a stream: {reason}") from reason
        return handle

    def _found(self, stream: int, handle: Any, number: int, owner: object) -> Use:
        """A stream that was not known, or whose owner was not asked whether it may be destroyed."""
        use = self._others.get(number)
        if use is None:
            if len(self._kept) + len(self._others) >= REMEMBERED:
                with on_device(self._device.number):
                    self.forget_idle()
            use = self._others[number] = Use(handle, self._event())
        own = stream in self._device.own_streams
        use.owner = True if own else keeper_of(owner, stream, self._device.number)
        if use.owner is None:
            use.owner = owner
        else:
            self._kept[stream] = self._others.pop(number)
            self._events.append(use.event)
            use.event = None
        return use

    def workspace(self, use: Use, nbytes: int) -> int:
        """The address of ``nbytes`` for the call between :meth:`begin` and :meth:`end`. Later work on the stream may
        overwrite it; a capture's belongs to the graph.

        It is not allocated in the stream's own order (cudaMallocAsync): on a thread's default stream, a device was seen
        to hang for good once the thread had ended.

        Raises:
            OutOfMemoryError: there is not enough memory.
        """
        fits = nbytes <= use.nbytes and (use.nbytes <= IDLE_NBYTES or nbytes > IDLE_NBYTES)
        self._present = use
        try:
            grows = use.life is None and not fits
            if grows and use.address:
                self._retire(use)
            if self.crowded or (grows and (self._retired or nbytes + self._held_nbytes > IDLE_NBYTES)):
                with on_device(self._device.number):
                    self.forget_idle()
            if fits:
                return use.address
            if use.life is not None:
                use.address = self._device.allocate(nbytes, "the workspace of a captured graph")
                use.life.blocks.append(use.address)
            else:
                if nbytes <= IDLE_NBYTES:  # somewhat more than is needed now: the next call may need that
                    step = max(LEAST_NBYTES, (1 << (nbytes - 1).bit_length()) >> 3)
                    nbytes = -(-nbytes // step) * step
                use.address = self._device.allocate(nbytes, "workspace")
            use.nbytes = nbytes
            self.crowded = self._held_nbytes > IDLE_NBYTES
        finally:
            self._present = None
        return use.address

    @property
    def _held_nbytes(self) -> int:
        """Workspace of all streams, but not of captures."""
        return sum(use.nbytes for known in (self._kept, self._others) for use in known.values())

    def hold(self, stream: int, arrays: object) -> None:
        """Keep arrays alive until what is queued on a stream is done."""
        use = self.begin(stream)
        if use.life is not None:  # arrays of a graph are its owner's to keep
            return
        self._held.append((self._recorded(use), arrays))
        if len(self._held) > HELD:
            with on_device(self._device.number):
                self._let_go()

    def keep_for_graph(self, stream: int, array: object) -> None:
        """If a stream is being captured, keep an array that only qmm knows until the graph is destroyed."""
        life = self.begin(stream).life
        if life is not None:
            life.arrays.append(array)

    def order(self, first: int, then: int) -> None:
        """Let what is queued on a stream from now on wait for what is queued on another, unless one is captured."""
        if self._in_capture(self._handle(then)):  # then the first may be the default stream, which CUDA refuses
            return
        before, after = self.begin(first), self.begin(then)
        if before is not after and before.life is None:
            event = self._recorded(before)
            drive("cuStreamWaitEvent", after.handle, event, 0)
            self._events.append(event)

    def forget(self, stream: int) -> None:
        """Forget one of the device's own streams, which is about to be destroyed."""
        use = self._kept.pop(stream, None)
        if use is not None and use.address:
            self._retire(use)

    def follow(self, stream: int) -> None:
        """Say that the graph which a stream is captured into will be replayed between :meth:`begin` and
        :meth:`end`."""
        life = self.begin(stream).life
        assert life is not None
        life.followed = True

    @property
    def in_graphs(self) -> bool:
        """Whether a graph of the user's that was not destroyed yet, and may be replayed at any time, has work in it."""
        lives = [use.life for use in self._captures.values()]
        return any(life is not None and not life.followed and not life.over for life in lives)

    def wait(self, graphs: bool = True) -> None:
        """Wait for all that was queued.

        Args:
            graphs: whether to wait for replays of the user's graphs too. Nobody knows where those are: while there is
                such a graph, that means all work on the device.

        Raises:
            CudaCallError: the work failed; or a capture is in the way (:attr:`CudaCallError.captured`), in which case
                it may go on.
        """
        with self._device.lock:
            kept, others = list(self._kept.values()), list(self._others.values())
            everywhere = graphs and self.in_graphs
        handle = next((int(use.handle) for use in kept if self._in_capture(use.handle)), None)
        if handle is not None:  # before any is waited for: a second attempt is to wait for all
            which = f"stream {handle:#x} is being captured"
            if handle in (0, 1):
                which = "the default stream cannot be used while a stream is captured that would wait for it"
            why = f"{which}, and what was queued there before cannot be waited for. {AGAIN}"
            raise CudaCallError(why, IMPLICIT)
        for use in kept:
            drive("cuStreamSynchronize", use.handle)
        for use in others:
            drive("cuEventSynchronize", use.event)
        if everywhere:
            try:
                call("cudaDeviceSynchronize")
            except CudaCallError as error:
                if not error.captured:
                    raise
                why = "A graph of yours has products in it, so all work on the device must be waited for, but a stream "
                raise CudaCallError(f"{error}. {why}is being captured. {AGAIN}", error.name, error.number) from error
        with self._device.lock:
            self._let_go()

    def forget_idle(self) -> None:
        """Forget streams whose work is done, and give back all workspace that is not in use."""
        for known in (self._kept, self._others):
            for key, use in list(known.items()):
                if use is not self._present and self._idle(use) and known.pop(key, None) is not None:
                    if use.event is not None:
                        self._events.append(use.event)
                    if use.address:
                        self._device.free(use.address)
        for event, address in list(self._retired):
            if self._done(event):
                self._retired.remove((event, address))
                self._events.append(event)
                self._device.free(address)
        self.forget_graphs()
        self._let_go()
        self.crowded = self._held_nbytes > IDLE_NBYTES

    def forget_graphs(self) -> None:
        """Give back the workspaces of destroyed graphs."""
        for key, use in list(self._captures.items()):
            if use.life is not None and use.life.over:
                self._captures.pop(key, None)
                use.life.arrays.clear()
                while use.life.blocks:
                    self._device.free(use.life.blocks.pop())

    def close(self) -> None:
        """Destroy the events; all work is done."""
        self._captures.clear()
        self._events += [event for event, _ in (*self._held, *self._retired)]
        self._held.clear()
        self._retired.clear()
        self._kept.clear()
        while self._others:
            self._events.append(self._others.popitem()[1].event)
        while self._events:
            drive("cuEventDestroy", self._events.pop())

    def _captured(self, stream: int, handle: Any) -> Use:
        """A stream in a capture: it has its own workspace there, since streams of one capture may run at once."""
        capture, graph = capture_of(stream)
        thread = threading.get_ident()  # the handle of a thread's default stream is the same in each
        use = self._captures.get((capture, stream, thread))
        if use is None:
            with on_device(self._device.number):
                self.forget_idle()
            lives = (other.life for key, other in self._captures.items() if key[0] == capture)
            use = self._captures[capture, stream, thread] = Use(handle, None, next(lives, None) or GraphLife(graph))
        return use

    def _retire(self, use: Use) -> None:
        """Give a workspace back once the work is done that is queued on its stream."""
        event, address = self._recorded(use), use.address
        use.nbytes = use.address = 0  # first: an interrupt must not leave it in use, and to be freed
        self._retired.append((event, address))

    def _event(self) -> Any:
        return self._events.pop() if self._events else drive("cuEventCreate", NO_TIMING)

    def _recorded(self, use: Use) -> Any:
        """An event after what is queued on a stream now."""
        event = self._event()
        drive("cuEventRecord", event, use.handle)
        return event

    def _idle(self, use: Use) -> bool:
        """Whether what was queued on a stream is done."""
        if use.event is not None:
            return self._done(use.event)
        return not self._in_capture(use.handle) and self._ready("cuStreamQuery", use.handle)

    @staticmethod
    def _in_capture(handle: Any) -> bool:
        """Whether a stream is being captured, or is the default stream and cannot be used while another is."""
        try:
            return bool(drive("cuStreamIsCapturing", handle))
        except CudaCallError as error:
            if error.name != IMPLICIT:
                raise
            return True

    def _done(self, event: Any) -> bool:
        """Whether what was queued before an event is done."""
        return self._ready("cuEventQuery", event)

    @staticmethod
    def _ready(query: str, of: Any) -> bool:
        try:
            drive(query, of)
        except CudaCallError as error:
            if error.name != "CUDA_ERROR_NOT_READY":
                raise
            return False
        return True

    def _let_go(self) -> None:
        """Drop the arrays of work that is done."""
        while self._held and self._done(self._held[0][0]):
            self._events.append(self._held.popleft()[0])
