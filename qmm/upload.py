"""Copies of a file's bytes to a device, with nothing registered.

The copy engine is quick only with locked memory. Locking the file's pages for one copy takes as long as the copy, and
unlocking them waits for all work on the device, whoever's. So threads read the file into locked memory of the device's,
piece by piece, while the copy engine takes what came before. ``benchmarks/bench_registration.py`` compares the ways.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from qmm.copies import copy_in
from qmm.cuda import ANYWHERE, CudaCallError, call, drive, on_device
from qmm.kernels.ops.cpu.threads import Helpers
from qmm.pool import Pool
from qmm.streams import NO_TIMING

if TYPE_CHECKING:
    from qmm.device import Device
    from qmm.loaders.mapping import FileMapping

__all__ = ["Uploads"]

PIECE_NBYTES: Final = 4 << 20
THREADS: Final = 8
PIECES: Final = 2 * THREADS
"""Of locked memory: for each thread one that it fills, and one that the copy engine takes."""
DIRECT_NBYTES: Final = 16 << 20
"""So few bytes go by the driver's own locked memory, which takes no threads."""


class _Upload:
    """One copy under way, whose pieces the threads take as they come to them."""

    def __init__(self, target: int, mapping: FileMapping, offset: int, nbytes: int) -> None:
        self.target, self.mapping, self.offset, self.nbytes = target, mapping, offset, nbytes
        self.stopped = False
        self._threads = self._start = 0
        self._lock = threading.Lock()

    def thread(self) -> int:
        """The number of a thread that begins with it."""
        with self._lock:
            self._threads += 1
            return self._threads - 1

    def piece(self) -> tuple[int, int]:
        """Where a thread's next piece begins, and its length, which is 0 if none is left."""
        with self._lock:
            start = self.nbytes if self.stopped else self._start
            self._start = start + PIECE_NBYTES
        return start, max(0, min(PIECE_NBYTES, self.nbytes - start))


class Uploads:
    """Copies from files to one device. Its locked memory (64 MiB) and threads are kept until :meth:`close`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._locked = Pool(device.number, host=True)
        self._asked = False
        self._memory: memoryview | None = None
        self._address = 0
        self._events: list[Any] = []
        self._helpers = Helpers(THREADS - 1)  # starts them when they are needed
        self._lock = threading.Lock()

    def copy(self, target: int, mapping: FileMapping, offset: int, nbytes: int) -> None:
        """Copy bytes of a file to an address of the device, and wait for it. After an error or an interrupt the
        device's stream must be waited for: there may be copies on it.

        Raises:
            MappingError: the file has become shorter, or cannot be read.
            DeviceError: CUDA refused.
        """
        if nbytes <= DIRECT_NBYTES or not self._copied_by_threads(_Upload(target, mapping, offset, nbytes)):
            copy_in(self._device, target, mapping.view(offset, nbytes), self._device.stream)
        self._device.synchronize(self._device.stream)

    def _copied_by_threads(self, upload: _Upload) -> bool:
        """Queue the copies of all pieces, unless the system refuses locked memory, or another copy uses it. That is not
        waited for: this may be a signal handler in the middle of it."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            with self._device.errors(f"copying {upload.nbytes} bytes"):
                if not self._prepared():
                    return False
                self._helpers.run(lambda: self._work(upload), THREADS - 1)
                return True
        finally:
            self._lock.release()

    def _prepared(self) -> bool:
        """Whether there is locked memory; if it was refused, it is not asked for again."""
        if not self._asked:
            with suppress(CudaCallError), on_device(self._device.number):
                self._locked.open()
                while len(self._events) < PIECES:
                    self._events.append(drive("cuEventCreate", NO_TIMING))
                address = self._locked.allocate(PIECES * PIECE_NBYTES)
                if address is not None:
                    locked = (ctypes.c_uint8 * (PIECES * PIECE_NBYTES)).from_address(address)
                    self._address, self._memory = address, memoryview(locked).cast("B")
            self._asked = True
        return self._memory is not None

    def _work(self, upload: _Upload) -> None:
        """What each thread does: two pieces of the locked memory are its own."""
        assert self._memory is not None
        turn, stream = 2 * upload.thread(), self._device.stream
        try:
            with on_device(self._device.number):
                while True:
                    start, length = upload.piece()
                    if not length:
                        return
                    piece, event = turn * PIECE_NBYTES, self._events[turn]
                    drive("cuEventSynchronize", event)  # until the copy engine has taken what was there before
                    upload.mapping.read(upload.offset + start, self._memory[piece : piece + length])
                    arguments = (upload.target + start, self._address + piece, length, ANYWHERE, stream)
                    call("cudaMemcpyAsync", *arguments)
                    drive("cuEventRecord", event, stream)
                    turn ^= 1
        except BaseException:
            upload.stopped = True  # for the others: whoever waits for them, waits for one piece of each
            raise

    def close(self) -> None:
        """Give up the locked memory and the threads; the device is done with it. The device must be current."""
        self._helpers.dismiss()
        self._asked, self._memory, self._address = True, None, 0
        self._locked.close()
        while self._events:
            drive("cuEventDestroy", self._events.pop())
