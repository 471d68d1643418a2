"""How long the CUDA graphs of a user exist, which products were captured into."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

from qmm.cuda import call, runtime

__all__ = ["GraphLife"]

SEMAPHORE_NBYTES: Final = 64
"""Memory for C's ``sem_t``, which takes 32 bytes with glibc."""


class GraphLife:
    """The time in which a graph, or one that was instantiated from it, exists.

    CUDA calls a function of C when the last of them is destroyed: ``sem_post``, so that no Python runs in CUDA's
    thread. The semaphore is in memory of C's, since that may be after Python has ended.

    Attributes:
        blocks: the memory that the graph uses.
        arrays: arrays that the graph uses and nobody else refers to.
        followed: whether an event is recorded after each of its replays, as after those of a plan.
    """

    def __init__(self, graph: Any) -> None:
        """``graph`` may still be capturing."""
        known, libc = runtime(), _libc()
        self.blocks: list[int] = []
        self.arrays: list[object] = []
        self.followed = False
        self._semaphore: int = libc.calloc(1, SEMAPHORE_NBYTES)
        libc.sem_init(self._semaphore, 0, 0)
        post = known.cudaHostFn_t(ctypes.cast(libc.sem_post, ctypes.c_void_p).value)
        no_wait = known.cudaUserObjectFlags.cudaUserObjectNoDestructorSync
        counted = call("cudaUserObjectCreate", self._semaphore, post, 1, no_wait)
        call("cudaGraphRetainUserObject", graph, counted, 1, known.cudaUserObjectRetainFlags.cudaGraphUserObjectMove)

    @property
    def over(self) -> bool:
        """Whether they are all destroyed."""
        if self._semaphore and _libc().sem_trywait(self._semaphore) == 0:
            semaphore, self._semaphore = self._semaphore, 0
            _libc().free(semaphore)
        return not self._semaphore


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    libc.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    libc.sem_trywait.argtypes = libc.free.argtypes = [ctypes.c_void_p]
    return libc
