"""The CPU's kernels: products and dequantization, reading the mapping in place.

Threads take spans of rows from a shared counter. Lanes of a block are unrolled, so that what they share (scales) is
decoded once. Weights are unpacked in registers, 16 at a time, and multiplied by several columns: a second column takes
0.6 of the time of the first (Q4_K 1024x4096 on a Zen 4 core: 0.23, 0.37, 0.51 and
0.64 ms for one to four), with float32 activations 0.1 (0.82, 0.89, 1.10, 1.14 ms).

A partial last block of a plain row is copied to a buffer first: loads are 16 bytes wide, and the file may end with the
row.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmm.kernels.formats.format import FormatConstants
from qmm.kernels.lang.fields import load1
from qmm.kernels.lang.primitives import masked, run_weights
from qmm.kernels.lang.simd import (
    dot_run,
    fetch_add,
    load_float,
    load_floats,
    multiply_add,
    store_byte,
    store_float,
    store_floats,
    sum_floats,
    sum_partial,
    zero_floats,
    zero_partial,
)
from qmm.kernels.lang.specialize import registers, unroll
from qmm.kernels.ops.cpu.scale_block import Q_OFFSET, RUN_Q_NBYTES, SCALE_BLOCK_NBYTES, SUMS_OFFSET

__all__ = ["ProductConstants", "dequantize_rows", "product_rows"]


@dataclass(frozen=True)
class ProductConstants(FormatConstants):
    """The compile-time constants of products."""

    INT8: bool
    """Whether activations are quantized, else float32."""
    COLUMNS: int
    """Columns that are multiplied at once."""
    CHAINS: int
    """Partial sums of each column, with int8 activations: an addition to a sum waits 4 cycles for the one before."""
    OFFSET_CHAINS: int
    """The same for the sum of minima."""
    MANY: bool
    """Whether there may be more columns than COLUMNS; else there are exactly as many."""
    REPEATED: int
    """If at least so many columns remain at the end, they are multiplied together with the last ones before them; fewer
    are multiplied one by one."""


c = ProductConstants.placeholder()


def product_rows(
    weights, row_nbytes, m, blocks, k, n, x, x_pitch, x_units, tail_block, y, y_pitch, span, next_row
):  # fmt: skip
    """The products of rows with every column; a row stays in the L1 cache while columns pass over it.

    Threads take spans of rows from the counter at ``next_row`` until none are left.
    """
    first = fetch_add(next_row, span)
    while first < m:
        for row in range(first, min(first + span, m)):
            address = weights + row * row_nbytes
            column = 0
            while column < n:
                if c.MANY and n - column < c.REPEATED:
                    multiply_one(address, blocks, k, column, x, x_pitch, x_units, tail_block, y + row * 4, y_pitch)
                    column += 1
                else:
                    at = min(column, n - c.COLUMNS) if c.MANY else 0
                    multiply_several(address, blocks, k, at, x, x_pitch, x_units, tail_block, y + row * 4, y_pitch)
                    column += c.COLUMNS
        first = fetch_add(next_row, span)


def multiply_several(row, blocks, k, column, x, x_pitch, x_units, tail_block, y, y_pitch):
    """The products of one row with ``c.COLUMNS`` columns from ``column`` on; ``y`` addresses the row's first output."""
    x += column * x_pitch
    x_units += column * 4
    y += column * y_pitch
    if c.INT8:
        sums = registers(c.COLUMNS * c.CHAINS, zero_partial())
        offsets = registers(c.COLUMNS * c.OFFSET_CHAINS, 0.0)
        product_int8(sums, offsets, c.COLUMNS, c.CHAINS, c.OFFSET_CHAINS, row, blocks, x, x_pitch, x_units, y, y_pitch)
    else:
        totals = registers(c.COLUMNS, zero_floats())
        product_float(totals, c.COLUMNS, row, blocks, k, x, x_pitch, x_units, tail_block, y, y_pitch)


def multiply_one(row, blocks, k, column, x, x_pitch, x_units, tail_block, y, y_pitch):
    """The product of one row with ``column``."""
    x += column * x_pitch
    x_units += column * 4
    y += column * y_pitch
    if c.INT8:
        sums = registers(c.RUNS, zero_partial())
        offsets = registers(c.RUNS, 0.0)
        product_int8(sums, offsets, 1, c.RUNS, c.RUNS, row, blocks, x, x_pitch, x_units, y, y_pitch)
    else:
        totals = registers(1, zero_floats())
        product_float(totals, 1, row, blocks, k, x, x_pitch, x_units, tail_block, y, y_pitch)


def product_int8(sums, offsets, columns, chains, offset_chains, row, blocks, x, x_pitch, x_units, y, y_pitch):
    """Products of one row with ``columns`` rows of int8 activations, from address ``x`` on."""
    at = registers(columns, x)
    for j in unroll(range(1, columns)):
        at[j] = x + j * x_pitch
    for block in range(blocks):
        address = row + block * c.BLOCK_NBYTES
        for lane in unroll(c.LANES):
            runs = c.unpack(lane, *c.load(address, lane))
            for i in unroll(c.RUNS):
                q, scale, minimum = runs[i]
                run = c.position(lane, i)
                place = (run >> 1) * SCALE_BLOCK_NBYTES
                x_q = place + Q_OFFSET + (run & 1) * RUN_Q_NBYTES
                x_sum = place + SUMS_OFFSET + (run & 1) * 4
                for j in unroll(columns):
                    scale_x = scale * load_float(at[j], place)
                    sums[j * chains + i % chains] = dot_run(sums[j * chains + i % chains], q, at[j] + x_q, scale_x)
                    if c.HAS_MINIMUM:
                        offsets[j * offset_chains + i % offset_chains] += minimum * load_float(at[j], x_sum)
        for j in unroll(columns):
            at[j] += (c.BLOCK_RUNS // 2) * SCALE_BLOCK_NBYTES
    for j in unroll(columns):
        total = sum_partial(sums[j * chains])
        for i in unroll(range(1, chains)):
            total += sum_partial(sums[j * chains + i])
        for i in unroll(offset_chains):
            total -= offsets[j * offset_chains + i]
        store_float(y, j * y_pitch, total * load_float(x_units, j * 4))


def product_float(totals, columns, row, blocks, k, x, x_pitch, x_units, tail_block, y, y_pitch):
    """Products of one row with ``columns`` rows of float32 activations, which have zeros up to whole runs."""
    at = registers(columns, x)
    for j in unroll(range(1, columns)):
        at[j] = x + j * x_pitch
    for block in range(blocks):
        address = row + block * c.BLOCK_NBYTES
        if c.PLAIN and k - block * 16 < 16:
            address = whole_block(address, k - block * 16, tail_block)
        for lane in unroll(c.LANES):
            runs = c.unpack(lane, *c.load(address, lane))
            for i in unroll(c.RUNS):
                q, scale, minimum = runs[i]
                weights = run_weights(q, scale, minimum)
                if c.PLAIN:
                    weights = masked(weights, k - block * 16)
                place = c.position(lane, i) * 64
                for j in unroll(columns):
                    totals[j] = multiply_add(totals[j], weights, load_floats(at[j], place))
        for j in unroll(columns):
            at[j] += c.BLOCK_RUNS * 64
    for j in unroll(columns):
        store_float(y, j * y_pitch, sum_floats(totals[j]) * load_float(x_units, j * 4))


def dequantize_rows(weights, row_nbytes, m, blocks, k, tail_block, tail_floats, y, span, next_row):
    """Float32 weights of rows, ``y`` row-major with ``k`` to a row; spans are taken as for products."""
    first = fetch_add(next_row, span)
    while first < m:
        for row in range(first, min(first + span, m)):
            dequantize_row(weights + row * row_nbytes, blocks, k, tail_block, tail_floats, y + row * k * 4)
        first = fetch_add(next_row, span)


def dequantize_row(row, blocks, k, tail_block, tail_floats, y):
    for block in range(blocks):
        address = row + block * c.BLOCK_NBYTES
        if c.PLAIN and k - block * 16 < 16:
            address = whole_block(address, k - block * 16, tail_block)
        target = y + block * (16 * c.BLOCK_RUNS) * 4
        for lane in unroll(c.LANES):
            runs = c.unpack(lane, *c.load(address, lane))
            for i in unroll(c.RUNS):
                q, scale, minimum = runs[i]
                values = run_weights(q, scale, minimum)
                if c.PLAIN:
                    left = k - block * 16
                    if left < 16:
                        store_floats(tail_floats, 0, values)
                        copy_bytes(tail_floats, left * 4, target)
                    else:
                        store_floats(target, 0, values)
                else:
                    store_floats(target, c.position(lane, i) * 64, values)


def whole_block(address, left, tail_block):
    """A copy of a row's partial last block, from which 16 bytes may be loaded at a time.

    Callers check that the block is partial: with the check in here, LLVM calls this for every block (F16 4096x4096: 9
    ms instead of 2).
    """
    copy_bytes(address, left * (c.BLOCK_NBYTES // 16), tail_block)
    return tail_block


def copy_bytes(source, count, target):
    for i in range(count):
        store_byte(target, i, load1(source, i))
