"""Activations on the GPU, in the form that the products read them.

``x`` is cut into blocks of 32 values along k, each with one float32 scale, as in ggml's Q8_1. One warp makes one block,
a lane a value. Two kinds:

``int8``
    ``d = max|x| / 127`` and ``q = round(x / d)``, plus ``d * sum(q)`` for each run of 16, which a format with minima
    needs. The error of a value is at most ``d / 2``, so that of a block is at most ``32 / (4 * 127**2) = 4.96e-4`` of
    its energy.
``f16``
    ``d`` is the largest power of two up to ``max|x|`` and ``q = float16(x / d)``: the rounding of float16 (2**-11),
    without its range, so that neither a bfloat16 activation of 1e6 nor one of 1e-9 is lost.

A block with a NaN gets the scale NaN, one with an infinity the scale infinity: the product then says so. Rows are
padded with zeros to whole blocks, in scratch memory of qmm's own; ``x`` itself is read exactly where it has values.
"""

from __future__ import annotations

import numpy as np

from qmm.kernels.ptx import (
    block_count,
    block_index,
    divide,
    lane_index,
    largest_of_warp,
    load_float,
    power_of_two_below,
    round_to_int,
    store_byte,
    store_float,
    store_half,
    sum_of_half_warp,
    thread_index,
)

__all__ = ["cast", "quantize"]

INFINITY = float("inf")
SMALLEST_INT8 = 2.0**-119  # the reciprocal of d = SMALLEST / 127 is the largest that float32 holds
SMALLEST_F16 = 2.0**-126


def quantize(x, row_stride, column_stride, k, blocks, n, q, scales, sums):
    """``load_value`` reads a float32, float16 or bfloat16; strides are in bytes; ``q`` has ``32 * blocks`` a row."""
    lane = lane_index()
    item = block_index() * WARPS + (thread_index() >> 5)
    step = block_count() * WARPS
    while item < n * blocks:
        row = item // blocks
        block = item - row * blocks
        column = block * 32 + lane
        value = 0.0
        if column < k:
            value = load_value(x + row * row_stride + column * column_stride)
        largest = largest_of_warp(value)
        scale = largest
        inverse = 0.0
        if INT8:
            scale = divide(largest, 127.0)
            if largest < SMALLEST_INT8:
                scale = 0.0
            elif largest < INFINITY:
                inverse = divide(1.0, scale)
            rounded = round_to_int(value * inverse)
            store_byte(q + item * 32 + lane, rounded)
            total = sum_of_half_warp(rounded)
            if lane & 15 == 0:
                store_float(sums + (item * 2 + (lane >> 4)) * 4, scale * np.float32(total))
        else:
            if largest < SMALLEST_F16:
                scale = 0.0
            elif largest < INFINITY:
                scale = power_of_two_below(largest)
                inverse = divide(1.0, scale)
            store_half(q + (item * 32 + lane) * 2, value * inverse)
        if lane == 0:
            store_float(scales + item * 4, scale)
        item += step


def cast(source, n, m, target, row_stride, column_stride):
    """Copies ``(n, m)`` float32, row-major, to where ``store_value`` puts a value of another dtype; strides in
    bytes."""
    item = block_index() * (WARPS * 32) + thread_index()
    step = block_count() * (WARPS * 32)
    while item < n * m:
        row = item // m
        column = item - row * m
        store_value(target + row * row_stride + column * column_stride, load_float(source + item * 4))
        item += step
