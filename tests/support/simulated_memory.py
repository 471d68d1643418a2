# ruff: noqa: N802  # functions are named as CUDA names them
"""The memory of a simulated CUDA (:mod:`simulated_cuda`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import fake_driver
from cuda.bindings import runtime
from simulated_objects import Item, Stream

__all__ = ["MEMORY", "Memory"]

MEMORY = 1 << 60
"""Addresses of the device's memory begin here, above all of the host's, and none is used again."""


class Memory(fake_driver.Driver):
    """The part of :class:`simulated_cuda.Cuda` that allocates, frees and copies.

    Attributes:
        sizes: of the blocks in use, by address.
        locked: those of the host's memory.
        fresh: those whose stream was not waited for since.
        contents: what was copied there, by address.
        limit: bytes of the device.
        elsewhere: bytes that other libraries use.
        copies: arguments of those that were made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.locked: dict[int, Any] = {}
        self.fresh: set[int] = set()
        self.contents: dict[int, bytes] = {}
        self.limit, self.elsewhere = 1 << 40, 0
        self.copies: list[tuple[int, int, int]] = []
        self._next_address = MEMORY

    @property
    def nbytes(self) -> int:
        """In use."""
        return sum(self.sizes.values())

    def block(self, address: int) -> int | None:
        """The block that an address lies in; None for memory that is not the device's."""
        if address < MEMORY:
            return None
        assert address not in self.fresh, f"{address:#x} is allocated in the order of another stream only"
        inside = [block for block, nbytes in self.sizes.items() if block <= address < block + nbytes]
        assert inside, f"{address:#x} was freed"
        return inside[0]

    def freed_under_graphs(self) -> bool:
        """Whether a graph that still exists uses memory that was freed."""
        return any(graph.holders and graph.blocks - self.sizes.keys() for graph in self.graphs + self.captures)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, handle: int) -> tuple[int]:
        assert self.block(address) is not None
        self._at(handle, idle=True)
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, handle: int) -> tuple[int]:
        stream = self._at(handle, idle=True)
        self.copies.append((target, source, nbytes))
        locked = any(block <= source < block + self.sizes[block] for block in self.locked)
        if target < MEMORY:
            return self._later(stream, lambda: ctypes.memmove(target, self.contents.get(source, bytes(nbytes)), nbytes))
        if locked:
            return self._later(stream, lambda: self.contents.update({target: ctypes.string_at(source, nbytes)}))
        read = ctypes.string_at(source, nbytes)  # pageable memory is read before this returns
        if stream.pending:
            return self._later(stream, lambda: self.contents.update({target: read}))
        self.contents[target] = read
        return (0,)

    @staticmethod
    def _later(stream: Stream, work: Callable[[], object]) -> tuple[int]:
        item = Item()
        item.then.append(lambda: work() and None)
        stream.items.append(item)
        return (0,)

    def cudaMemPoolCreate(self, properties: Any) -> tuple[int, str]:
        host = runtime.cudaMemLocationType.cudaMemLocationTypeHost
        return (0, "locked" if properties.location.type == host else "pool")

    def cudaMemPoolSetAttribute(self, pool: str, attribute: Any, value: Any) -> tuple[int]:
        return (0,)

    def cudaMemPoolSetAccess(self, pool: str, access: list[Any], count: int) -> tuple[int]:
        assert len(access) == count
        return (0,)

    def cudaMemPoolTrimTo(self, pool: str, nbytes: int) -> tuple[int]:
        return (0,)

    def cudaMemPoolDestroy(self, pool: str) -> tuple[int]:
        return (0,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return (0, self.limit - self.elsewhere - self.nbytes, self.limit)

    def cudaMalloc(self, nbytes: int) -> tuple[Any, int]:
        return self.cudaMallocFromPoolAsync(nbytes, "of cudaMalloc", 0)

    def cudaFree(self, address: int) -> tuple[int]:
        return self._free(address)

    def cudaMallocFromPoolAsync(self, nbytes: int, pool: str, handle: int) -> tuple[Any, int]:
        self._at(handle, idle=True)
        assert pool is not None
        if pool == "locked":
            return self.cudaMallocHost(nbytes)
        if self.nbytes + self.elsewhere + nbytes > self.limit:
            return (runtime.cudaError_t.cudaErrorMemoryAllocation, 0)
        address = self._next_address
        self._next_address += nbytes + 511 & ~511
        self.sizes[address] = nbytes
        self.fresh.add(address)
        return (0, address)

    def cudaMallocHost(self, nbytes: int) -> tuple[Any, int]:
        made = ctypes.create_string_buffer(nbytes)
        address = ctypes.addressof(made)
        self.locked[address], self.sizes[address] = made, nbytes
        return (0, address)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        return self._free(address)

    def cudaFreeAsync(self, address: int, handle: int) -> tuple[int]:
        self._at(handle, idle=True)
        return self._free(address)

    def _free(self, address: int) -> tuple[int]:
        assert address in self.sizes, "freed twice"
        used = [item for stream in self.all_streams for item in stream.pending if address in item.blocks]
        assert not used, "memory was freed while queued work uses it"
        del self.sizes[address]
        self.locked.pop(address, None)
        return (0,)
