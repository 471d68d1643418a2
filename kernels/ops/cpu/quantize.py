"""The quantization of activations on the CPU.

``int8``
    For each 32 values one scale ``d = max|x| / 127`` and ``q = round(x / d)``, as in ggml's Q8_1, and for each run of
    16 ``d`` times the sum of its ``q``. Where ``1 / d`` would overflow, ``d`` is a subnormal number, rounded up so that
    no ``q`` passes 127, and ``x`` and ``d`` are lifted by 2**24 before they are divided.
``f16``
    float32, unquantized (float16 on the GPU).

Either way a row whose largest magnitude is below 2**-96, or 2**96 and more, is stored in units of a power of two: else
sums would overflow, or scales and products lose digits. So in a row with a value of 2**96 or more, a block whose
largest magnitude is below 2**-112 loses digits. A block with a NaN gets the scale NaN, a block with an infinity the
scale infinity, and so do the products.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.primitives import scale_floats
from qmm.kernels.lang.simd import (
    float_of_bits,
    load_floats,
    max_magnitude,
    store_float,
    store_floats,
    store_rounded,
    zero_floats,
)
from qmm.kernels.ops.cpu.scale_block import (
    Q_OFFSET,
    RUN_Q_NBYTES,
    SCALE_BLOCK,
    SCALE_BLOCK_NBYTES,
    SUMS_OFFSET,
    ScaleBlock,
)
from qmm.kernels.runtime.cpu import CPUKernel

__all__ = ["CPUActivations", "address_of", "quantize"]

SMALL, LARGE, INFINITE = (127 - 96) << 23, (127 + 96) << 23, 0x7F800000
"""Bits of float32: 2**-96, 2**96 and infinity. Rows whose largest magnitude is below the first, or from the second on
and finite, have a unit other than 1."""


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def quantize_rows(x, x_pitch, runs, n, values, pitch, units):
    """int8 activations of ``n`` rows of ``runs`` runs of float32."""
    for row in range(n):
        source = x + row * x_pitch
        target = values + row * pitch
        factor = factor_of(source, runs)
        store_float(units, row * 4, 1.0 / factor)
        for block in range(runs >> 1):
            quantize_block(source + block * 128, target + block * SCALE_BLOCK_NBYTES, factor)


def quantize_block(x, target, factor):
    """One scale block, as the module's docstring says."""
    first, second = load_floats(x, 0), load_floats(x, 64)
    largest = max_magnitude(max_magnitude(0, first), second)
    d = float_of_bits(largest) * factor / 127.0
    lift, inverse = factor, 0.0
    if d < 2.0**-126:
        d += 2.0**-149
        lift = factor * 2.0**24
        inverse = 1.0 / (d * 2.0**24)
    elif largest < INFINITE:
        inverse = 1.0 / d
    if inverse > 0.0:
        first = scale_floats(scale_floats(first, lift), inverse)
        second = scale_floats(scale_floats(second, lift), inverse)
    else:
        first, second = zero_floats(), zero_floats()
    store_float(target, 0, d)
    store_float(target, SUMS_OFFSET, d * store_rounded(target, Q_OFFSET, first))
    store_float(target, SUMS_OFFSET + 4, d * store_rounded(target, Q_OFFSET + RUN_Q_NBYTES, second))


def scale_rows(values, pitch, runs, n, units):
    """Scales ``n`` rows of ``runs`` runs of float32 to their units, in place."""
    for row in range(n):
        at = values + row * pitch
        factor = factor_of(at, runs)
        store_float(units, row * 4, 1.0 / factor)
        if factor != 1.0:
            for run in range(runs):
                store_floats(at, run * 64, scale_floats(load_floats(at, run * 64), factor))


def factor_of(x, runs):
    """The power of two that a row is multiplied by."""
    most = 0
    for run in range(runs):
        most = max_magnitude(most, load_floats(x, run * 64))
    if most < SMALL:
        return 2.0**32
    if most >= LARGE and most < INFINITE:
        return 2.0**-32
    return 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Calling
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)  # created for every product: frozen, it would take 2 us
class CPUActivations:
    """Activations that any number of products may share, in their own memory.

    Attributes:
        int8: whether they are quantized.
        n: rows.
        k: values of a row.
        address: of the first row's.
        pitch: bytes from row to row.
        units_address: of their units.
    """

    int8: bool
    n: int
    k: int
    address: int
    pitch: int
    units_address: int
    _memory: np.ndarray[Any, Any]

    @classmethod
    def empty(cls, int8: bool, n: int, k: int) -> CPUActivations:
        """Memory for the activations of ``n`` rows of ``k`` values."""
        pitch = k // SCALE_BLOCK * SCALE_BLOCK_NBYTES if int8 else -(-k // 16) * 64
        memory = np.empty(n * (pitch + 4), np.uint8)
        address = address_of(memory)
        return cls(int8, n, k, address, pitch, address + n * pitch, memory)

    @property
    def values(self) -> np.ndarray[Any, Any]:
        """``(n, k / 32)`` scale blocks (:mod:`qmm.kernels.ops.cpu.scale_block`), or float32 of ``k`` values and zeros
        up to a multiple of 16."""
        return self._memory[: self.n * self.pitch].view(ScaleBlock if self.int8 else np.float32).reshape(self.n, -1)

    @property
    def units(self) -> np.ndarray[Any, Any]:
        """``(n,)`` float32, powers of two: the products of a row are multiplied by its unit."""
        return self._memory[self.n * self.pitch :].view(np.float32)


def quantize(x: np.ndarray[Any, Any], int8: bool) -> CPUActivations:
    """Activations for products.

    Args:
        x: ``(n, k)`` float32, float16 or bfloat16 (ml_dtypes' or, as uint16, its bits), in host memory, of any strides.
            It is only read.
        int8: whether to quantize them; ``k`` is a multiple of 32 then.

    Raises:
        TypeError: ``x`` is of another dtype.
    """
    n, k = x.shape
    activations = CPUActivations.empty(int8, n, k)
    runs = -(-k // 16)
    if not int8:
        _widen(x, activations.values)
        _scale_kernel()(
            values=activations.address, pitch=activations.pitch, runs=runs, n=n, units=activations.units_address
        )
        return activations
    if x.dtype != np.float32 or x.strides[1] != 4:
        wide = np.empty((n, k), np.float32)
        _widen(x, wide)
        x = wide
    _quantize_kernel()(
        x=address_of(x),
        x_pitch=x.strides[0],
        runs=runs,
        n=n,
        values=activations.address,
        pitch=activations.pitch,
        units=activations.units_address,
    )
    return activations


def _widen(x: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
    """Store the values of ``x`` as float32, with zeros after each row."""
    k = x.shape[1]
    target[:, k:] = 0
    if x.dtype == np.uint16 or x.dtype.name == "bfloat16":
        words = target.view(np.uint32)[:, :k]
        words[...] = x.view(np.uint16)
        words <<= 16
    elif x.dtype in (np.float32, np.float16):
        target[:, :k] = x
    else:
        raise TypeError(f"activations are float32, float16 or bfloat16, not {x.dtype}")


@functools.cache
def _quantize_kernel() -> CPUKernel:
    return CPUKernel.of("quantize_int8", quantize_rows, Constants())


@functools.cache
def _scale_kernel() -> CPUKernel:
    return CPUKernel.of("scale_rows", scale_rows, Constants())


def address_of(array: np.ndarray[Any, Any]) -> int:
    """The address of an array's first element. ``array.ctypes`` would import a module, which a finalizer at exit
    cannot."""
    address: int = array.__array_interface__["data"][0]
    return address
