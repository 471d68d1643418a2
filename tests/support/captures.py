"""Captures of CUDA graphs by PyTorch and by CUDA's own functions, as users make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from busy import checked, synchronize
from cuda.bindings import runtime

import qmm

__all__ = ["MODES", "Captured", "activations", "captured_by_torch", "product", "replayed"]

MODES = ("global", "thread_local", "relaxed")
"""What CUDA refuses during a capture: what is unsafe in any thread, in the capturing one, or nothing."""


def activations(torch: Any, rng: np.random.Generator, n: int = 256, dtype: Any = None) -> Any:
    """Of the model's "w": many rows of 16 bits need workspace; one of 32 bits does not."""
    values = torch.from_numpy(rng.standard_normal((n, 4096), np.float32)).cuda()
    return values.to(torch.float16 if dtype is None else dtype)


def product(engine: qmm.Engine, x: Any) -> Any:
    """What the product of "w" with PyTorch's activations is when nothing else runs."""
    synchronize()
    y = engine.matmul("w", x).clone()
    synchronize()
    return y


class Captured:
    """A graph that PyTorch captured around some work: ``before = u * 2``, the work, ``after = before + 1``.

    Attributes:
        graph: PyTorch's.
        value: what the work returned; None if it was refused.
        refusal: the QmmError that it raised instead.
    """

    def __init__(self, torch: Any, work: Callable[[], Any], mode: str = "global", stream: Any = None) -> None:
        self.torch = torch
        self.value: Any = None
        self.refusal: qmm.QmmError | None = None
        ones = torch.ones(1024, device="cuda")
        (ones * 2 + 1).eq(3).all().item()  # loads the kernels
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode=mode):
            before = ones * 2
            try:
                self.value = work()
            except qmm.QmmError as error:
                self.refusal = error
            self.after = before + 1
        self.kept = ones

    def check(self) -> None:
        """Replay it: what was captured around the work must be whole, and PyTorch must go on."""
        self.after.zero_()
        synchronize()
        self.graph.replay()
        synchronize()
        assert (self.after == 3).all().item()


def captured_by_torch(torch: Any, work: Callable[[], Any], mode: str = "global", stream: Any = None) -> Any:
    """The graph, and what the work returned, which must not be refused."""
    captured = Captured(torch, work, mode, stream)
    if captured.refusal is not None:
        raise captured.refusal
    captured.check()
    return captured.graph, captured.value


@contextmanager
def replayed(stream: int, work: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Capture what ``work()`` queues on a stream by CUDA's own functions; a function that replays it there."""
    synchronize()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
    checked(runtime.cudaStreamBeginCapture(stream, mode))
    try:
        work()
    finally:
        graph = checked(runtime.cudaStreamEndCapture(stream))
    executable = checked(runtime.cudaGraphInstantiate(graph, 0))
    checked(runtime.cudaGraphDestroy(graph))  # the executable needs it no more
    try:
        yield lambda: checked(runtime.cudaGraphLaunch(executable, stream))
    finally:
        checked(runtime.cudaStreamSynchronize(stream))
        checked(runtime.cudaGraphExecDestroy(executable))
