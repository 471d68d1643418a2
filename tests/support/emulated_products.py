"""The kernels of products and dequantizations run by the emulator, and what must hold of them.

Nothing is compiled and no GPU is needed. So a changed kernel or schedule can be checked in a second or so, with
tests/support on the path::

    python -c 'from emulated_products import run_product; print(run_product("Q4_K", 20, 512, 3))'
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from emulated_device import HOPPER, USUAL, EmulatedDevice
from gguf_files import random_blocks

from qmm import direct
from qmm.arrays import View
from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.lang.targets.emulator import Memory, Region, Settings
from qmm.kernels.ops.dequantize import dequantization_tiling
from qmm.kernels.ops.matvec.choose import choose
from qmm.kernels.ops.matvec.config import Config, Schedule
from qmm.kernels.ops.matvec.plan import case_of, scheduled
from qmm.kernels.ops.op import ITEM_NBYTES, Architecture, WeightLayout, alignment_of
from qmm.kernels.ops.tiling import Tiling

__all__ = ["Outcome", "dequantized", "expected_reads", "run_dequantization", "run_product"]

TOLERANCE = {True: 5e-4, False: 1e-6}
"""NMSE of one product, by whether activations are int8: see tests/gpu/test_kernels.py."""
OF_SUMS = 1e-12
"""NMSE of one product with the activations as they are once quantized: what float32 sums may lose, and far less than
one wrong weight makes."""
WEIGHTS = 3 << 52
"""Where weights lie: far from everything else."""


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        result: of the kernel.
        expected: what float64 gives of gguf's weights.
        error: the squared error over the energy (NMSE).
        of_sums: the same with the activations as they are once quantized.
        reads: how often each byte of the weights was read.
        schedule: as it was cut.
        seconds: how long the run took.
    """

    result: np.ndarray
    expected: np.ndarray
    error: float
    of_sums: float
    reads: np.ndarray
    schedule: Any
    seconds: float

    def __str__(self) -> str:
        return (
            f"NMSE {self.error:.2g} ({self.of_sums:.2g} without the quantization), weights read up to "
            f"{self.reads.max()} times, {self.seconds:.2f} s: {self.schedule}"
        )


def dequantized(block_format: Format, data: bytes, m: int, k: int) -> np.ndarray:
    """What gguf says that blocks are."""
    kind = gguf.GGMLQuantizationType[block_format.name]
    rows = np.frombuffer(data, np.uint8).reshape(m, -1)
    return gguf.quants.dequantize(rows, kind).reshape(m, k).astype(np.float32, copy=False)


def require_alone(memory: Memory, weights: Region, nbytes: int) -> None:
    """Memory begins with the first byte of the weights and ends with the last: nothing else is near."""
    assert weights.end - weights.start == nbytes
    assert all(other is weights or other.end < weights.start - WEIGHTS // 2 for other in memory.regions)


def expected_reads(block_format: Format, tiling: Tiling, address: int, m: int, k: int) -> np.ndarray:
    """How often each byte of a tensor is copied: once for each part of a row that has a byte in the same 16."""
    row_nbytes = block_format.row_nbytes(k)
    nbytes = tiling.chunk_blocks * block_format.block_nbytes
    reads = np.zeros(m * row_nbytes, np.int32)
    for begin in range(0, m * row_nbytes, row_nbytes):
        for start in range(begin, begin + row_nbytes, nbytes):
            stop = min(start + nbytes, begin + row_nbytes)
            first = ((address + start) & -16) - address
            last = ((address + stop + 15) & -16) - address
            reads[max(0, first) : last] += 1
    return reads


def run_product(
    name: str,
    m: int,
    k: int,
    n: int,
    *,
    int8: bool = True,
    architecture: Architecture = HOPPER,
    shift: int = 0,
    x_shift: int = 0,
    dtype: str = "float32",
    mapped: bool = False,
    config: Config | None = None,
    settings: Settings = USUAL,
    seed: int = 0,
) -> Outcome:
    """Multiply random blocks by random activations, and check what can be checked.

    Args:
        name: of the format.
        m: rows.
        k: weights a row.
        n: columns.
        int8: whether activations are quantized to int8; plain formats take float16 ones anyway.
        architecture: of the GPU.
        shift: where the tensor starts, past a multiple of 4096.
        x_shift: where the activations start, likewise; past a multiple of 16 no CTA quantizes them for itself.
        dtype: of activations and results.
        mapped: whether the weights lie in host memory.
        config: a choice for it; without one, it is the host's.
        settings: how kernels are run.
        seed: of weights and activations.

    Raises:
        EmulatorError: a kernel did what it must not do.
        AssertionError: the results are wrong, or a byte of the weights was read less or more often than it should.
    """
    block_format = FORMATS[name]
    int8 = int8 and not block_format.plain
    rng = np.random.default_rng(seed)
    data = random_blocks(name, (m, k), rng)
    x = _rounded(rng.standard_normal((n, k)).astype(np.float32), dtype)
    item = ITEM_NBYTES[dtype]
    device = EmulatedDevice(architecture, settings)
    weights = device.memory.add("weights", data, constant=True, address=WEIGHTS, shift=shift)
    source = device.add("x", _bytes_of(x, dtype), shift=x_shift)
    target = device.add("y", n * m * item)
    operands = [
        View((n, length), (item * length, item), dtype, region.start, 0).operand()
        for length, region in ((k, source), (m, target))
    ]
    layout = WeightLayout.at(weights.start, mapped)
    case = case_of(block_format, m, k, layout, operands[0], int8)
    schedule = Schedule.of(case, config, architecture) if config else choose(case, architecture)
    product = scheduled(block_format, m, k, layout, *operands, schedule, architecture)
    started = time.perf_counter()
    device.queue(device.prepare(product, "a product"), weights.start, source.start, target.start, 0)
    seconds = time.perf_counter() - started
    require_alone(device.memory, weights, len(data))
    y = _floats_of(target.data, dtype).reshape(n, m)
    matrix = dequantized(block_format, data, m, k).astype(np.float64)
    error, of_sums = (_nmse(y, values, matrix) for values in (x, quantized(x, int8)))
    outcome = Outcome(y, x.astype(np.float64) @ matrix.T, error, of_sums, weights.reads, schedule, seconds)
    assert target.unwritten() == 0, f"{target.unwritten()} bytes of the results were not written"
    rounding = {"float32": 0.0, "float16": 2.0**-22, "bfloat16": 2.0**-16}[dtype]
    assert error <= TOLERANCE[int8] + rounding, f"NMSE {error}"
    assert of_sums <= OF_SUMS + rounding, f"NMSE {of_sums} beside the quantization of activations"
    launches = -(-n // schedule.activations.columns)
    reads = launches * expected_reads(block_format, schedule.tiling, weights.start, m, k)
    np.testing.assert_array_equal(weights.reads, reads, "how often each byte of the weights was read")
    return outcome


def run_dequantization(
    name: str,
    m: int,
    k: int,
    *,
    architecture: Architecture = HOPPER,
    shift: int = 0,
    settings: Settings = USUAL,
    seed: int = 0,
) -> Outcome:
    """Dequantize random blocks with extreme scales, and check each bit; arguments and errors as above."""
    block_format = FORMATS[name]
    data = random_blocks(name, (m, k), np.random.default_rng(seed), extreme=True)
    device = EmulatedDevice(architecture, settings)
    weights = device.memory.add("weights", data, constant=True, address=WEIGHTS, shift=shift)
    target = device.add("weights as float32", 4 * m * k)
    started = time.perf_counter()
    direct.dequantize(device, block_format, weights.start, m, k, target.start, 0)
    seconds = time.perf_counter() - started
    require_alone(device.memory, weights, len(data))
    tiling = dequantization_tiling(block_format, alignment_of(weights.start | block_format.row_nbytes(k)), architecture)
    got = target.array(np.float32).reshape(m, k)
    expected = dequantized(block_format, data, m, k)
    outcome = Outcome(got, expected, 0.0, 0.0, weights.reads, tiling, seconds)
    assert target.unwritten() == 0, f"{target.unwritten()} bytes of the results were not written"
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    reads = expected_reads(block_format, tiling, weights.start, m, k)
    np.testing.assert_array_equal(weights.reads, reads, "how often each byte of the weights was read")
    return outcome


def quantized(x: np.ndarray, int8: bool) -> np.ndarray:
    """Activations as kernels/ops/quantize rounds them, as float64; no row may have a block of zeros."""
    n, k = x.shape
    blocks = np.zeros((n, -(-k // 32) * 32), np.float32)
    blocks[:, :k] = x
    blocks = blocks.reshape(n, -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    if int8:
        scale = largest * np.float32(1 / 127)
        values = np.rint(blocks.astype(np.float64) * (np.float32(1) / scale))
    else:
        scale = 2.0 ** np.floor(np.log2(largest))
        values = (blocks / scale).astype(np.float16)
    return (values.astype(np.float64) * scale).reshape(n, -1)[:, :k]


def _nmse(y: np.ndarray, x: np.ndarray, matrix: np.ndarray) -> float:
    """The squared error of a product over what its terms, or their sums, amount to."""
    x = x.astype(np.float64)
    expected = x @ matrix.T
    energy = max((expected**2).sum(), ((x**2) @ (matrix.T**2)).sum())
    return float(((y - expected) ** 2).sum() / energy)


def _bytes_of(values: np.ndarray, dtype: str) -> bytes:
    """Numbers as bytes of a dtype, which they were rounded to."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


def _floats_of(data: bytes | bytearray, dtype: str) -> np.ndarray:
    """Bytes of a dtype as float32."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype).astype(np.float32)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers that a dtype holds; bfloat16 by cutting off."""
    return _floats_of(_bytes_of(values, dtype), dtype).reshape(values.shape)
