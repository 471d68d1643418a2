"""Activations on the GPU, in the form that the products read them.

``x`` is cut into blocks of 32 values along k, each with one float32 scale, as in ggml's Q8_1. One warp makes one block,
a lane a value. Two kinds:

``int8``
    ``d = max|x| * (1 / 127)`` and ``q = round(x * (1 / d))``, plus ``sum(q)`` for each run of 16 or for the block,
    which a format with minima needs; times ``d`` it could overflow. The error of a value is at most ``d / 2``, so that
    of a block is at most ``32 / (4 * 127**2) = 4.96e-4`` of its energy.
``f16``
    ``d`` is the largest power of two up to ``max|x|`` and ``q = float16(x / d)``: the rounding of float16 (2**-11),
    without its range, so that neither a bfloat16 activation of 1e6 nor one of 1e-9 is lost.

    It is 2**-112 at least: float16's own subnormal numbers then end where those of TF32 do, with which tensor cores
    multiply. So subnormal activations are rounded to multiples of 2**-136.

The first holds from the largest float32 to the smallest subnormal. Where ``1 / d`` would overflow, ``d`` is a subnormal
number, rounded up so that no ``q`` passes 127, and ``x`` and ``d`` are lifted by 2**24 before they are divided.

A block with a NaN gets the scale NaN, one with an infinity the scale infinity: the product then says so. Rows are
padded with zeros to whole blocks, in scratch memory of qmm's own; ``x`` itself is read exactly where it has values.
"""

from __future__ import annotations

import numpy as np

from qmm.kernels.lang.ptx.arithmetic import (
    max_magnitude_of_four,
    pack_halves,
    power_of_two_below,
    reciprocal,
    scaled_byte,
    scaled_bytes,
)
from qmm.kernels.lang.ptx.barrier import named_barrier_arrive
from qmm.kernels.lang.ptx.global_memory import (
    load_global_bfloat,
    load_global_float,
    load_global_floats_l2,
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
from qmm.kernels.lang.ptx.shared_memory import store_shared_float, store_shared_word
from qmm.kernels.lang.ptx.warp import (
    max_magnitude_of_eight_lanes,
    max_magnitude_of_warp,
    sum_of_half_warp,
    sum_of_warp,
    sum_words_of_eight_lanes,
    sum_words_of_four_lanes,
)
from qmm.kernels.lang.specialize import registers, unroll

__all__ = ["cast", "quantize", "quantize_block"]

INFINITY = float("inf")
SMALLEST_INT8 = 2.0**-119  # from here on d = SMALLEST / 127 is a normal number, and so is 1 / d
OF_127 = 1.0 / 127.0
LIFT = 2.0**24
UNIT = 2.0**-149  # the smallest number
SMALLEST_F16 = 2.0**-112
LOADS = 1  # the barrier at which those who load activations meet the producers, who wait for that


def quantize(
    x, row_stride, column_stride, k, blocks, spread, n, padded, first, columns, sum_count, area, area_nbytes
):  # fmt: skip
    """Quantizes ``n`` rows, which become the columns from ``first`` on of the products; zeros fill up to ``padded``.

    They are numbers of DTYPE, float32, float16 or bfloat16; strides are in bytes. Each ``columns`` columns have an area
    of their own, with ``sum_count`` sums for each of ``blocks`` scale blocks, ``spread`` of them to a weight block,
    laid out as :class:`qmm.kernels.ops.matvec.plan.Activations` says.
    """
    if PROGRAMMATIC:
        launch_dependents()
        wait_for_predecessors()
    lane = lane_index()
    item = cta_index() * WARPS + (thread_index() >> 5)
    step = cta_count() * WARPS
    while item < padded * blocks:
        row = item // blocks
        source = item - row * blocks
        group = (first + row) // columns
        c = first + row - group * columns
        block = place_of(source, spread)
        half = lane >> 4
        values = area + group * area_nbytes
        scales = values + blocks * columns * (32 if INT8 else 64)
        sums = scales + blocks * columns * 4
        value = 0.0
        if row < n and source * 32 + lane < k:
            place = x + row * row_stride + (source * 32 + lane) * column_stride
            if DTYPE == "float32":
                value = load_global_float(place)
            elif DTYPE == "float16":
                value = load_global_half(place)
            else:
                value = load_global_bfloat(place)
        largest = max_magnitude_of_warp(value)
        at = ((block * 2 + half) * columns + c) * 16 + (lane & 15)
        if INT8:
            scale, inverse, lift = int8_scale(largest)
            rounded = scaled_byte(value * lift, inverse)
            store_global_byte(values + at, rounded)
            if sum_count == 1:
                total = sum_of_warp(rounded)
                if lane == 0:
                    store_global_float(sums + (block * columns + c) * 4, np.float32(total))
            elif sum_count == 2:
                total = sum_of_half_warp(rounded)
                if lane & 15 == 0:
                    store_global_float(sums + ((half * blocks + block) * columns + c) * 4, np.float32(total))
        else:
            scale, inverse = f16_scale(largest)
            store_global_half(values + at * 2, value * inverse)
        if lane == 0:
            store_global_float(scales + (block * columns + c) * 4, scale)
        item += step


def place_of(block, spread):
    """Where a scale block lies: see :class:`qmm.kernels.ops.matvec.plan.Activations`."""
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


def quantize_block(x, x_stride, n, k, blocks, values, thread):
    """Quantizes ``n`` rows of ``k`` float32 (a multiple of 4), each at a multiple of 16 bytes, to shared memory.

    Eight lanes make a scale block, each four neighbouring values of it. ROUNDS rounds of loads are made before the
    first is used.
    """
    scales = values + blocks * (2 * RUN_NBYTES)
    sums = scales + blocks * (4 * COLUMNS)
    at = thread * 4
    first = True
    while first or at - (thread & 31) * 4 < blocks * 32:  # whole warps, which exchange values
        loaded = registers(ROUNDS * COLUMNS, (0.0, 0.0, 0.0, 0.0))
        for i in unroll(ROUNDS):
            here = at + i * (4 * 32 * WARPS)
            for c in unroll(COLUMNS):
                if here < k and c < n:
                    loaded[i * COLUMNS + c] = load_global_floats_l2(x + c * x_stride + here * 4)
        if first:
            named_barrier_arrive(LOADS, 32 * (WARPS + PRODUCERS))
            first = False
        for i in unroll(ROUNDS):
            here = at + i * (4 * 32 * WARPS)
            if here - (thread & 31) * 4 < blocks * 32:
                block = place_of(here >> 5, SCALE_BLOCKS)
                half = (here >> 4) & 1
                for c in unroll(COLUMNS):
                    v0, v1, v2, v3 = loaded[i * COLUMNS + c]
                    largest = max_magnitude_of_eight_lanes(max_magnitude_of_four(v0, v1, v2, v3))
                    at_run = values + (block * 2 + half) * RUN_NBYTES + c * (RUN_NBYTES // COLUMNS)
                    if INT8:
                        scale, inverse, lift = int8_scale(largest)
                        packed = scaled_bytes(v0 * lift, v1 * lift, v2 * lift, v3 * lift, inverse)
                        if here < blocks * 32:
                            store_shared_word(at_run + (here & 15), packed)
                    else:
                        scale, inverse = f16_scale(largest)
                        if here < blocks * 32:
                            store_shared_word(at_run + (here & 15) * 2, pack_halves(v0 * inverse, v1 * inverse))
                            store_shared_word(at_run + (here & 15) * 2 + 4, pack_halves(v2 * inverse, v3 * inverse))
                    if here & 31 == 0 and here < blocks * 32:
                        store_shared_float(scales + (block * COLUMNS + c) * 4, scale)
                    if SUMS == 1:
                        total = sum_words_of_eight_lanes(packed)
                        if here & 31 == 0 and here < blocks * 32:
                            store_shared_float(sums + (block * COLUMNS + c) * 4, total)
                    if SUMS == 2:
                        total = sum_words_of_four_lanes(packed)
                        if here & 15 == 0 and here < blocks * 32:
                            store_shared_float(sums + ((half * blocks + block) * COLUMNS + c) * 4, total)
        at += ROUNDS * 4 * 32 * WARPS


def cast(source, pitch, n, m, target, row_stride, column_stride):
    """Copies ``(n, m)`` float32, row-major and ``pitch`` bytes apart (0: all the same), to numbers of
    DTYPE; strides in bytes."""
    item = cta_index() * (WARPS * 32) + thread_index()
    step = cta_count() * (WARPS * 32)
    while item < n * m:
        row = item // m
        column = item - row * m
        at = target + row * row_stride + column * column_stride
        value = load_global_float(source + item * pitch)
        if DTYPE == "float32":
            store_global_float(at, value)
        elif DTYPE == "float16":
            store_global_half(at, value)
        else:
            store_global_bfloat(at, value)
        item += step
