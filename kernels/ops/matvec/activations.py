"""How consumer warps quantize the activations to the shared memory of their CTA, or copy them there.

Producer warps wait at a barrier (X_REQUESTED) until the first of these loads are in flight: else activations would
queue up behind the weights.
"""

from __future__ import annotations

from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.ptx.arithmetic import max_magnitude_of_four, pack_halves, scaled_bytes, zero_words
from qmm.kernels.lang.ptx.barrier import named_barrier_arrive
from qmm.kernels.lang.ptx.global_memory import load_global16_l2, load_global_floats_l2
from qmm.kernels.lang.ptx.shared_memory import store_shared16, store_shared_float, store_shared_word
from qmm.kernels.lang.ptx.warp import (
    max_magnitude_of_eight_lanes,
    sum_words_of_eight_lanes,
    sum_words_of_four_lanes,
)
from qmm.kernels.lang.specialize import registers, unroll
from qmm.kernels.ops.matvec.columns import c
from qmm.kernels.ops.quantize.kernel import f16_scale, int8_scale, place_of

__all__ = ["X_REQUESTED", "copy_activations", "quantize_block"]

X_REQUESTED = 1
"""The named barrier of consumer and producer warps."""


def quantize_block(x, x_stride, n, k, blocks, values, thread):
    """Quantizes ``n`` rows of ``k`` float32 (a multiple of 4), each at a multiple of 16 bytes, to shared memory.

    Eight lanes quantize a scale block, four neighbouring values each. ROUNDS rounds of loads are in flight before the
    first is used.
    """
    scales = values + blocks * (2 * c.RUN_NBYTES)
    sums = scales + blocks * (4 * c.COLUMNS)
    at = thread * 4
    first = True
    while first or at - (thread & 31) * 4 < blocks * 32:  # whole warps, which exchange values
        loaded = registers(c.ROUNDS * c.COLUMNS, (0.0, 0.0, 0.0, 0.0))
        for i in unroll(c.ROUNDS):
            here = at + i * (4 * 32 * c.WARPS)
            for column in unroll(c.COLUMNS):
                if mask("tail of x, fused", here < k) and mask("columns of x, fused", column < n):
                    loaded[i * c.COLUMNS + column] = load_global_floats_l2(x + column * x_stride + here * 4)
        if first:
            named_barrier_arrive(X_REQUESTED, 32 * (c.WARPS + c.PRODUCERS))
            first = False
        for i in unroll(c.ROUNDS):
            here = at + i * (4 * 32 * c.WARPS)
            if here - (thread & 31) * 4 < blocks * 32:
                block = place_of(here >> 5, c.SCALE_BLOCKS)
                half = (here >> 4) & 1
                for column in unroll(c.COLUMNS):
                    v0, v1, v2, v3 = loaded[i * c.COLUMNS + column]
                    largest = max_magnitude_of_eight_lanes(max_magnitude_of_four(v0, v1, v2, v3))
                    at_run = values + (block * 2 + half) * c.RUN_NBYTES + column * (c.RUN_NBYTES // c.COLUMNS)
                    if c.INT8:
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
                        store_shared_float(scales + (block * c.COLUMNS + column) * 4, scale)
                    if c.SUMS == 1:
                        total = sum_words_of_eight_lanes(packed)
                        if here & 31 == 0 and here < blocks * 32:
                            store_shared_float(sums + (block * c.COLUMNS + column) * 4, total)
                    if c.SUMS == 2:
                        total = sum_words_of_four_lanes(packed)
                        if here & 15 == 0 and here < blocks * 32:
                            store_shared_float(sums + ((half * blocks + block) * c.COLUMNS + column) * 4, total)
        at += c.ROUNDS * 4 * 32 * c.WARPS


def copy_activations(target, source, nbytes, thread):
    """Copies quantized activations to shared memory, with eight loads of 16 bytes a thread in flight."""
    at = thread * 16
    first = True
    while first or at < nbytes:
        words = registers(8, zero_words())
        for i in unroll(8):
            if mask("copy of activations, read", at + i * (16 * 32 * c.WARPS) < nbytes):
                words[i] = load_global16_l2(source + at + i * (16 * 32 * c.WARPS))
        if first:
            named_barrier_arrive(X_REQUESTED, 32 * (c.WARPS + c.PRODUCERS))
            first = False
        for i in unroll(8):
            if mask("copy of activations, written", at + i * (16 * 32 * c.WARPS) < nbytes):
                store_shared16(target + at + i * (16 * 32 * c.WARPS), words[i])
        at += 8 * 16 * 32 * c.WARPS
