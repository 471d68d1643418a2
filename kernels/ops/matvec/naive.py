"""The simplest implementation of the product, for reading and as a reference: ``y[n, m] = x[n, k] @ W[m, k]^T``.

One thread for each result reads its row of W from global memory, block by block, and multiplies by float32
activations. Neighbouring threads read neighbouring rows, so nothing is coalesced, and each column reads the weights
again: it is far slower than :mod:`qmm.kernels.ops.matvec.kernel`, and computes the same.
"""

from __future__ import annotations

import functools

from qmm.kernels.formats import Format, c
from qmm.kernels.lang.fields import FieldAccess
from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.primitives import run_weights
from qmm.kernels.lang.ptx.arithmetic import dot_floats
from qmm.kernels.lang.ptx.global_memory import load_global_run, store_global_float
from qmm.kernels.lang.ptx.grid import cta_index, thread_index
from qmm.kernels.lang.specialize import unroll
from qmm.kernels.ops.op import At, LaunchSpec, WeightLayout, Work, alignment_of
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["naive", "naive_kernel", "plan"]

THREADS = 128


def naive(weights, row_nbytes, m, blocks, x, n, y):
    """The product of ``m`` rows of whole blocks with ``n`` rows of float32 at a multiple of 16 bytes."""
    item = cta_index() * THREADS + thread_index()
    if mask("results, naive", item < m * n):
        column = item // m
        row = item - column * m
        total = 0.0
        for block in range(blocks):
            address = weights + row * row_nbytes + block * c.BLOCK_NBYTES
            for lane in unroll(c.LANES):
                runs = c.unpack(lane, *c.load(address, lane))
                for i in unroll(c.RUNS):
                    q, scale, minimum = runs[i]
                    run = (column * blocks + block) * c.BLOCK_RUNS + c.position(lane, i)
                    total += dot_floats(run_weights(q, scale, minimum), load_global_run(x + 64 * run))
        store_global_float(y + 4 * item, total)


@functools.cache
def naive_kernel(block_format: Format, alignment: int) -> Kernel:
    """The kernel for rows that start at multiples of ``alignment`` bytes."""
    fields = FieldAccess(min(alignment, block_format.alignment), "global")
    return Kernel(f"naive_{block_format.name}", naive, block_format.constants(), THREADS, fields)


def plan(block_format: Format, m: int, k: int, weights: WeightLayout, n: int) -> Work:
    """The work of a product of ``x (n, k)`` and ``y (n, m)``, float32, row-major.

    Args:
        block_format: of the weight.
        m: rows.
        k: weights a row, whole blocks (of 16, where the format is plain).
        weights: where the weight lies.
        n: columns.
    """
    row_nbytes, blocks = block_format.row_nbytes(k), block_format.blocks(k)
    kernel = naive_kernel(block_format, alignment_of(weights.alignment | row_nbytes))
    launch = LaunchSpec.of(
        kernel,
        -(-m * n // THREADS),
        weights=At("weights"),
        row_nbytes=row_nbytes,
        m=m,
        blocks=blocks,
        x=At("x"),
        n=n,
        y=At("y"),
    )
    return Work((launch,))
