"""Products and dequantizations over memory of exactly the tensor's size, for compute-sanitizer to watch.

A program, ``python exact_products.py FORMAT... [--beyond]``: each format with odd rows at widths that are no multiple
of 512, with weights, x and y in allocations of their own. With ``--beyond`` a kernel reads a byte too much at the end.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import gguf
import numpy as np
from gguf_files import random_blocks

from qmm import direct
from qmm.arrays import View
from qmm.device import Device
from qmm.kernels.formats import FORMATS, Format

__all__ = ["main"]

COLUMNS = (1, 2, 3, 8)


def main(names: list[str], beyond: bool) -> None:
    """Run it all, and print how many products and dequantizations that were."""
    gpu = Device(0)
    rng = np.random.default_rng(0)
    count = 0
    for name in names:
        block_format = FORMATS[name]
        widths = (37, 1100) if block_format.plain else tuple(block_format.block_weights * blocks for blocks in (1, 5))
        for m, k in zip((5, 67), widths, strict=True):
            count += run(gpu, block_format, m, k, rng)
    print(f"{count} products and dequantizations")
    if beyond:
        with gpu.temporary_buffer(1000, "a tensor") as address:
            gpu.copy(address, np.zeros(1000, np.uint8).ctypes.data, 1000, gpu.stream)
            direct.read_bytes(gpu, address, 1001, gpu.stream)
    gpu.close()


def run(gpu: Device, block_format: Format, m: int, k: int, rng: np.random.Generator) -> int:
    data = np.frombuffer(random_blocks(block_format.name, (m, k), rng), np.uint8)
    kind = gguf.GGMLQuantizationType[block_format.name]
    weights = gguf.quants.dequantize(data.reshape(m, -1), kind).reshape(m, k).astype(np.float32)
    count = 0
    with ExitStack() as made:
        address = made.enter_context(gpu.temporary_buffer(data.nbytes, "a tensor"))
        gpu.copy(address, data.ctypes.data, data.nbytes, gpu.stream)
        for n in COLUMNS:
            x = rng.standard_normal((n, k)).astype(np.float32)
            y = np.empty((n, m), np.float32)
            x_address = made.enter_context(gpu.temporary_buffer(x.nbytes, "x"))
            y_address = made.enter_context(gpu.temporary_buffer(y.nbytes, "y"))
            gpu.copy(x_address, x.ctypes.data, x.nbytes, gpu.stream)
            x_view = View((n, k), (4 * k, 4), "float32", x_address, 0)
            y_view = View((n, m), (4 * m, 4), "float32", y_address, 0)
            for int8 in (False,) if block_format.plain else (True, False):
                direct.matmul(gpu, block_format, address, m, k, x_view, y_view, int8, gpu.stream)
                gpu.copy(y.ctypes.data, y_address, y.nbytes, gpu.stream)
                gpu.synchronize(gpu.stream)
                expected = x.astype(np.float64) @ weights.T.astype(np.float64)
                energy = (x.astype(np.float64) ** 2) @ (weights.T.astype(np.float64) ** 2)
                assert ((y - expected) ** 2).sum() <= 5e-4 * energy.sum(), (block_format.name, m, k, n, int8)
                count += 1
        out = direct.dequantize_host(gpu, block_format, address, m, k, gpu.stream)
        assert np.array_equal(out.view(np.uint32), weights.view(np.uint32)), (block_format.name, m, k)
    return count + 1


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--beyond"], "--beyond" in sys.argv)
