"""Products and dequantization on the CPU: the kernel and its arguments."""

from __future__ import annotations

import functools
import operator
from typing import Any, SupportsIndex

import numpy as np

from qmm.kernels.formats import Format
from qmm.kernels.ops.cpu.kernels import ProductConstants, dequantize_rows, product_rows
from qmm.kernels.ops.cpu.parallel import over_rows
from qmm.kernels.ops.cpu.quantize import CPUActivations, address_of, quantize
from qmm.kernels.runtime.cpu import CPUKernel

__all__ = ["dequantize", "dequantize_kernel", "matmul", "product_kernel"]

COLUMN_TILE = 4
"""The most columns that a kernel multiplies at once. Six took longer than four and two, and 11 s to compile (Q4_K)."""
FAST = ("contract", "nsz", "reassoc")
"""LLVM's fast-math flags of products: common scales of the activations may be factored out, which makes Q4_K 9% faster
and Q6_K 3% (14336x4096 on a Zen 4 core). NaN and infinities are kept."""


@functools.cache
def product_kernel(block_format: Format, int8: bool, columns: int) -> CPUKernel:
    """The product with rows of a format.

    Args:
        block_format: of the weight.
        int8: whether activations are quantized.
        columns: the exact number, or COLUMN_TILE for that and any larger number.
    """
    constants = ProductConstants(
        **block_format.constants(product=True).described(),
        INT8=int8,
        COLUMNS=columns,
        # One chain for two runs of a lane waits for its additions (Q8_0, four columns: 0.75 ms, else 0.60).
        CHAINS=block_format.runs if columns == 1 or block_format.runs <= 2 else 1,
        OFFSET_CHAINS=block_format.runs if columns == 1 else 1,
        MANY=columns == COLUMN_TILE,
        REPEATED=3 if int8 else 2,  # four columns take 2.7 times as long as one, with float32 activations 1.4 times
    )
    name = f"product_{block_format.name}_{'int8' if int8 else 'f16'}_{columns}"
    return CPUKernel.of(name, product_rows, constants, *FAST)


@functools.cache
def dequantize_kernel(block_format: Format) -> CPUKernel:
    """The kernel that dequantizes rows of a format."""
    return CPUKernel.of(f"dequantize_{block_format.name}", dequantize_rows, block_format.constants())


def matmul(
    block_format: Format,
    address: SupportsIndex,
    m: SupportsIndex,
    k: SupportsIndex,
    x: np.ndarray[Any, Any] | CPUActivations,
    out: np.ndarray[Any, Any],
    activations: str = "int8",
) -> None:
    """``out[n, m] = x[n, k] @ W[m, k]^T`` from the blocks at ``address``.

    Args:
        block_format: of the weight.
        address: of the first block; ``m`` rows of ``block_format.row_nbytes(k)`` bytes follow, and none beyond is read.
        m: rows of the weight.
        k: weights a row.
        x: ``(n, k)`` as for :func:`qmm.kernels.ops.cpu.quantize.quantize`, or its result.
        out: ``(n, m)`` float32, rows contiguous; overwritten.
        activations: ``"int8"`` or ``"f16"``, which on the CPU keeps the activations in float32. Plain formats always
            take the latter. Ignored if ``x`` is :class:`CPUActivations`.

    Raises:
        ValueError: ``x`` or ``out`` has another shape or layout, activations for a plain format were quantized, or
            ``activations`` is another word.
    """
    address, m, k = map(operator.index, (address, m, k))
    if not isinstance(x, CPUActivations):
        if activations not in ("int8", "f16"):
            raise ValueError(f'activations are "int8" or "f16", not {activations!r}')
        x = quantize(x, activations == "int8" and not block_format.plain)
    _check(block_format, m, k, x, out)
    if not out.size:
        return
    row_nbytes = block_format.row_nbytes(k)
    kernel = product_kernel(block_format, x.int8, min(x.n, COLUMN_TILE))
    arguments = {
        "weights": address,
        "row_nbytes": row_nbytes,
        "m": m,
        "blocks": block_format.blocks(k),
        "k": k,
        "n": x.n,
        "x": x.address,
        "x_pitch": x.pitch,
        "x_units": x.units_address,
        "y": address_of(out),
        "y_pitch": out.strides[0],
    }

    def work(span: int, next_row: int) -> None:
        tail_block = np.empty(64, np.uint8)
        kernel(**arguments, tail_block=address_of(tail_block), span=span, next_row=next_row)

    over_rows(m, m * row_nbytes * x.n, work)


def _check(block_format: Format, m: int, k: int, x: CPUActivations, out: np.ndarray[Any, Any]) -> None:
    if x.k != k or (x.int8 and block_format.plain):
        kind = "int8" if x.int8 else "f16"
        raise ValueError(f"{block_format.name} of k = {k} cannot be multiplied by {kind} activations of k = {x.k}")
    if out.shape != (x.n, m) or out.dtype != np.float32 or (m > 1 and out.strides[1] != 4):
        raise ValueError(
            f"results are ({x.n}, {m}) float32 with contiguous rows, not "
            f"{out.shape} {out.dtype} with strides {out.strides}"
        )


def dequantize(
    block_format: Format, address: SupportsIndex, m: SupportsIndex, k: SupportsIndex, out: np.ndarray[Any, Any]
) -> None:
    """The weights at ``address`` as float32, bit for bit what ``gguf.quants.dequantize`` gives.

    Args:
        block_format: of the weight.
        address: of the first block.
        m: rows.
        k: weights a row.
        out: ``(m, k)`` float32, row-major; overwritten.
    """
    address, m, k = map(operator.index, (address, m, k))
    row_nbytes = block_format.row_nbytes(k)
    kernel = dequantize_kernel(block_format)
    arguments = {"weights": address, "row_nbytes": row_nbytes, "m": m, "blocks": block_format.blocks(k), "k": k}

    def work(span: int, next_row: int) -> None:
        tail_block, tail_floats = np.empty(64, np.uint8), np.empty(64, np.uint8)
        kernel(
            **arguments,
            tail_block=address_of(tail_block),
            tail_floats=address_of(tail_floats),
            y=address_of(out),
            span=span,
            next_row=next_row,
        )

    over_rows(m, m * row_nbytes, work)
