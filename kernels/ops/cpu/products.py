"""The CPU schedules: products, and dequantization, straight off the mapping.

Threads take spans of rows from a common counter. A row is walked block by block and lane by lane, the lanes written
out, so that what the lanes of a block share (its scales) is decoded once. Weights are unpacked into 16 bytes at a time
and never stored: a product reads the row's bytes and nothing else of the tensor.

Activations are int16 here, although their values fit int8: the multiply-add of pairs takes int16, and widening them
once beats widening them for every row (4.3 against 4.5 ms for 14336x4096 Q4_K on a Zen 4 core).

The last, cut-short block of a plain row is copied to a scratch block first, since its loads are 16 bytes wide and the
row may be the last thing in the file.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np

from qmm.children import PerProcess
from qmm.kernels.formats import Format
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
from qmm.kernels.lang.specialize import registers, specialize, unroll
from qmm.kernels.lang.targets.cpu import CPU, CPU_PRODUCTS, CPUKernel
from qmm.kernels.ops.cpu.threads import Helpers

__all__ = [
    "available_cpus",
    "dequantize",
    "dequantize_kernel",
    "matmul",
    "product_kernel",
    "quantize_activations",
    "set_threads",
]

COLUMN_TILE = 4
SMALL, LARGE, INFINITE = np.uint32((127 - 96) << 23), np.uint32((127 + 96) << 23), np.uint32(0x7F800000)
"""Bits of float32: 2**-96, 2**96 and infinity. A row whose largest magnitude is below the first, or from the second on
and finite, is multiplied in units of a power of two: sums would overflow on their way, or scales and products lose
digits."""
HELPER_NBYTES = 2 << 20
"""Weight bytes that are worth a further thread: about 0.2 ms of work. With less, waking it costs more than it saves
(Q8_0 2048x640, 1.4 MB, on two cores: 0.10 ms alone, 0.14 ms with a helper)."""


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Names in capitals, `load`, `unpack` and `position` are bound by specialize().
# ---------------------------------------------------------------------------------------------------------------------


def product_int8(row, blocks, k, x, x_scales, x_sums, x_units, column, scratch, y, y_pitch):
    """COLUMNS products of one row with int8 activations; ``y`` addresses the row's first output."""
    partial = registers(COLUMNS * CHAINS, zero_partial())
    offset = registers(COLUMNS * CHAINS, 0.0)
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
                        offset[c * CHAINS + i % CHAINS] += minimum * load_float(x_sums, ((first >> 4) + run) * 4)
    for c in unroll(COLUMNS):
        total = sum_partial(partial[c * CHAINS])
        for i in unroll(range(1, CHAINS)):
            total += sum_partial(partial[c * CHAINS + i])
        for i in unroll(CHAINS):
            total -= offset[c * CHAINS + i]
        store_float(y, (column + c) * y_pitch, total * load_float(x_units, (column + c) * 4))


def product_float(row, blocks, k, x, x_scales, x_sums, x_units, column, scratch, y, y_pitch):
    """COLUMNS products of one row with float32 activations, whose rows are padded with zeros to whole blocks, and in
    units of ``x_units`` as for int8."""
    total = registers(COLUMNS, zero_floats())
    pitch = blocks * (16 * BLOCK_RUNS)
    for block in range(blocks):
        address = row + block * BLOCK_NBYTES
        if PLAIN and k - block * 16 < 16:
            address = whole_block(address, k - block * 16, scratch)
        for lane in unroll(LANES):
            runs = unpack(lane, *load(address, lane))
            for i in unroll(RUNS):
                q, scale, minimum = runs[i]
                weights = run_weights(q, scale, minimum)
                if PLAIN:
                    weights = masked(weights, k - block * 16)
                run = block * BLOCK_RUNS + position(lane, i)
                for c in unroll(COLUMNS):
                    values = load_floats(x, ((column + c) * pitch + 16 * run) * 4)
                    total[c] = multiply_add(total[c], weights, values)
    for c in unroll(COLUMNS):
        store_float(y, (column + c) * y_pitch, sum_floats(total[c]) * load_float(x_units, (column + c) * 4))


def product_rows(
    weights, row_nbytes, m, blocks, k, n, x, x_scales, x_sums, x_units, scratch, y, y_pitch, span, next_row
):  # fmt: skip
    """The products of rows with every column; a row stays in the L1 cache while columns pass over it.

    Threads take spans of rows off the counter at ``next_row`` until there are none.
    """
    first = fetch_add(next_row, span)
    while first < m:
        for row in range(first, min(first + span, m)):
            address = weights + row * row_nbytes
            out = y + row * 4
            column = 0
            if TILED:
                while column + COLUMN_TILE <= n:
                    product_tile(address, blocks, k, x, x_scales, x_sums, x_units, column, scratch, out, y_pitch)
                    column += COLUMN_TILE
            while column < n:
                product_one(address, blocks, k, x, x_scales, x_sums, x_units, column, scratch, out, y_pitch)
                column += 1
        first = fetch_add(next_row, span)


def dequantize_rows(weights, row_nbytes, m, blocks, k, scratch, tail, out, span, next_row):
    """Float32 weights of rows, ``out`` row-major with ``k`` to a row; spans are taken as for products."""
    first = fetch_add(next_row, span)
    while first < m:
        for row in range(first, min(first + span, m)):
            dequantize_row(weights + row * row_nbytes, blocks, k, scratch, tail, out + row * k * 4)
        first = fetch_add(next_row, span)


def dequantize_row(row, blocks, k, scratch, tail, out):
    for block in range(blocks):
        address = row + block * BLOCK_NBYTES
        if PLAIN and k - block * 16 < 16:
            address = whole_block(address, k - block * 16, scratch)
        target = out + block * (16 * BLOCK_RUNS) * 4
        for lane in unroll(LANES):
            runs = unpack(lane, *load(address, lane))
            for i in unroll(RUNS):
                q, scale, minimum = runs[i]
                values = run_weights(q, scale, minimum)
                if PLAIN:
                    left = k - block * 16
                    if left < 16:
                        store_floats(tail, 0, values)
                        copy_bytes(tail, left * 4, target)
                    else:
                        store_floats(target, 0, values)
                else:
                    store_floats(target, position(lane, i) * 64, values)


def whole_block(address, left, scratch):
    """A copy of the block that the row's end cuts short, from which 16 bytes may be loaded at a time.

    Callers ask whether it is cut short: with the question in here, LLVM calls this for every block (F16 4096x4096: 9 ms
    instead of 2).
    """
    copy_bytes(address, left * (BLOCK_NBYTES // 16), scratch)
    return scratch


def copy_bytes(source, count, target):
    for i in range(count):
        store_byte(target, i, load1(source, i))


def quantize_rows(x, k, n, q, scales, sums, units):
    """Activations as Q8_1 has them: for each 32 values one scale ``d = max|x| / 127`` and ``q = round(x / d)``.

    ``sums[run]`` is ``d`` times the sum of the run's ``q``. All of a row is in units of ``units[row]`` (see SMALL). So
    beside a value from 2**96 on, a block whose largest is below 2**-112 loses digits.

    The largest magnitude is found on the bit pattern, where a NaN is larger than everything and so is not lost: the
    scale of a block with a NaN is NaN, of one with an infinity infinite, and the product says so.
    """
    bits = x.view(np.uint32)
    for row in range(n):
        most = np.uint32(0)
        for i in range(k):
            most = max(most, bits[row, i] & np.uint32(0x7FFFFFFF))
        factor, units[row] = np.float32(1.0), np.float32(1.0)
        if most < SMALL:
            factor, units[row] = np.float32(2.0**32), np.float32(2.0**-32)
        elif most >= LARGE and most < INFINITE:
            factor, units[row] = np.float32(2.0**-32), np.float32(2.0**32)
        for block in range(k // 32):
            largest = np.uint32(0)
            for i in range(32):
                largest = max(largest, bits[row, block * 32 + i] & np.uint32(0x7FFFFFFF))
            d = np.uint32(largest).view(np.float32) * factor / np.float32(127.0)
            lifted = factor
            inverse = np.float32(0.0)
            if d < np.float32(2.0**-126):  # beside larger blocks: 1 / d may be too large, and d is rounded up
                d += np.float32(2.0**-149)
                lifted = factor * np.float32(2.0**24)
                inverse = np.float32(1.0) / (d * np.float32(2.0**24))
            elif largest < INFINITE:
                inverse = np.float32(1.0) / d
            scales[row, block] = d
            for half_block in range(2):
                total = 0
                for i in range(16):
                    j = block * 32 + half_block * 16 + i
                    if inverse > np.float32(0.0):
                        value = int(np.rint(x[row, j] * lifted * inverse))
                    else:
                        value = 0
                    q[row, j] = value
                    total += value
                sums[row, block * 2 + half_block] = d * np.float32(total)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling and calling
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def product_kernel(block_format: Format, int8: bool, tiled: bool) -> CPUKernel:
    """The product with rows of a format, compiled in one to five seconds, once a process.

    Without ``tiled``, which takes COLUMN_TILE columns at once, it compiles in a third of the time.
    """
    made = {"product_one": _product_of_row(block_format, int8, 1)}
    if tiled:
        made["product_tile"] = _product_of_row(block_format, int8, COLUMN_TILE)
    return CPU_PRODUCTS.kernel(specialize(product_rows, {**made, "TILED": tiled}, CPU_PRODUCTS))


@functools.cache
def _product_of_row(block_format: Format, int8: bool, columns: int) -> Callable[..., Any]:
    product = product_int8 if int8 else product_float
    chains = block_format.runs if columns == 1 else 1  # one sum waits 4 cycles for its last addition
    constants = {**block_format.constants(product=True), "CHAINS": chains, "COLUMNS": columns}
    return CPU_PRODUCTS.device_function(specialize(product, constants, CPU_PRODUCTS))


@functools.cache
def dequantize_kernel(block_format: Format) -> CPUKernel:
    """The kernel that dequantizes rows of a format."""
    return CPU.kernel(specialize(dequantize_rows, block_format.constants(), CPU))


@functools.cache
def _quantize_kernel() -> CPUKernel:
    return CPU.kernel(quantize_rows)


def available_cpus() -> int:
    """How many CPUs the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Threads:
    """The helpers that a product asks; a forked child has none of its parent's."""

    helpers: PerProcess[Helpers] = PerProcess(functools.partial(Helpers, available_cpus() - 1))


def set_threads(count: SupportsIndex) -> None:
    """Use ``count`` threads for a product or dequantization; at first it is the CPUs that the process may run on.

    Where the system refuses to start a thread, a product does with fewer. Products under way in other threads go on
    with those that they have.

    Raises:
        ValueError: ``count`` is not positive.
        TypeError: ``count`` is no whole number.
    """
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"the number of threads must be a whole number, not {count!r}") from None
    if number < 1:
        raise ValueError(f"a product needs a thread at least, not {number}")
    before = _Threads.helpers
    _Threads.helpers = PerProcess(functools.partial(Helpers, number - 1))
    before.now.dismiss()


def _over_rows(m: int, nbytes: int, work: Callable[[int, int], None]) -> None:
    """Calls ``work(span, next_row)`` on one thread or several; each takes rows off the counter until there are none.

    The caller takes its share at once: a thread that wakes late finds less to do, and one that has not even begun when
    the rows are done is called off, so that a small product never waits for it.
    """
    threads = _Threads.helpers.now  # which another caller may replace
    helpers = min(threads.most, nbytes // HELPER_NBYTES)
    span = max(1, -(-m // (8 * (helpers + 1))))  # a few spans a thread, so that a slow core holds nobody up
    next_row = np.zeros(1, np.int64)
    address = _address(next_row)
    if not helpers:
        work(span, address)
        return
    threads.run(lambda: work(span, address), helpers)


def quantize_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """int8 activations for :func:`matmul`.

    Args:
        x: ``(n, k)`` float32, row-major, ``k`` a multiple of 32.

    Returns:
        ``q (n, k)`` int16 holding -127 to 127; ``scales (n, k / 32)``, ``sums (n, k / 16)`` and ``units (n,)`` float32,
        the last a power of two, which the other two are to be multiplied by.
    """
    n, k = x.shape
    q = np.empty((n, k), np.int16)
    scales = np.empty((n, k // 32), np.float32)
    sums = np.empty((n, k // 16), np.float32)
    units = np.empty(n, np.float32)
    x = x.view()
    x.flags.writeable = False  # for all, or the kernel is compiled for either kind
    _quantize_kernel()(x, k, n, q, scales, sums, units)
    return q, scales, sums, units


def matmul(
    block_format: Format,
    address: SupportsIndex,
    m: SupportsIndex,
    k: SupportsIndex,
    x: np.ndarray,
    out: np.ndarray,
    activations: str = "int8",
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
    address, m, k = map(operator.index, (address, m, k))
    n = x.shape[0]
    blocks = block_format.blocks(k)
    row_nbytes = block_format.row_nbytes(k)
    int8 = activations == "int8" and not block_format.plain
    kernel = product_kernel(block_format, int8, n >= COLUMN_TILE)
    if int8:
        values, scales, sums, units = quantize_activations(x)
    else:
        values, units = _in_units(_padded(x, blocks * block_format.block_weights))
        scales = sums = values

    addresses = [_address(array) for array in (values, scales, sums, units)]
    result = _address(out)

    def work(span: int, next_row: int) -> None:
        scratch = np.zeros(64, np.uint8)
        kernel(
            *(address, row_nbytes, m, blocks, k, n, *addresses),
            *(_address(scratch), result, m * 4, span, next_row),
        )

    _over_rows(m, m * row_nbytes * n, work)


def dequantize(
    block_format: Format, address: SupportsIndex, m: SupportsIndex, k: SupportsIndex, out: np.ndarray
) -> None:
    """The weights at ``address`` as float32, bit for bit what ``gguf.quants.dequantize`` gives.

    Args:
        block_format: what the blocks are.
        address: of the first block.
        m: rows.
        k: weights a row.
        out: ``(m, k)`` float32, row-major; overwritten.
    """
    address, m, k = map(operator.index, (address, m, k))
    blocks = block_format.blocks(k)
    row_nbytes = block_format.row_nbytes(k)
    kernel = dequantize_kernel(block_format)

    def work(span: int, next_row: int) -> None:
        scratch, tail = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
        buffers = (_address(scratch), _address(tail), _address(out))
        kernel(address, row_nbytes, m, blocks, k, *buffers, span, next_row)

    _over_rows(m, m * row_nbytes, work)


def _address(array: np.ndarray) -> int:
    """Of an array's first element. ``array.ctypes`` would import a module, which a finalizer at exit cannot."""
    address: int = array.__array_interface__["data"][0]
    return address


def _in_units(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``x`` with each row in its units (see SMALL), and the units ``(n,)``."""
    units = np.ones(len(x), np.float32)
    most = (x.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(axis=1, initial=0)  # bits, as in quantize_rows
    rows = most.tolist()
    if min(rows, default=SMALL) >= SMALL and max(rows, default=SMALL) < LARGE:
        return x, units
    units[most < SMALL] = 2.0**-32
    units[(most >= LARGE) & (most < INFINITE)] = 2.0**32
    return x / units[:, None], units


def _padded(x: np.ndarray, width: int) -> np.ndarray:
    """``x`` with zeros after each row up to ``width`` values; ``x`` itself where there is nothing to add."""
    n, k = x.shape
    if k == width:
        return x
    padded = np.zeros((n, width), np.float32)
    padded[:, :k] = x
    return padded
