"""Tries whether kernels can be compiled for a CPU and run on it: the child process of
:func:`qmm.kernels.runtime.compiler.check_cpu`."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.cpu.products import matmul
from qmm.kernels.runtime.compiler import trust_cpu

__all__ = ["try_cpu"]


def try_cpu() -> int:
    """The child; returns its exit status. It runs most of the instructions that kernels use."""
    trust_cpu()

    def product_of_ones(name: str, row: bytes, activations: str) -> Any:
        data, x, y = np.frombuffer(row, np.uint8), np.ones((1, 32), np.float32), np.empty((1, 1), np.float32)
        matmul(FORMATS[name], data.ctypes.data, 1, 32, x, y, activations)
        return y[0, 0]

    one = np.float16(1).tobytes()
    q5_0 = one + bytes([0xFF] * 4 + [0x11] * 16)  # d, high bits, low bits; a weight is d * (bits - 16)
    found = [product_of_ones("Q5_0", q5_0, "int8"), product_of_ones("F16", one * 32, "f16")]
    if not np.allclose(found, 32):
        sys.exit(f"products that should be 32 are {found}")
    return 0
