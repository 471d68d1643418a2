"""Functions for the CPU as they are, called as kernels are."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from qmm.kernels.lang.targets.cpu import CPU
from qmm.kernels.runtime import build_cpu
from qmm.kernels.runtime.cpu import CPUKernel

__all__ = ["flat_kernel"]


def flat_kernel(function: Callable[..., None]) -> CPUKernel:
    """A specialized function as a kernel, compiled at its first call and not cached."""
    parameters = tuple(inspect.signature(function).parameters)
    return CPUKernel(function.__name__, parameters, lambda: build_cpu.compiled(function, CPU))
