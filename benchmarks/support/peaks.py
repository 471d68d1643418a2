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

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["Reading", "best_reading", "device_reading", "filled", "l2_nbytes", "rotated_nbytes"]

CTAS_PER_SM = (1, 2, 4, 8)
IN_FLIGHT = (2, 4, 8)
GIB = 1 << 30
PATTERN_NBYTES = 1 << 24


@dataclass(frozen=True)
class Reading:
    """A way to read some memory, and how fast it was."""

    source: int
    nbytes: int
    ctas: int
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
            "ctas": self.ctas,
            "loads in flight": self.in_flight,
        }


def l2_nbytes(gpu: Device) -> int:
    return gpu.architecture.l2_nbytes


def rotated_nbytes(gpu: Device) -> int:
    """How many bytes of weights a rotation must have at least, for none to be found in L2 when its turn comes."""
    return max(1 << 28, 4 * l2_nbytes(gpu))


def side(gpu: Device, source: int, nbytes: int, target: int, ctas: int, in_flight: int, name: str = "read") -> Side:
    """A reading as a competitor of products."""
    from qmm.kernels.ops import read

    prepared = gpu.prepare(read.plan_checksum(nbytes, ctas, in_flight), "a reading")

    def queue() -> None:
        gpu.queue(prepared, source, 0, target, gpu.stream)

    return Side(name, queue, lambda: gpu.synchronize(gpu.stream))


@contextlib.contextmanager
def target(gpu: Device) -> Iterator[int]:
    """Memory for what the kernel stores."""
    from qmm.kernels.ops.layout import WARPS

    threads = max(CTAS_PER_SM) * gpu.architecture.sms * 32 * WARPS
    address = gpu.allocate(4 * threads, "checksums")
    try:
        yield address
    finally:
        gpu.free(address)


def best_reading(gpu: Device, source: int, nbytes: int, rounds: int = 15) -> Reading:
    """The fastest way to read ``nbytes`` at ``source``, among those tried."""
    with target(gpu) as stored:
        tried = []
        for ctas in (gpu.architecture.sms * count for count in CTAS_PER_SM):
            for in_flight in IN_FLIGHT:
                quantiles = take_turns(None, [side(gpu, source, nbytes, stored, ctas, in_flight)], 3)["read"]
                tried.append((quantiles.median, ctas, in_flight))
        _, ctas, in_flight = min(tried)
        quantiles = take_turns(None, [side(gpu, source, nbytes, stored, ctas, in_flight)], rounds)["read"]
    return Reading(source, nbytes, ctas, in_flight, quantiles)


def filled(gpu: Device, address: int, nbytes: int, pattern: int, pattern_nbytes: int) -> None:
    """Repeats ``pattern`` from one address of the device to another, until ``nbytes`` are full; queued, not awaited."""
    for start in range(0, nbytes, pattern_nbytes):
        gpu.copy(address + start, pattern, min(pattern_nbytes, nbytes - start), gpu.stream)


def device_reading(gpu: Device) -> Reading:
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
