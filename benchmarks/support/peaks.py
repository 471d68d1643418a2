"""The rate at which a GPU can read at all, measured in the run that uses it: what products are put in proportion to.

The kernel is :func:`qmm.kernels.ops.read.checksum`, which only reads. Its grid and its number of loads under way are
tried out first, and the fastest pair is measured. It reads device memory over a buffer of at least 1 GiB, more than
four times what L2 holds, full of random bytes; and mapped memory where the file's pages lie. The copy engine reads the
same pages for comparison.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.support.rounds import Quantiles, Side, take_turns
from qmm.cuda import attribute, current_device

if TYPE_CHECKING:
    from qmm.device import GPU

__all__ = ["Reading", "best_reading", "device_reading", "filled", "l2_nbytes", "rotated_nbytes"]

BLOCKS_PER_MULTIPROCESSOR = (1, 2, 4, 8)
IN_FLIGHT = (2, 4, 8)
GIB = 1 << 30
PATTERN_NBYTES = 1 << 24


@dataclass(frozen=True)
class Reading:
    """A way to read some memory, and how fast it was."""

    source: int
    nbytes: int
    blocks: int
    in_flight: int
    seconds: Quantiles

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds.median / 1e9

    def about(self) -> dict[str, Any]:
        """For the head of a results file."""
        return {
            "GB/s": self.gb_per_s,
            "GB/s p10": self.nbytes / self.seconds.p90 / 1e9,
            "GB/s p90": self.nbytes / self.seconds.p10 / 1e9,
            "bytes": self.nbytes,
            "blocks": self.blocks,
            "loads in flight": self.in_flight,
        }


def l2_nbytes(gpu: GPU) -> int:
    return attribute("L2CacheSize", gpu.device)


def rotated_nbytes(gpu: GPU) -> int:
    """How many bytes of weights a rotation must have at least, for none to be found in L2 when its turn comes."""
    return max(1 << 28, 4 * l2_nbytes(gpu))


def side(gpu: GPU, source: int, nbytes: int, target: int, blocks: int, in_flight: int, name: str = "read") -> Side:
    """A reading as a competitor of products."""
    from qmm.kernels.runtime import launch

    kernel = launch.checksum_kernel(in_flight)

    def queue() -> None:
        with current_device(gpu.device):
            kernel.launch(gpu.device, blocks, gpu.stream, source, nbytes, target)

    return Side(name, queue, lambda: gpu.synchronize(gpu.stream))


@contextlib.contextmanager
def target(gpu: GPU) -> Iterator[int]:
    """Memory for what the kernel stores."""
    from qmm.kernels.ops.matvec.plan import WARPS

    threads = max(BLOCKS_PER_MULTIPROCESSOR) * gpu.multiprocessors * 32 * WARPS
    address = gpu.allocate(4 * threads, "checksums")
    try:
        yield address
    finally:
        gpu.free(address)


def best_reading(gpu: GPU, source: int, nbytes: int, rounds: int = 15) -> Reading:
    """The fastest way to read ``nbytes`` at ``source``, among those tried."""
    with target(gpu) as stored:
        tried = []
        for blocks in (gpu.multiprocessors * count for count in BLOCKS_PER_MULTIPROCESSOR):
            for in_flight in IN_FLIGHT:
                quantiles = take_turns(None, [side(gpu, source, nbytes, stored, blocks, in_flight)], 3)["read"]
                tried.append((quantiles.median, blocks, in_flight))
        _, blocks, in_flight = min(tried)
        quantiles = take_turns(None, [side(gpu, source, nbytes, stored, blocks, in_flight)], rounds)["read"]
    return Reading(source, nbytes, blocks, in_flight, quantiles)


def filled(gpu: GPU, address: int, nbytes: int, pattern: int, pattern_nbytes: int) -> None:
    """Repeats ``pattern`` from one address of the device to another, until ``nbytes`` are full; queued, not awaited."""
    for start in range(0, nbytes, pattern_nbytes):
        gpu.copy(address + start, pattern, min(pattern_nbytes, nbytes - start), gpu.stream)


def device_reading(gpu: GPU) -> Reading:
    """The read peak of device memory."""
    nbytes = max(GIB, 4 * l2_nbytes(gpu))
    random = np.random.default_rng(0).integers(0, 256, PATTERN_NBYTES, np.uint8)
    source = gpu.allocate(nbytes, "the read peak")
    try:
        gpu.copy(source, random.ctypes.data, random.nbytes, gpu.stream)
        filled(gpu, source + random.nbytes, nbytes - random.nbytes, source, random.nbytes)
        gpu.synchronize(gpu.stream)
        return best_reading(gpu, source, nbytes)
    finally:
        gpu.free(source)
