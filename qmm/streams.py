"""What a device has queued on each stream: when it is done, the workspace it uses, the arrays that must outlive it.

Streams are told apart by the number that the driver gives them, not by their handle: a handle can be given to a new
stream once its stream was destroyed, and 2 (``cudaStreamPerThread``) is another stream in each thread. What is queued
is followed by events, not by streams: a stream may be destroyed while work is queued on it.
"""

from __future__ import annotations

import ctypes
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from qmm import cuda
from qmm.cuda import CudaCallError, call, capture_of, drive, on_device, runtime

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["GraphLife", "Streams", "Use"]

KEPT_NBYTES: Final = 1 << 20
"""A stream keeps a workspace of this size. A larger one is allocated and freed, in stream order, by each call: which
then takes so long that 2 us do not matter."""
REMEMBERED: Final = 16
"""How many streams are remembered, with their workspaces, once their work is done."""
HELD: Final = 8
"""Work whose arrays are held is looked after once there are more such calls than these."""
NO_TIMING: Final = 2
"""cudaEventDisableTiming: cheaper to record."""


class Use:
    """What the device knows of one stream, or of one stream in one capture.

    Attributes:
        handle: of the stream, as the driver's bindings take it.
        address, nbytes: its workspace.
        event: recorded after each call; None in a capture.
        keeper: what keeps the stream from being destroyed, True if nothing can; None if the user may destroy it while
            work is queued. Kernels must not start before their predecessors end then: see :func:`keeper_of`.
        temporary: the workspace of the present call, which it frees; 0 if it has none.
        life: of the graph that the capture becomes.
    """

    __slots__ = ("address", "event", "handle", "keeper", "life", "nbytes", "temporary")

    def __init__(self, event: Any, life: GraphLife | None = None) -> None:
        self.handle: Any = None
        self.address = self.nbytes = self.temporary = 0
        self.event = event
        self.keeper: object = None
        self.life = life


class GraphLife:
    """The time in which a graph, or one that was instantiated from it, exists.

    CUDA calls a function of C when the last of them is destroyed: ``sem_post``, so that no Python runs in CUDA's
    thread.

    Attributes:
        blocks: the memory that the graph uses.
        followed: whether an event is recorded after each of its replays, as after those of a plan.
    """

    _living: set[GraphLife] = set()  # noqa: RUF012  # CUDA writes to their semaphores, whatever becomes of the device

    def __init__(self, graph: Any) -> None:
        """``graph`` may still be capturing."""
        known, libc = runtime(), ctypes.CDLL(None)
        self.blocks: list[int] = []
        self.followed = False
        self._semaphore = ctypes.create_string_buffer(64)
        libc.sem_init(self._semaphore, 0, 0)
        post = known.cudaHostFn_t(ctypes.cast(libc.sem_post, ctypes.c_void_p).value)
        no_wait = known.cudaUserObjectFlags.cudaUserObjectNoDestructorSync
        counted = call("cudaUserObjectCreate", ctypes.addressof(self._semaphore), post, 1, no_wait)
        self._living.add(self)
        call("cudaGraphRetainUserObject", graph, counted, 1, known.cudaUserObjectRetainFlags.cudaGraphUserObjectMove)

    @property
    def over(self) -> bool:
        """Whether they are all destroyed."""
        if self in self._living and ctypes.CDLL(None).sem_trywait(self._semaphore) == 0:
            self._living.discard(self)
        return self not in self._living


class Streams:
    """The streams that a device has queued work on. For the thread that holds the device's lock."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._number, self._capturing = cuda.driver().cuStreamGetId, cuda.driver().cuStreamIsCapturing
        self._record = cuda.driver().cuEventRecord
        self._handles: dict[int, Any] = {}
        self._uses: dict[int, Use] = {}
        self._captures: dict[tuple[int, int], Use] = {}
        self._events: list[Any] = []  # free ones: never destroyed before the end, since somebody may be waiting
        self._held: deque[tuple[Any, object]] = deque()
        self._present: Use | None = None  # the one whose call is being queued

    def begin(self, stream: int) -> Use:
        """What is known of a stream on which work will be queued now, until :meth:`end`.

        Raises:
            CudaCallError: it is no stream.
        """
        handle = self._handles.get(stream)
        if handle is None:
            if len(self._handles) > 1024:
                self._handles.clear()
            handle = self._handles[stream] = cuda.driver().CUstream(stream)
        error, capturing = self._capturing(handle)
        if error:
            drive("cuStreamIsCapturing", handle)
        if capturing:  # when asked for the number, the driver would spoil the capture
            use = self._captured(stream)
        else:
            error, number = self._number(handle)
            if error:
                drive("cuStreamGetId", handle)
            use = self._uses.get(number) or self._first(number)
        use.handle = handle
        return use

    def end(self, use: Use) -> None:
        """Note that a call's work is queued."""
        self._present = None
        if use.event is None:
            return
        if use.temporary:
            address, use.temporary = use.temporary, 0
            self._device.free(address, use.handle)
        (error,) = self._record(use.event, use.handle)
        if error:
            drive("cuEventRecord", use.event, use.handle)

    def workspace(self, use: Use, nbytes: int) -> int:
        """The address of ``nbytes`` for the call between :meth:`begin` and :meth:`end`. Later work on the stream may
        overwrite it; a capture's belongs to the graph.

        Raises:
            DeviceError: there is not enough memory.
        """
        if nbytes <= use.nbytes:
            return use.address
        self._present = use
        allocate = self._device.allocate
        if use.life is not None:
            use.address, use.nbytes = allocate(nbytes, "the workspace of a captured graph"), nbytes
            use.life.blocks.append(use.address)
            return use.address
        if nbytes <= KEPT_NBYTES:
            use.address, use.nbytes = allocate(KEPT_NBYTES, "workspace", use.handle), KEPT_NBYTES
            return use.address
        use.temporary = allocate(nbytes, "workspace", use.handle)
        return use.temporary

    def hold(self, stream: int, arrays: object) -> None:
        """Keep arrays alive until what is queued on a stream is done."""
        use = self.begin(stream)
        if use.event is None:  # a capture: arrays of a graph are its owner's to keep
            return
        event = self._event()
        drive("cuEventRecord", event, use.handle)
        self._held.append((event, arrays))
        if len(self._held) > HELD:
            with on_device(self._device.number):
                self._let_go()

    def order(self, first: int, then: int) -> None:
        """Let what is queued on a stream from now on wait for what is queued on another, unless one is captured."""
        before, after = self.begin(first), self.begin(then)
        if before is not after and before.event is not None and after.event is not None:
            event = self._event()
            drive("cuEventRecord", event, before.handle)
            drive("cuStreamWaitEvent", after.handle, event, 0)
            self._events.append(event)

    def follow(self, stream: int) -> None:
        """Say that the graph which a stream is captured into will be replayed between :meth:`begin` and
        :meth:`end`."""
        life = self.begin(stream).life
        assert life is not None
        life.followed = True

    def wait(self) -> None:
        """Wait for all that was queued. Nobody knows where a captured graph is replayed: while there is one, that means
        all work on the device."""
        with self._device.lock:
            events = [use.event for use in self._uses.values()]
            lives = {use.life for use in self._captures.values() if use.life is not None}
            replayed = [life for life in lives if not (life.followed or life.over)]
        for event in events:
            drive("cuEventSynchronize", event)
        if replayed:
            call("cudaDeviceSynchronize")
        with self._device.lock:
            self._let_go()

    def forget_idle(self) -> None:
        """Forget streams whose work is done, and give back workspaces, those of destroyed graphs too."""
        for number, use in list(self._uses.items()):
            if use is not self._present and self._done(use.event):
                del self._uses[number]
                self._events.append(use.event)
                if use.address:
                    self._device.free(use.address)
        for key, use in list(self._captures.items()):
            if use.life is not None and use.life.over:
                del self._captures[key]
                for address in use.life.blocks:
                    self._device.free(address)
                use.life.blocks.clear()
        self._let_go()

    def close(self) -> None:
        """Destroy the events; all work is done."""
        self._held.clear()
        self._captures.clear()
        while self._uses:
            self._events.append(self._uses.popitem()[1].event)
        while self._events:
            drive("cuEventDestroy", self._events.pop())

    def _first(self, number: int) -> Use:
        """A stream that is used for the first time, or again after it was forgotten."""
        if len(self._uses) >= REMEMBERED:
            with on_device(self._device.number):
                self.forget_idle()
        use = self._uses[number] = Use(self._event())
        return use

    def _captured(self, stream: int) -> Use:
        """A stream in a capture: it has its own workspace there, since streams of one capture may run at once."""
        capture, graph = capture_of(stream)
        use = self._captures.get((capture, stream))
        if use is None:
            with on_device(self._device.number):
                self.forget_idle()
            lives = (other.life for key, other in self._captures.items() if key[0] == capture)
            use = self._captures[capture, stream] = Use(None, next(lives, None) or GraphLife(graph))
        return use

    def _event(self) -> Any:
        return self._events.pop() if self._events else drive("cuEventCreate", NO_TIMING)

    def _done(self, event: Any) -> bool:
        """Whether what was queued before an event is done."""
        try:
            drive("cuEventQuery", event)
        except CudaCallError as error:
            if error.name != "CUDA_ERROR_NOT_READY":
                raise
            return False
        return True

    def _let_go(self) -> None:
        """Drop the arrays of work that is done."""
        while self._held and self._done(self._held[0][0]):
            self._events.append(self._held.popleft()[0])
