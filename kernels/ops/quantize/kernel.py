"""The quantization of activations on the GPU, and the conversion of results.

``x`` is cut into blocks of 32 values along k, each with one float32 scale, as in ggml's Q8_1. One warp quantizes one
block, a lane a value. Two kinds:

``int8``
    ``d = max|x| * (1 / 127)`` and ``q = round(x * (1 / d))``, plus ``sum(q)`` for each run of 16 or for the block,
    which a format with minima needs; times ``d`` it could overflow. The error of a value is at most ``d / 2``, so that
    of a block is at most ``32 / (4 * 127**2) = 4.96e-4`` of its energy.
``f16``
    ``d`` is the largest power of two up to ``max|x|`` and ``q = float16(x / d)``: the rounding of float16 (2**-11),
    without its range, so that neither a bfloat16 activation of 1e6 nor one of 1e-9 is lost.

    It is 2**-112 at least: float16's own subnormal numbers then end where those of TF32 do, with which tensor cores
    multiply. So subnormal activations are rounded to multiples of 2**-136.

The bound of ``int8`` holds from the largest float32 to the smallest subnormal. Where ``1 / d`` would overflow, ``d`` is
a subnormal number, rounded up so that no ``q`` passes 127, and ``x`` and ``d`` are lifted by 2**24 before they are
divided.

A block with a NaN gets the scale NaN, a block with an infinity the scale infinity, and so do the products. Rows are
padded with zeros to whole blocks in the workspace; no byte outside ``x`` is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.ptx.arithmetic import (
    power_of_two_below,
    reciprocal,
    scaled_byte,
)
from qmm.kernels.lang.ptx.global_memory import (
    load_global_bfloat,
    load_global_float,
    load_global_half,
    store_global_bfloat,
    store_global_byte,
    store_global_float,
    store_global_half,
)
from qmm.kernels.lang.ptx.grid import (
    cta_count,
    cta_index,
    lane_index,
    launch_dependents,
    thread_index,
    wait_for_predecessors,
)
from qmm.kernels.lang.ptx.warp import (
    max_magnitude_of_warp,
    sum_of_half_warp,
    sum_of_warp,
)

__all__ = ["QuantizeConstants", "cast", "f16_scale", "int8_scale", "place_of", "quantize"]


@dataclass(frozen=True)
class QuantizeConstants(Constants):
    """The compile-time constants of these kernels."""

    DTYPE: str
    """Of the array that is read or written: "float32", "float16" or "bfloat16"."""
    INT8: bool
    """Whether activations become int8, else float16."""
    PROGRAMMATIC: bool
    """Whether the kernel starts before its predecessor ends."""
    WARPS: int
    """Warps of a CTA."""


c = QuantizeConstants.placeholder()

INFINITY = float("inf")
SMALLEST_INT8 = 2.0**-119  # from here on d = SMALLEST / 127 is a normal number, and so is 1 / d
OF_127 = 1.0 / 127.0
LIFT = 2.0**24
UNIT = 2.0**-149  # the smallest number
SMALLEST_F16 = 2.0**-112


def quantize(
    x, row_stride, column_stride, k, blocks, spread, n, padded, first, columns, sum_count, area, area_nbytes
):  # fmt: skip
    """Quantizes ``n`` rows, which become the columns from ``first`` on of the products; zeros fill up to ``padded``.

    Rows are of DTYPE; strides are in bytes. Each ``columns`` columns have an area, with ``sum_count`` sums for each of
    ``blocks`` scale blocks, ``spread`` of them to a weight block, laid out as
    :class:`qmm.kernels.ops.layout.Activations` says.
    """
    if c.PROGRAMMATIC:
        launch_dependents()
        wait_for_predecessors()
    lane = lane_index()
    item = cta_index() * c.WARPS + (thread_index() >> 5)
    step = cta_count() * c.WARPS
    while item < padded * blocks:
        row = item // blocks
        source = item - row * blocks
        group = (first + row) // columns
        column = first + row - group * columns
        block = place_of(source, spread)
        half = lane >> 4
        values = area + group * area_nbytes
        scales = values + blocks * columns * (32 if c.INT8 else 64)
        sums = scales + blocks * columns * 4
        value = 0.0
        if mask("columns of x", row < n) and mask("tail of x", source * 32 + lane < k):
            place = x + row * row_stride + (source * 32 + lane) * column_stride
            if c.DTYPE == "float32":
                value = load_global_float(place)
            elif c.DTYPE == "float16":
                value = load_global_half(place)
            else:
                value = load_global_bfloat(place)
        largest = max_magnitude_of_warp(value)
        at = ((block * 2 + half) * columns + column) * 16 + (lane & 15)
        if c.INT8:
            scale, inverse, lift = int8_scale(largest)
            rounded = scaled_byte(value * lift, inverse)
            store_global_byte(values + at, rounded)
            if sum_count == 1:
                total = sum_of_warp(rounded)
                if lane == 0:
                    store_global_float(sums + (block * columns + column) * 4, np.float32(total))
            elif sum_count == 2:
                total = sum_of_half_warp(rounded)
                if lane & 15 == 0:
                    store_global_float(sums + ((half * blocks + block) * columns + column) * 4, np.float32(total))
        else:
            scale, inverse = f16_scale(largest)
            store_global_half(values + at * 2, value * inverse)
        if lane == 0:
            store_global_float(scales + (block * columns + column) * 4, scale)
        item += step


def place_of(block, spread):
    """The position of a scale block: see :class:`qmm.kernels.ops.layout.Activations`."""
    weight_block = block // spread
    return ((weight_block >> 2) * spread + block - weight_block * spread) * 4 + (weight_block & 3)


def int8_scale(largest):
    """The scale of a block, and the two factors that its values are multiplied by."""
    scale = largest * OF_127
    if largest < SMALLEST_INT8:
        scale += UNIT
        return scale, reciprocal(scale * LIFT), LIFT
    if largest < INFINITY:
        return scale, reciprocal(scale), 1.0
    return scale, 0.0, 1.0


def f16_scale(largest):
    """The scale of a block for float16, and the factor."""
    if largest < SMALLEST_F16:
        return SMALLEST_F16, reciprocal(SMALLEST_F16)
    if largest < INFINITY:
        scale = power_of_two_below(largest)
        return scale, reciprocal(scale)
    return largest, 0.0


def cast(source, pitch, n, m, target, row_stride, column_stride):
    """Copies ``(n, m)`` float32, row-major with one number every ``pitch`` bytes (0: the same number everywhere), to
    DTYPE; strides in bytes."""
    item = cta_index() * (c.WARPS * 32) + thread_index()
    step = cta_count() * (c.WARPS * 32)
    while item < n * m:
        row = item // m
        column = item - row * m
        at = target + row * row_stride + column * column_stride
        value = load_global_float(source + item * pitch)
        if c.DTYPE == "float32":
            store_global_float(at, value)
        elif c.DTYPE == "float16":
            store_global_half(at, value)
        else:
            store_global_bfloat(at, value)
        item += step
