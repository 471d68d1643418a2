"""A device on a simulated CUDA, and work for it whose kernels note which workspace they were given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from simulated_cuda import Cuda

from qmm.arrays import ArrayKind
from qmm.device import Device, Prepared
from qmm.kernels.ops.op import At, LaunchSpec, Work

__all__ = ["Library", "Simulated", "opened"]


def uses(workspace, x, y):
    """A kernel, which is not compiled."""


class Library(ArrayKind):
    """A library whose current stream is ``now``, which ``keeps`` keeps from being destroyed."""

    name = "made up"

    def __init__(self, now: Any, keeps: object) -> None:
        self.now, self.keeps, self.asked = now, keeps, 0

    def current(self, device: int) -> Any:
        return self.now

    def keeper(self, stream: Any) -> object:
        self.asked += 1
        return self.keeps


class Simulated:
    """A device of a simulated CUDA."""

    def __init__(self, cuda: Cuda, device: Device) -> None:
        self.cuda, self.device = cuda, device
        self.kernel = cuda.kernel(uses)

    def prepared(self, nbytes: int, launches: int = 1) -> Prepared:
        """Work that needs so much workspace, in launches that may start early."""
        arguments = {"workspace": At("workspace") if nbytes else 0, "x": At("x"), "y": At("y")}
        return self.device.prepare(
            Work((LaunchSpec.of(self.kernel, 1, early=True, **arguments),) * launches, nbytes), "test"
        )

    def use(self, stream: Any, nbytes: int = 1 << 20, owner: object = None) -> int:
        """Queue work on a stream; the address of its workspace."""
        self.device.queue(self.prepared(nbytes), 16, 32, 64, int(stream), 0, owner)
        return self.cuda.launches[-1].arguments[0]

    @property
    def early(self) -> bool:
        """Whether the last launch may start early."""
        return self.cuda.launches[-1].early


@contextmanager
def opened(cuda: Cuda) -> Iterator[Simulated]:
    """One whose device is closed in the end, when all waits must have been taken."""
    made = Simulated(cuda, Device(0))
    cuda.take_waits()
    yield made
    assert cuda.take_waits() == []
    assert not cuda.freed_under_graphs()
    cuda.finish()
    made.device.close()
    assert cuda.take_waits() == []
