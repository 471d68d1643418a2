"""Work at addresses, without an engine: for verification between guarded pages, benchmarks and tests.

Each call plans its work. Only functions that return bytes to the host wait.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from qmm.arrays import View
from qmm.copies import copy_out
from qmm.device import Device, Prepared
from qmm.kernels.formats import Format
from qmm.kernels.ops import dequantize as dequantize_op
from qmm.kernels.ops import read as read_op
from qmm.kernels.ops.matvec.plan import Product, plan
from qmm.kernels.ops.op import WeightLayout

__all__ = ["dequantize", "dequantize_host", "matmul", "prepare", "read_bytes"]


def prepare(
    device: Device,
    block_format: Format,
    weights: WeightLayout,
    m: int,
    k: int,
    x: View,
    y: View,
    int8: bool,
) -> Prepared:
    """A product, ready to be queued; arguments as for :func:`matmul`. It depends on the alignment of addresses, and on
    whether ``x`` and ``y`` overlap."""
    what = f"the product with {m} x {k} {block_format.name}"
    operands = x.operand(), y.operand()
    product = plan(block_format, m, k, weights, *operands, int8, device.architecture)
    if product.overlaps(x.address, y.address):
        product = plan(block_format, m, k, weights, *operands, int8, device.architecture, no_alias=False)
    return device.prepare(product, what)


def matmul(
    device: Device,
    block_format: Format,
    weights: int,
    m: int,
    k: int,
    x: View,
    y: View,
    int8: bool,
    stream: int,
    mapped: bool = False,
) -> Product | None:
    """``y[..., m] = x[..., k] @ W[m, k]^T`` for arrays on the device.

    Args:
        device: where.
        block_format: of the weight.
        weights: the device's address of its first byte.
        m: rows.
        k: weights a row.
        x: activations, any strides.
        y: results, any strides without overlapping elements.
        int8: whether activations are quantized to int8, else to float16.
        stream: a stream's handle.
        mapped: whether the weight is read over the link to the host.

    Returns:
        The planned product; None if there are no results.

    Raises:
        DeviceError: CUDA refused.
    """
    if not m or not math.prod(x.shape[:-1]):
        return None
    prepared = prepare(device, block_format, WeightLayout.at(weights, mapped), m, k, x, y, int8)
    device.queue(prepared, weights, x.address, y.address, stream)
    assert isinstance(prepared.work, Product)
    return prepared.work


def dequantize(
    device: Device, block_format: Format, weights: int, m: int, k: int, out: int, stream: int, mapped: bool = False
) -> None:
    """Float32 weights, ``(m, k)`` row-major at ``out``, a multiple of 16 bytes; arguments as for :func:`matmul`."""
    if m and k:
        work = dequantize_op.plan(block_format, m, k, WeightLayout.at(weights, mapped), device.architecture)
        prepared = device.prepare(work, f"dequantizing {m} x {k} {block_format.name}")
        device.queue(prepared, weights, 0, out, stream)


def dequantize_host(
    device: Device, block_format: Format, weights: int, m: int, k: int, stream: int, mapped: bool = False
) -> npt.NDArray[np.float32]:
    """The weights ``(m, k)`` as float32 in host memory, by way of the device; waits for them."""
    out = np.empty((m, k), np.float32)
    if out.size:
        with device.temporary_buffer(out.nbytes, "dequantized weights") as buffer:
            dequantize(device, block_format, weights, m, k, buffer, stream, mapped)
            copy_out(device, out, buffer, stream)
    return out


def read_bytes(device: Device, address: int, nbytes: int, stream: int) -> bytes:
    """Bytes as a kernel reads them at ``address``; waits for them."""
    found = np.empty(nbytes, np.uint8)
    with device.temporary_buffer(nbytes, "bytes read") as buffer:
        prepared = device.prepare(read_op.plan(nbytes, device.architecture), f"reading {nbytes} bytes")
        device.queue(prepared, address, 0, buffer, stream)
        copy_out(device, found, buffer, stream)
    return found.tobytes()
