"""Copies of a file's bytes to a device, with nothing registered.

The copy engine is quick only with locked memory. Locking the file's pages for one copy takes as long as the copy, and
unlocking them waits for all work on the device, whoever's. So threads read the file into locked memory of the device's,
piece by piece, while the copy engine takes what came before. ``benchmarks/bench_registration.py`` compares the ways.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from qmm.copies import copy_in
from qmm.cuda import CudaCallError, drive, on_device
from qmm.pool import Pool
from qmm.streams import NO_TIMING

if TYPE_CHECKING:
    from qmm.device import Device
    from qmm.loaders.mapping import FileMapping

__all__ = ["Uploads"]

PIECE_NBYTES: Final = 4 << 20
THREADS: Final = 4
PIECES: Final = 2 * THREADS
"""Of locked memory: for each thread one that it fills, and one that the copy engine takes."""
DIRECT_NBYTES: Final = 16 << 20
"""So few bytes go by the driver's own locked memory, which takes no threads."""


class Uploads:
    """Copies from files to one device. Its locked memory (32 MiB) and threads are kept until :meth:`close`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._locked = Pool(device.number, host=True)
        self._memory: memoryview | None = None
        self._address = 0
        self._events: list[Any] = []
        self._threads = ThreadPoolExecutor(THREADS, "qmm upload")  # starts them when they are needed
        self._lock = threading.Lock()

    def copy(self, target: int, mapping: FileMapping, offset: int, nbytes: int) -> None:
        """Copy bytes of a file to an address of the device, and wait for it.

        Raises:
            MappingError: the file has become shorter, or cannot be read.
            DeviceError: CUDA refused.
        """
        if nbytes <= DIRECT_NBYTES or not self._copied_by_threads(target, mapping, offset, nbytes):
            copy_in(self._device, target, mapping.view(offset, nbytes), self._device.stream)
        self._device.synchronize(self._device.stream)

    def _copied_by_threads(self, target: int, mapping: FileMapping, offset: int, nbytes: int) -> bool:
        """Queue the copies of all pieces, unless the system refuses locked memory or threads."""
        with self._lock, self._device.errors(f"copying {nbytes} bytes"):
            if not self._prepared():
                return False
            working = []
            try:
                for n in range(THREADS):
                    working.append(self._threads.submit(self._work, n, target, mapping, offset, nbytes))
                for done in working:
                    done.result()
            except RuntimeError:  # of threading: no more threads can be started
                return False
            finally:
                wait(working)
            return True

    def _prepared(self) -> bool:
        """Whether there is locked memory; if not, it is not asked for again."""
        if self._memory is None:
            self._memory = memoryview(b"")
            with suppress(CudaCallError), on_device(self._device.number):
                self._locked.open()
                while len(self._events) < PIECES:
                    self._events.append(drive("cuEventCreate", NO_TIMING))
                self._address = self._locked.allocate(PIECES * PIECE_NBYTES) or 0
            if self._address:
                locked = (ctypes.c_uint8 * (PIECES * PIECE_NBYTES)).from_address(self._address)
                self._memory = memoryview(locked).cast("B")
        return self._address != 0

    def _work(self, n: int, target: int, mapping: FileMapping, offset: int, nbytes: int) -> None:
        """Copy one thread's part of the pieces: the n-th of each THREADS."""
        assert self._memory
        with on_device(self._device.number):
            for turn, start in enumerate(range(n * PIECE_NBYTES, nbytes, THREADS * PIECE_NBYTES)):
                which = 2 * n + turn % 2
                piece, event = which * PIECE_NBYTES, self._events[which]
                length = min(PIECE_NBYTES, nbytes - start)
                drive("cuEventSynchronize", event)  # until the copy engine has taken what was there before
                mapping.read(offset + start, self._memory[piece : piece + length])
                self._device.copy(target + start, self._address + piece, length, self._device.stream)
                drive("cuEventRecord", event, self._device.stream)

    def close(self) -> None:
        """Give up the locked memory and the threads; the device is done with it. The device must be current."""
        self._threads.shutdown()
        self._memory, self._address = memoryview(b""), 0
        self._locked.close()
        while self._events:
            drive("cuEventDestroy", self._events.pop())
