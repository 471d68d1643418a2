"""Copies of a file's pages to a device, at the speed of its link, with nothing registered.

The copy engine is quick only with pages that are locked. Registering those of the file for one copy takes as long as
the copy, and unregistering them waits for all work on the device, whoever's. So threads copy them to locked memory,
piece by piece, while the copy engine takes what came before. Cached pages on an H200 (driver 580), in GB/s:

==========================  ======  ======  =======  =====
way                         16 MiB  64 MiB  256 MiB  1 GiB
==========================  ======  ======  =======  =====
register, copy, unregister
the driver's own way        11      9       8        8
this one                    8       17      23       25
==========================  ======  ======  =======  =====
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qmm.copies import copy_in
from qmm.cuda import CudaCallError, drive, on_device
from qmm.pool import Pool
from qmm.streams import NO_TIMING

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["Uploads"]

PIECE_NBYTES: Final = 4 << 20
THREADS: Final = 4
PIECES: Final = 2 * THREADS
"""Of locked memory: for each thread one that it fills, and one that the copy engine takes."""
DIRECT_NBYTES: Final = 32 << 20
"""Up to so many bytes go the driver's own way."""


class Uploads:
    """Copies from host memory to one device; its locked memory (32 MiB) is kept until :meth:`close`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._locked = Pool(device.number, host=True)
        self._address: int | None = None
        self._events: list[Any] = []
        self._lock = threading.Lock()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy ``nbytes`` from the host's address ``source`` to the device, and wait for it.

        Raises:
            DeviceError: CUDA refused.
        """
        if nbytes <= DIRECT_NBYTES or not self._copied_by_threads(target, source, nbytes):
            pages = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(source))
            copy_in(self._device, target, pages, self._device.stream)
        self._device.synchronize(self._device.stream)

    def _copied_by_threads(self, target: int, source: int, nbytes: int) -> bool:
        """Queue the copies of all pieces, unless the system refuses locked memory or threads."""
        with self._lock, self._device.errors(f"copying {nbytes} bytes"):
            if not self._prepared():
                return False
            try:
                with ThreadPoolExecutor(THREADS) as threads:  # whatever happens, its end waits for them
                    for done in [threads.submit(self._work, n, target, source, nbytes) for n in range(THREADS)]:
                        done.result()
            except RuntimeError:  # of threading: no more threads can be started
                return False
            return True

    def _prepared(self) -> bool:
        """Whether there is locked memory; if not, it is not asked for again."""
        if self._address is None:
            self._address = 0
            with suppress(CudaCallError), on_device(self._device.number):
                self._locked.open()
                while len(self._events) < PIECES:
                    self._events.append(drive("cuEventCreate", NO_TIMING))
                self._address = self._locked.allocate(PIECES * PIECE_NBYTES) or 0
        return self._address != 0

    def _work(self, n: int, target: int, source: int, nbytes: int) -> None:
        """Copy one thread's part of the pieces: the n-th of each THREADS."""
        assert self._address
        with on_device(self._device.number):
            for turn, start in enumerate(range(n * PIECE_NBYTES, nbytes, THREADS * PIECE_NBYTES)):
                which = 2 * n + turn % 2
                piece, event = self._address + which * PIECE_NBYTES, self._events[which]
                length = min(PIECE_NBYTES, nbytes - start)
                drive("cuEventSynchronize", event)  # until the copy engine has taken what was there before
                ctypes.memmove(piece, source + start, length)  # other threads go on
                self._device.copy(target + start, piece, length, self._device.stream)
                drive("cuEventRecord", event, self._device.stream)

    def close(self) -> None:
        """Give up the locked memory; the device is done with it. The device must be current."""
        self._address = None
        self._locked.close()
        while self._events:
            drive("cuEventDestroy", self._events.pop())
