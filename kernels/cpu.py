"""The CPU schedules: products, and dequantization, straight off the mapping.

Rows are dealt to threads in contiguous spans. A row is walked block by block and lane by lane, the lanes written out,
so that what the lanes of a block share (its scales) is decoded once. Weights are unpacked into 16 bytes at a time and
never stored: a product reads the row's bytes and nothing else of the tensor.

Activations are int16 here, although their values fit int8: the multiply-add of pairs takes int16, and widening them
once beats widening them for every row (0.33 against 0.31 ms for 14336x4096 Q4_K on a Zen 4 core).

The last, cut-short block of a plain row is copied to a scratch block first, since its loads are 16 bytes wide and the
row may be the last thing in the file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qmm.kernels.cpu_target import (
    CPU,
    dot_run,
    load1,
    load_float,
    load_floats,
    multiply_add,
    store1,
    store_float,
    store_floats,
    sum_floats,
    sum_partial,
    zero_floats,
    zero_partial,
)
from qmm.kernels.formats import Format
from qmm.kernels.primitives import masked, run_weights
from qmm.kernels.specialize import registers, specialize, unroll

__all__ = ["CPUKernels", "dequantize", "matmul", "quantize_activations"]

COLUMN_TILE = 4
SMALL_NBYTES = 1 << 18
"""Below this many weight bytes a second thread costs more than it saves (about 30 us to wake one)."""


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Names in capitals, `load`, `unpack` and `position` are bound by specialize().
# ---------------------------------------------------------------------------------------------------------------------


def product_int8(row, blocks, k, x, x_scales, x_sums, column, scratch, y, y_pitch):
    """COLUMNS products of one row with int8 activations; ``y`` addresses the row's first output."""
    partial = registers(COLUMNS * CHAINS, zero_partial())
    offset = registers(COLUMNS, 0.0)
    for block in range(blocks):
        address = row + block * BLOCK_NBYTES
        for lane in unroll(LANES):
            runs = unpack(lane, *load(address, lane))
            for i in unroll(RUNS):
                q, scale, minimum = runs[i]
                run = block * BLOCK_RUNS + position(lane, i)
                pair = block * (BLOCK_RUNS // 2) + (position(lane, i) >> 1)
                for c in unroll(COLUMNS):
                    first = (column + c) * k
                    scale_x = load_float(x_scales, ((first >> 5) + pair) * 4)
                    partial[c * CHAINS + i % CHAINS] = dot_run(
                        partial[c * CHAINS + i % CHAINS], q, x + (first + 16 * run) * 2, scale * scale_x
                    )
                    if HAS_MINIMUM:
                        offset[c] += minimum * load_float(x_sums, ((first >> 4) + run) * 4)
    for c in unroll(COLUMNS):
        total = sum_partial(partial[c * CHAINS])
        for i in unroll(range(1, CHAINS)):
            total += sum_partial(partial[c * CHAINS + i])
        store_float(y, (column + c) * y_pitch, total - offset[c])


def product_float(row, blocks, k, x, x_scales, x_sums, column, scratch, y, y_pitch):
    """COLUMNS products of one row with float32 activations, whose rows are padded with zeros to whole blocks."""
    total = registers(COLUMNS, zero_floats())
    pitch = blocks * (16 * BLOCK_RUNS)
    for block in range(blocks):
        address = row + block * BLOCK_NBYTES
        if PLAIN:
            left = k - block * 16
            if left < 16:
                copy_bytes(address, left * (BLOCK_NBYTES // 16), scratch)
                address = scratch
        for lane in unroll(LANES):
            runs = unpack(lane, *load(address, lane))
            for i in unroll(RUNS):
                q, scale, minimum = runs[i]
                weights = run_weights(q, scale, minimum)
                if PLAIN:
                    weights = masked(weights, left)
                run = block * BLOCK_RUNS + position(lane, i)
                for c in unroll(COLUMNS):
                    values = load_floats(x, ((column + c) * pitch + 16 * run) * 4)
                    total[c] = multiply_add(total[c], weights, values)
    for c in unroll(COLUMNS):
        store_float(y, (column + c) * y_pitch, sum_floats(total[c]))


def product_rows(weights, row_nbytes, first_row, last_row, blocks, k, n, x, x_scales, x_sums, scratch, y, y_pitch):
    """The products of a span of rows with every column; a row stays in the L1 cache while columns pass over it."""
    for row in range(first_row, last_row):
        address = weights + row * row_nbytes
        out = y + row * 4
        column = 0
        if TILED:
            while column + COLUMN_TILE <= n:
                product_tile(address, blocks, k, x, x_scales, x_sums, column, scratch, out, y_pitch)
                column += COLUMN_TILE
        while column < n:
            product_one(address, blocks, k, x, x_scales, x_sums, column, scratch, out, y_pitch)
            column += 1


def dequantize_rows(weights, row_nbytes, first_row, last_row, blocks, k, scratch, tail, out):
    """Float32 weights of a span of rows, ``out`` row-major with ``k`` to a row."""
    for row in range(first_row, last_row):
        for block in range(blocks):
            address = weights + row * row_nbytes + block * BLOCK_NBYTES
            target = out + (row * k + block * (16 * BLOCK_RUNS)) * 4
            if PLAIN:
                left = k - block * 16
                if left < 16:
                    copy_bytes(address, left * (BLOCK_NBYTES // 16), scratch)
                    address = scratch
            for lane in unroll(LANES):
                runs = unpack(lane, *load(address, lane))
                for i in unroll(RUNS):
                    q, scale, minimum = runs[i]
                    values = run_weights(q, scale, minimum)
                    if PLAIN:
                        if left < 16:
                            store_floats(tail, 0, values)
                            copy_bytes(tail, left * 4, target)
                        else:
                            store_floats(target, 0, values)
                    else:
                        store_floats(target, position(lane, i) * 64, values)


def copy_bytes(source, count, target):
    for i in range(count):
        store1(target, i, load1(source, i))


def quantize_rows(x, k, n, q, scales, sums):
    """Activations as Q8_1 has them: for each 32 values one scale ``d = max|x| / 127`` and ``q = round(x / d)``.

    The largest magnitude is found on the bit pattern, where a NaN is larger than everything and so is not lost: the
    scale of a block with a NaN is NaN, of one with an infinity infinite, and the product says so. Magnitudes below
    2**-119, whose reciprocal would overflow, count as zero. ``sums[run]`` is ``d`` times the sum of the run's ``q``.
    """
    bits = x.view(np.uint32)
    for row in range(n):
        for block in range(k // 32):
            largest = np.uint32(0)
            for i in range(32):
                largest = max(largest, bits[row, block * 32 + i] & np.uint32(0x7FFFFFFF))
            d = np.uint32(largest).view(np.float32) / np.float32(127.0)
            inverse = np.float32(0.0)
            if largest >= np.uint32(8 << 23) and largest < np.uint32(0x7F800000):
                inverse = np.float32(1.0) / d
            elif largest < np.uint32(8 << 23):
                d = np.float32(0.0)
            scales[row, block] = d
            for half_block in range(2):
                total = 0
                for i in range(16):
                    j = block * 32 + half_block * 16 + i
                    if inverse > np.float32(0.0):
                        value = int(np.rint(x[row, j] * inverse))
                    else:
                        value = 0
                    q[row, j] = value
                    total += value
                sums[row, block * 2 + half_block] = d * np.float32(total)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling and calling
# ---------------------------------------------------------------------------------------------------------------------


class CPUKernels:
    """The compiled kernels of one format; compiling takes one to three seconds a kernel, one for each process."""

    def __init__(self, block_format: Format) -> None:
        self.format = block_format

    def _constants(self, columns: int = 1) -> dict[str, Any]:
        block_format = self.format
        return {
            "BLOCK_NBYTES": block_format.block_nbytes,
            "BLOCK_RUNS": block_format.block_weights // 16,
            "CHAINS": block_format.runs if columns == 1 else 1,  # one sum waits 4 cycles for its last addition
            "COLUMNS": columns,
            "HAS_MINIMUM": block_format.has_minimum,
            "LANES": block_format.lanes,
            "PLAIN": block_format.plain,
            "RUNS": block_format.runs,
            "load": block_format.load,
            "position": block_format.position,
            "unpack": block_format.unpack,
        }

    def product(self, int8: bool, n: int) -> Callable[..., Any]:
        """The kernel for ``n`` columns; the one for few columns compiles in a third of the time."""
        return self._product(int8, n >= COLUMN_TILE)

    @functools.lru_cache  # noqa: B019  (one object a format, and kernels live as long as the process)
    def _product(self, int8: bool, tiled: bool) -> Callable[..., Any]:
        product = product_int8 if int8 else product_float
        tiles = {"product_one": 1} | ({"product_tile": COLUMN_TILE} if tiled else {})
        made = {
            name: CPU.device_function(specialize(product, self._constants(columns), CPU))
            for name, columns in tiles.items()
        }
        return CPU.kernel(specialize(product_rows, {**self._constants(), **made, "TILED": tiled}, CPU))

    @functools.cached_property
    def dequantize(self) -> Callable[..., Any]:
        """The kernel that dequantizes rows."""
        return CPU.kernel(specialize(dequantize_rows, self._constants(), CPU))


@functools.cache
def kernels_for(block_format: Format) -> CPUKernels:
    """The process's kernels of a format."""
    return CPUKernels(block_format)


@functools.cache
def _quantize_kernel() -> Callable[..., Any]:
    return CPU.kernel(quantize_rows)


@functools.cache
def _threads() -> tuple[ThreadPoolExecutor, int]:
    """The process's pool and its size: the CPUs that this process may run on."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(count, thread_name_prefix="qmm"), count


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads


def _over_rows(m: int, nbytes: int, work: Callable[[int, int], None]) -> None:
    """Calls ``work(first_row, last_row)`` over all rows, on several threads where there is enough to do."""
    pool, count = _threads()
    if count == 1 or nbytes < SMALL_NBYTES or m < 2:
        work(0, m)
        return
    spans = min(m, count * 4)  # a few spans a thread, so that a slow core holds nobody up
    edges = [m * i // spans for i in range(spans + 1)]
    for _ in pool.map(work, edges[:-1], edges[1:]):
        pass


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 activations for :func:`matmul`.

    Args:
        x: ``(n, k)`` float32, row-major, ``k`` a multiple of 32.

    Returns:
        ``q (n, k)`` int16 holding -127 to 127, ``scales (n, k / 32)`` and ``sums (n, k / 16)`` float32.
    """
    n, k = x.shape
    q = np.empty((n, k), np.int16)
    scales = np.empty((n, k // 32), np.float32)
    sums = np.empty((n, k // 16), np.float32)
    _quantize_kernel()(x, k, n, q, scales, sums)
    return q, scales, sums


def matmul(
    block_format: Format, address: int, m: int, k: int, x: np.ndarray, out: np.ndarray, activations: str = "int8"
) -> None:
    """``out[n, m] = x[n, k] @ W[m, k]^T`` off the blocks at ``address``.

    Args:
        block_format: what the blocks are.
        address: of the first block; ``m`` rows of ``block_format.row_nbytes(k)`` bytes follow, and none beyond is read.
        m: rows of the weight.
        k: weights a row.
        x: ``(n, k)`` float32, row-major.
        out: ``(n, m)`` float32, row-major; overwritten.
        activations: ``"int8"`` or ``"f16"``, which on the CPU keeps the activations in float32. Plain formats always
            take the latter.
    """
    n = x.shape[0]
    kernels = kernels_for(block_format)
    blocks = block_format.blocks(k)
    row_nbytes = block_format.row_nbytes(k)
    int8 = activations == "int8" and not block_format.plain
    kernel = kernels.product(int8, n)
    if int8:
        values, scales, sums = quantize_activations(x)
    else:
        values = _padded(x, blocks * block_format.block_weights)
        scales = sums = values

    def work(first_row: int, last_row: int) -> None:
        scratch = np.zeros(64, np.uint8)
        kernel(
            address,
            row_nbytes,
            first_row,
            last_row,
            blocks,
            k,
            n,
            values.ctypes.data,
            scales.ctypes.data,
            sums.ctypes.data,
            scratch.ctypes.data,
            out.ctypes.data,
            m * 4,
        )

    _over_rows(m, m * row_nbytes * n, work)


def dequantize(block_format: Format, address: int, m: int, k: int, out: np.ndarray) -> None:
    """The weights at ``address`` as float32, bit for bit what ``gguf.quants.dequantize`` gives.

    Args:
        block_format: what the blocks are.
        address: of the first block.
        m: rows.
        k: weights a row.
        out: ``(m, k)`` float32, row-major; overwritten.
    """
    blocks = block_format.blocks(k)
    row_nbytes = block_format.row_nbytes(k)
    kernel = kernels_for(block_format).dequantize

    def work(first_row: int, last_row: int) -> None:
        scratch = np.zeros(64, np.uint8)
        tail = np.zeros(64, np.uint8)
        kernel(
            address,
            row_nbytes,
            first_row,
            last_row,
            blocks,
            k,
            scratch.ctypes.data,
            tail.ctypes.data,
            out.ctypes.data,
        )

    _over_rows(m, m * row_nbytes, work)


def _padded(x: np.ndarray, width: int) -> np.ndarray:
    """``x`` with zeros after each row up to ``width`` values; ``x`` itself where there is nothing to add."""
    n, k = x.shape
    if k == width:
        return x
    padded = np.zeros((n, width), np.float32)
    padded[:, :k] = x
    return padded
