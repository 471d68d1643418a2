"""Formats and kernels of a third party, defined here and registered nowhere, from their bytes to all targets.

Both formats are like those that ggml calls IQ: their bits are indices into tables. The product is as plain as README's,
and the schedules that qmm ships serve such formats too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from emulated_device import AMPERE, HOPPER, EmulatedDevice
from ptx_compile import compile_kernel, problems

from qmm import direct
from qmm.arrays import View
from qmm.kernels.formats import FORMATS, Format, c
from qmm.kernels.lang import FieldAccess, mask, table, unroll
from qmm.kernels.lang.fields import load2, load4, load16
from qmm.kernels.lang.primitives import half, run_weights, spread_bits
from qmm.kernels.lang.ptx.arithmetic import dot_floats
from qmm.kernels.lang.ptx.global_memory import load_global_run, store_global_float
from qmm.kernels.lang.ptx.grid import cta_index, thread_index
from qmm.kernels.lang.targets.emulator import EmulatorError, Memory, Region, Settings, emulate
from qmm.kernels.ops.cpu import products
from qmm.kernels.ops.dequantize import dequantization_tiling, dequantize_kernel
from qmm.kernels.ops.matvec import naive
from qmm.kernels.ops.matvec.choose import choose
from qmm.kernels.ops.matvec.config import Case
from qmm.kernels.ops.matvec.constants import matvec_kernel
from qmm.kernels.ops.op import WeightLayout
from qmm.kernels.runtime import build
from qmm.kernels.runtime.cpu import CPUKernel
from qmm.kernels.runtime.kernel import Kernel
from qmm.kernels.runtime.keys import key_of

# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------

LEVELS = np.array([-127, -98, -74, -55, -40, -27, -16, -6, 3, 13, 24, 37, 52, 70, 93, 127])
"""What a nibble stands for."""
level = table(LEVELS)

GRID = np.random.default_rng(8).choice([8, 25, 43, 62], (256, 8))
"""What a byte stands for: eight magnitudes, none of them 0."""
grid = table(GRID)


def load_levels(block, lane):
    return load2(block, 0), load16(block, 2)


def unpack_levels(lane, d, nibbles):
    scale = half(d)
    return (level(nibbles & 0x0F0F0F0F), scale, 0.0), (level((nibbles >> 4) & 0x0F0F0F0F), scale, 0.0)


def load_grid(block, lane):
    return load2(block, 0), load4(block, 2), load4(block, 6)


def unpack_grid(lane, d, indices, signs):
    scale = half(d) * 0.125
    first = with_signs(grid(indices & 255, (indices >> 8) & 255), signs)
    second = with_signs(grid((indices >> 16) & 255, indices >> 24), signs >> 16)
    return (first, scale, 0.0), (second, scale, 0.0)


def with_signs(magnitudes, signs):
    """Sixteen magnitudes, those negative whose bit is set: the complement and one, which never carries."""
    negative = spread_bits(signs)
    return (magnitudes ^ (negative * 0xFF)) + negative


def position(lane, i):
    return i


def geometry(name: str, nbytes: int, load: Callable[..., object], unpack: Callable[..., object]) -> Format:
    return Format(
        name=name,
        block_weights=32,
        block_nbytes=nbytes,
        lanes=1,
        runs=2,
        has_minimum=False,
        load=load,
        unpack=unpack,
        position=position,
        alignment=2,
        pairs=True,
    )


@dataclass(frozen=True)
class Outside:
    """A format, its blocks as NumPy sees them, and what these mean in float64: ``(m, blocks)`` to ``(m, k)``."""

    format: Format
    block: np.dtype
    weights: Callable[[np.ndarray], np.ndarray]


def weights_of_levels(blocks: np.ndarray) -> np.ndarray:
    q = LEVELS[np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-1)]
    return (q * blocks["d"].astype(np.float64)[..., None]).reshape(len(blocks), -1)


def weights_of_grid(blocks: np.ndarray) -> np.ndarray:
    q = GRID[blocks["indices"]].reshape(*blocks.shape, 32)
    signs = 1 - 2 * np.unpackbits(blocks["signs"], axis=-1, bitorder="little").astype(int)
    return (q * signs * (blocks["d"].astype(np.float64) / 8)[..., None]).reshape(len(blocks), -1)


OUTSIDE = {
    "levels": Outside(
        geometry("LEVELS_4", 18, load_levels, unpack_levels),
        np.dtype([("d", "f2"), ("qs", "u1", 16)]),
        weights_of_levels,
    ),
    "grid": Outside(
        geometry("GRID_8", 10, load_grid, unpack_grid),
        np.dtype([("d", "f2"), ("indices", "u1", 4), ("signs", "u1", 4)]),
        weights_of_grid,
    ),
}
formats = pytest.mark.parametrize("name", OUTSIDE)


# ---------------------------------------------------------------------------------------------------------------------
# A product
# ---------------------------------------------------------------------------------------------------------------------

THREADS = 64


def dot(row, blocks, x):
    """One row of whole blocks by float32, on either target."""
    total = 0.0
    for block in range(blocks):
        for lane in unroll(c.LANES):
            runs = c.unpack(lane, *c.load(row + block * c.BLOCK_NBYTES, lane))
            for i in unroll(c.RUNS):
                q, scale, minimum = runs[i]
                at = x + 64 * (block * c.BLOCK_RUNS + c.position(lane, i))
                total += dot_floats(run_weights(q, scale, minimum), load_global_run(at))
    return total


def matvec_cpu(weights, row_nbytes, m, blocks, x, y):
    for row in range(m):
        store_global_float(y + 4 * row, dot(weights + row * row_nbytes, blocks, x))


def matvec_gpu(weights, row_nbytes, m, blocks, x, y):
    row = cta_index() * THREADS + thread_index()
    if mask("rows", row < m):
        store_global_float(y + 4 * row, dot(weights + row * row_nbytes, blocks, x))


@dataclass(frozen=True)
class Numbers:
    """Random blocks, activations ``(n, k)``, the weights and the product in float64, and a kernel's sizes."""

    blocks: np.ndarray
    x: np.ndarray
    weights: np.ndarray
    y: np.ndarray
    sizes: dict[str, int]

    def require(self, y: np.ndarray, nmse: float) -> None:
        assert np.sum((y - self.y) ** 2) <= nmse * np.sum((self.x**2) @ (self.weights.T**2))


def numbers(name: str, m: int = 70, k: int = 96, n: int = 1) -> Numbers:
    outside, rng = OUTSIDE[name], np.random.default_rng(7)
    blocks = np.frombuffer(rng.bytes(m * k // 32 * outside.block.itemsize), outside.block).reshape(m, -1).copy()
    blocks["d"] = rng.standard_normal(blocks.shape)
    x = rng.standard_normal((n, k), dtype=np.float32)
    weights = outside.weights(blocks)
    sizes = {"row_nbytes": outside.format.row_nbytes(k), "m": m, "blocks": outside.format.blocks(k)}
    return Numbers(blocks, x, weights, x.astype(np.float64) @ weights.T, sizes)


def kernel_of(name: str) -> Kernel:
    return Kernel("matvec_gpu", matvec_gpu, OUTSIDE[name].format.constants(), THREADS, FieldAccess(2, "global"))


def emulated(name: str, given: Numbers, settings: Settings) -> dict[str, Region]:
    kernel, memory = kernel_of(name), Memory()
    regions = {
        "weights": memory.add("weights", given.blocks.tobytes(), constant=True, shift=2),
        "x": memory.add("x", given.x.tobytes(), constant=True),
        "y": memory.add("y", 4 * given.y.size),
    }
    emulate(
        kernel,
        memory=memory,
        grid=-(-given.sizes["m"] // THREADS),
        settings=settings,
        **regions,
        **given.sizes,
    )
    return regions


@formats
def test_the_format_checks_itself(name: str) -> None:
    OUTSIDE[name].format.check()


@formats
def test_the_product_is_right_on_the_cpu(name: str) -> None:
    assert OUTSIDE[name].format.name not in FORMATS
    given, y = numbers(name), np.empty((1, 70), np.float32)
    kernel = CPUKernel.of("matvec_cpu", matvec_cpu, OUTSIDE[name].format.constants())
    kernel(weights=given.blocks.ctypes.data, x=given.x.ctypes.data, y=y.ctypes.data, **given.sizes)
    given.require(y, 1e-12)


def test_the_product_is_kept_in_the_cache_by_all_that_it_is_made_of() -> None:
    kernels = [CPUKernel.of("matvec_cpu", matvec_cpu, OUTSIDE[name].format.constants()) for name in OUTSIDE]
    described = [kernel.key for kernel in kernels] + [kernel_of(name).described() for name in OUTSIDE]
    keys = [key_of("a product", key, (9, 0)) for key in described if key is not None]
    assert len({key for key in keys if key is not None}) == 4
    assert all("total += dot_floats" in str(key) for key in keys)


@formats
def test_the_product_is_right_in_the_emulator_and_reads_each_byte_once(name: str) -> None:
    given = numbers(name)
    regions = emulated(name, given, Settings())
    given.require(regions["y"].array(np.float32), 1e-12)
    assert set(regions["weights"].reads) == {1}


@formats
def test_the_product_without_its_mask_is_refused(name: str) -> None:
    with pytest.raises(EmulatorError, match=r"lane \d+: .* are not within any of"):
        emulated(name, numbers(name), Settings(faults=frozenset({"rows"})))


def require_registers(kernel: Kernel, *targets: str) -> None:
    made = compile_kernel(build.function_of(kernel), build.signature_of(kernel), kernel.name, kernel.threads, targets)
    assert [problem for target in targets for problem in problems(made, target)] == []


@formats
def test_the_product_keeps_its_values_in_registers(name: str) -> None:
    require_registers(kernel_of(name), "sm_80", "sm_90")


# ---------------------------------------------------------------------------------------------------------------------
# The schedules that qmm ships
# ---------------------------------------------------------------------------------------------------------------------

MODES = {"int8": 5e-4, "f16": 1e-6}
"""What the activations' storing may cost, as NMSE."""
modes = pytest.mark.parametrize("mode", MODES)


@modes
@formats
def test_shipped_products_on_the_cpu_serve_the_format(name: str, mode: str) -> None:
    given = numbers(name, n=3)
    y = np.empty_like(given.y, np.float32)
    products.matmul(OUTSIDE[name].format, given.blocks.ctypes.data, 70, 96, given.x, y, mode)
    given.require(y, MODES[mode])


@modes
@formats
@pytest.mark.parametrize("architecture", [HOPPER, AMPERE], ids=["bulk", "by 16"])
def test_shipped_products_on_a_gpu_serve_the_format(name: str, mode: str, architecture: object) -> None:
    given = numbers(name, n=3)
    device = EmulatedDevice(architecture)
    weights = device.add("weights", given.blocks.tobytes(), constant=True, shift=2)
    source, target = device.add("x", given.x.tobytes()), device.add("y", 4 * given.y.size)
    x, y = (
        View(shape, (4 * shape[1], 4), "float32", region.start, 0)
        for shape, region in ((given.x.shape, source), (given.y.shape, target))
    )
    direct.matmul(device, OUTSIDE[name].format, weights.start, 70, 96, x, y, mode == "int8", 0)
    given.require(target.array(np.float32).reshape(given.y.shape), MODES[mode])


@formats
def test_the_naive_product_serves_the_format(name: str) -> None:
    given, device = numbers(name, n=2), EmulatedDevice()
    weights = device.add("weights", given.blocks.tobytes(), constant=True, shift=2)
    source, target = device.add("x", given.x.tobytes(), constant=True), device.add("y", 4 * given.y.size)
    work = naive.plan(OUTSIDE[name].format, 70, 96, WeightLayout.at(weights.start), 2)
    device.queue(device.prepare(work, "a product"), weights.start, source.start, target.start, 0)
    given.require(target.array(np.float32).reshape(given.y.shape), 1e-12)


@formats
def test_shipped_dequantization_serves_the_format(name: str) -> None:
    given, device = numbers(name), EmulatedDevice()
    expected = given.weights.astype(np.float32)  # exact: 11 bits of a scale by 7 of a level
    made = np.empty_like(expected)
    products.dequantize(OUTSIDE[name].format, given.blocks.ctypes.data, 70, 96, made)
    np.testing.assert_array_equal(made, expected)
    weights = device.add("weights", given.blocks.tobytes(), constant=True, shift=2)
    target = device.add("weights as float32", expected.nbytes)
    direct.dequantize(device, OUTSIDE[name].format, weights.start, 70, 96, target.start, 0)
    np.testing.assert_array_equal(target.array(np.float32).reshape(expected.shape), expected)


def test_shipped_kernels_keep_the_formats_values_in_registers() -> None:
    block_format = OUTSIDE["levels"].format
    case = Case(block_format, 14336, 4096, 1, int8=True, alignment=16, fusible=True, mapped=False)
    require_registers(matvec_kernel(block_format, choose(case, HOPPER)), "sm_90")
    block_format = OUTSIDE["grid"].format
    tiling = dequantization_tiling(block_format, 2, AMPERE)
    require_registers(dequantize_kernel(block_format, tiling, AMPERE.bulk), "sm_80")
