"""Copies of a file's bytes to a device, with nothing registered.

The copy engine is quick only with locked memory. Locking the file's pages for one copy takes as long as the copy, and
unlocking them waits for all work on the device, whoever's. So threads read the file into locked memory of the device's,
piece by piece, while the copy engine takes what came before. ``benchmarks/bench_registration.py`` compares the ways.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from qmm.copies import copy_in
from qmm.cuda import ANYWHERE, CudaCallError, call, drive, on_device
from qmm.errors import ClosedError
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
    """One copy under way, whose pieces the threads take as they come to them. None touches anything once :meth:`end`
    has returned."""

    def __init__(self, target: int, nbytes: int, work: Callable[[int, _Upload], None]) -> None:
        self.target, self.nbytes = target, nbytes
        self._starts = iter(range(0, nbytes, PIECE_NBYTES))
        self._work = work
        self._stopped = False
        self._running = self._done = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition(threading.Lock())

    def run(self, threads: ThreadPoolExecutor) -> None:
        """Work in THREADS threads, and wait for them.

        Raises:
            RuntimeError: the system refuses another thread.
            Exception: of the first thread that failed.
        """
        for n in range(THREADS):
            threads.submit(self._part, n)
        with self._changed:
            while self._done < THREADS and self._error is None:
                self.wait()
        if self._error is not None:
            raise self._error

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Where a thread's next piece begins, and its length.

        Raises:
            ClosedError: the copy was ended before it was complete.
        """
        while True:
            with self._changed:
                if self._stopped:
                    raise ClosedError("the copy was ended before it was complete")
                start = next(self._starts, None)
            if start is None:
                return
            yield start, min(PIECE_NBYTES, self.nbytes - start)

    def _part(self, n: int) -> None:
        with self._changed:
            if self._stopped:  # of an upload that ended before a thread came to this part
                return
            self._running += 1
        try:
            self._work(n, self)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._running -= 1
                self._done += 1
                self._changed.notify_all()

    def wait(self) -> None:
        """Wait until one of the threads ends, with the lock held."""
        self._changed.wait()

    def end(self) -> None:
        """Have the threads stop, and wait for them. Twice is harmless; so is calling it again after an interrupt."""
        with self._changed:
            self._stopped = True
            while self._running:
                self.wait()
        self._error = None  # whose traceback refers to what the caller may want to delete


class Uploads:
    """Copies from files to one device. Its locked memory (64 MiB) and threads are kept until :meth:`close`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._locked = Pool(device.number, host=True)
        self._asked = False
        self._memory: memoryview | None = None
        self._address = 0
        self._events: list[Any] = []
        self._threads = ThreadPoolExecutor(THREADS, "qmm upload")  # starts them when they are needed
        self._upload: _Upload | None = None
        self._lock = threading.Lock()

    def copy(self, target: int, mapping: FileMapping, offset: int, nbytes: int) -> None:
        """Copy bytes of a file to an address of the device, and wait for it. After an error or an interrupt there may
        be work left: :meth:`settle`, and then wait for the device's stream.

        Raises:
            MappingError: the file has become shorter, or cannot be read.
            DeviceError: CUDA refused.
        """
        if nbytes <= DIRECT_NBYTES or not self._copied_by_threads(target, mapping, offset, nbytes):
            copy_in(self._device, target, mapping.view(offset, nbytes), self._device.stream)
        self._device.synchronize(self._device.stream)

    def _copied_by_threads(self, target: int, mapping: FileMapping, offset: int, nbytes: int) -> bool:
        """Queue the copies of all pieces; unless the system refuses locked memory or threads, or these are in use. They
        are not waited for, since this may be a signal handler in the middle of another copy."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            with self._device.errors(f"copying {nbytes} bytes"):
                self.settle()
                if not self._prepared():
                    return False
                work = functools.partial(self._work, mapping=mapping, offset=offset)
                upload = self._upload = _Upload(target, nbytes, work)
                try:
                    upload.run(self._threads)
                except RuntimeError:  # of threading: no more threads can be started
                    return False
                finally:
                    self.settle()
                return True
        finally:
            self._lock.release()

    def settle(self, target: int | None = None) -> None:
        """End the copy to that address, or any that an interrupt has left: afterwards no thread works for it."""
        upload = self._upload
        if upload is not None and target in (None, upload.target):
            upload.end()
            self._upload = None

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

    def _work(self, n: int, upload: _Upload, *, mapping: FileMapping, offset: int) -> None:
        """What the n-th thread does: two pieces of the locked memory are its own."""
        assert self._memory is not None
        turns = itertools.cycle((2 * n, 2 * n + 1))
        with on_device(self._device.number):
            for start, length in upload.pieces():
                turn = next(turns)
                piece, event = turn * PIECE_NBYTES, self._events[turn]
                drive("cuEventSynchronize", event)  # until the copy engine has taken what was there before
                mapping.read(offset + start, self._memory[piece : piece + length])
                arguments = (upload.target + start, self._address + piece, length, ANYWHERE, self._device.stream)
                call("cudaMemcpyAsync", *arguments)
                drive("cuEventRecord", event, self._device.stream)

    def close(self) -> None:
        """Give up the locked memory and the threads; the device is done with it. The device must be current."""
        self.settle()
        self._threads.shutdown()
        self._asked, self._memory, self._address = True, None, 0
        self._locked.close()
        while self._events:
            drive("cuEventDestroy", self._events.pop())
