"""Kernels on the GPU, off memory of exactly the tensor's size: compute-sanitizer sees any byte read beyond it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf_files import random_blocks, small_blocks

from qmm import direct
from qmm.arrays import View
from qmm.device import Device
from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.ops.layout import WARPS
from qmm.kernels.ops.read import plan_checksum

# NMSE of one product, against float64: see kernels/ops/quantize.py. An int8 block loses at most 4.96e-4 of its energy;
# float16 at most 2**-22 = 2.4e-7 (the square of half a unit in the last place, 2**-11).
TOLERANCE = {True: 5e-4, False: 1e-6}

formats = pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)


@pytest.fixture(scope="module")
def gpu():
    gpu = Device(0)
    yield gpu
    gpu.drain()
    gpu.close()


def multiply(
    gpu: Device, block_format: Format, address: int, m: int, k: int, x: np.ndarray, int8: bool, stream: int
) -> np.ndarray:
    """The product of activations ``(n, k)`` in host memory, by way of exactly as much device memory."""
    y = np.empty((len(x), m), np.float32)
    with gpu.temporary_buffer(x.nbytes, "x") as source, gpu.temporary_buffer(y.nbytes, "y") as target:
        gpu.copy(source, x.ctypes.data, x.nbytes, stream)
        x_view = View(x.shape, (4 * k, 4), "float32", source, gpu.number)
        y_view = View(y.shape, (4 * m, 4), "float32", target, gpu.number)
        direct.matmul(gpu, block_format, address, m, k, x_view, y_view, int8, stream)
        gpu.copy(y.ctypes.data, target, y.nbytes, stream)
        gpu.synchronize(stream)
    return y


class Area:
    """Device memory of exactly the bytes given, behind ``before`` bytes of poison and before ``after`` more."""

    def __init__(self, gpu: Device, data: np.ndarray, before: int = 0, after: int = 0) -> None:
        self.gpu = gpu
        everything = np.full(before + data.nbytes + after, 0xFF, np.uint8)
        everything[before : before + data.nbytes] = data.reshape(-1).view(np.uint8)
        self.base = gpu.allocate(everything.nbytes, "a test")
        gpu.copy(self.base, everything.ctypes.data, everything.nbytes, gpu.stream)
        gpu.synchronize(gpu.stream)
        self.address = self.base + before

    def __enter__(self) -> int:
        return self.address

    def __exit__(self, *_: object) -> None:
        self.gpu.free(self.base)


def blocks_of(block_format: Format, m: int, k: int, rng: np.random.Generator, extreme: bool = False) -> np.ndarray:
    return np.frombuffer(random_blocks(block_format.name, (m, k), rng, extreme=extreme), np.uint8)


def oracle(block_format: Format, data: np.ndarray, m: int, k: int) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[block_format.name]
    return gguf.quants.dequantize(data.reshape(m, -1), kind).reshape(m, k).astype(np.float32, copy=False)


def depths(block_format: Format) -> tuple[int, ...]:
    """One block, a row shorter than a chunk, one of several chunks; none of them a multiple of 512."""
    if block_format.plain:
        return 1, 37, 2887
    block = block_format.block_weights
    return (block, 896, 2880) if block == 32 else (block, 3 * block, 11 * block)


@formats
def test_dequantizes_bit_for_bit(gpu: Device, block_format: Format, rng: np.random.Generator) -> None:
    for k in depths(block_format):
        for m, extreme in ((1, False), (3, True), (67, True)):
            data = blocks_of(block_format, m, k, rng, extreme)
            with Area(gpu, data) as address:
                got = direct.dequantize_host(gpu, block_format, address, m, k, gpu.stream)
            expected = oracle(block_format, data, m, k)
            np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), f"{m} x {k}")


@formats
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
def test_multiplies_within_tolerance(gpu: Device, block_format: Format, int8: bool, rng: np.random.Generator) -> None:
    if block_format.plain and int8:
        int8 = False  # what the engine does: plain formats take unquantized activations
    for k in depths(block_format):
        for m in (1, 3, 67):
            data = blocks_of(block_format, m, k, rng)
            weights = oracle(block_format, data, m, k).astype(np.float64)
            with Area(gpu, data) as address:
                for n in (*range(1, 10), 33):
                    x = rng.standard_normal((n, k)).astype(np.float32)
                    y = multiply(gpu, block_format, address, m, k, x, int8, gpu.stream)
                    expected = x.astype(np.float64) @ weights.T
                    # For a single product the errors have nothing to average with: measure them against what the
                    # terms, not their sum, amount to.
                    energy = max((expected**2).sum(), ((x.astype(np.float64) ** 2) @ (weights.T**2)).sum())
                    assert ((y - expected) ** 2).sum() <= TOLERANCE[int8] * energy, f"{m} x {k}, n = {n}"


@formats
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
@pytest.mark.parametrize("shift", [2, 8, 32], ids=lambda shift: f"at {shift} past 256")
def test_neighbours_do_not_matter(
    gpu: Device, block_format: Format, int8: bool, shift: int, rng: np.random.Generator
) -> None:
    int8 = int8 and not block_format.plain
    k = depths(block_format)[1]
    if shift % min(4, block_format.alignment):
        shift = 8
    for m in (1, 3, 5):
        data = blocks_of(block_format, m, k, rng)
        x = rng.standard_normal((3, k)).astype(np.float32)
        with Area(gpu, data) as address:
            alone = multiply(gpu, block_format, address, m, k, x, int8, gpu.stream)
            weights = direct.dequantize_host(gpu, block_format, address, m, k, gpu.stream)
        with Area(gpu, data, before=256 + shift, after=4096) as address:
            among = multiply(gpu, block_format, address, m, k, x, int8, gpu.stream)
            weights_among = direct.dequantize_host(gpu, block_format, address, m, k, gpu.stream)
        assert not np.isnan(alone).any()
        np.testing.assert_array_equal(alone, among)
        np.testing.assert_array_equal(weights.view(np.uint32), weights_among.view(np.uint32))


# m, n and k of ggml's own tests of MUL_MAT (tests/test-backend-ops.cpp), those that are no batches.
GGML_SHAPES = [
    *[(16, n, 256) for n in (*range(1, 10), 16)],
    *[(16, n, 1024) for n in (1, 8, 16)],
    *[(64, 2, 128), (83, 2, 128), (64, 45, 128), (128, 45, 64), (64, 77, 77), (576, 512, 576)],
    *[(1056, 1, 193), (1056, 67, 193)],
]


@formats
def test_shapes_that_ggml_tests(gpu: Device, block_format: Format, rng: np.random.Generator) -> None:
    """Beside poison. Where a row would not be whole blocks, it is filled up to such."""
    int8 = not block_format.plain
    for m, n, k in GGML_SHAPES:
        k = -(-k // block_format.block_weights) * block_format.block_weights if int8 else k
        data = blocks_of(block_format, m, k, rng)
        x = rng.standard_normal((n, k)).astype(np.float32)
        weights = oracle(block_format, data, m, k).astype(np.float64)
        with Area(gpu, data, before=256, after=4096) as address:
            y = multiply(gpu, block_format, address, m, k, x, int8, gpu.stream)
        expected = x.astype(np.float64) @ weights.T
        energy = max((expected**2).sum(), ((x.astype(np.float64) ** 2) @ (weights.T**2)).sum())
        assert ((y - expected) ** 2).sum() <= TOLERANCE[int8] * energy, f"{m} x {k}, n = {n}"


@formats
def test_any_byte_alignment(gpu: Device, block_format: Format, rng: np.random.Generator) -> None:
    m, k = 5, depths(block_format)[1]
    data = blocks_of(block_format, m, k, rng)
    expected = oracle(block_format, data, m, k)
    for shift in (1, 2, 3, 4, 6, 8, 13):
        with Area(gpu, data, before=shift) as address:
            got = direct.dequantize_host(gpu, block_format, address, m, k, gpu.stream)
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), f"{shift} past 256")


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
def test_what_is_not_finite_is_not_lost(gpu: Device, int8: bool, rng: np.random.Generator) -> None:
    block_format = FORMATS["Q4_K"]
    data = blocks_of(block_format, 5, 512, rng)
    x = rng.standard_normal((4, 512)).astype(np.float32)
    x[1, 300] = np.nan
    x[2, 7] = np.inf
    with Area(gpu, data) as address:
        y = multiply(gpu, block_format, address, 5, 512, x, int8, gpu.stream)
        clean = multiply(gpu, block_format, address, 5, 512, x[[0, 3]], int8, gpu.stream)
    assert not np.isfinite(y[1:3]).any()
    np.testing.assert_array_equal(y[[0, 3]], clean)


SIZES = np.array([3.4e38, 1e37, 1e30, 1e6, 1e-6, 1e-30, 1e-36, 2e-38, 1e-40, 1e-42], np.float32)
"""Of activations: where sums of a block would overflow as float32, where a block's scale is subnormal, and between."""


@formats
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
def test_activations_may_be_of_any_size(
    gpu: Device, block_format: Format, int8: bool, rng: np.random.Generator
) -> None:
    int8 = int8 and not block_format.plain
    sizes = SIZES if int8 else SIZES[SIZES > 2.0**-126]  # smaller ones are rounded to multiples of 2**-136
    m, k = 5, depths(block_format)[1]
    data = np.frombuffer(small_blocks(block_format.name, (m, k), rng), np.uint8)
    weights = oracle(block_format, data, m, k).astype(np.float64)
    x = rng.uniform(-1, 1, (len(sizes), k)).astype(np.float32) * sizes[:, None]
    with Area(gpu, data) as address:
        together = multiply(gpu, block_format, address, m, k, x, int8, gpu.stream)
        alone = [multiply(gpu, block_format, address, m, k, x[i : i + 1], int8, gpu.stream) for i in range(len(x))]
    wide = x.astype(np.float64)
    bound = (np.sqrt(TOLERANCE[int8] * (wide**2 @ (weights.T**2))) + k * 2.0**-150) ** 2
    for y in (together, np.concatenate(alone)):
        error = (y - wide @ weights.T) ** 2
        assert np.all(error <= bound), error / bound


def test_float16_activations_are_what_the_formula_says(gpu: Device, rng: np.random.Generator) -> None:
    # The product with the identity in F32 gives the rounded activations back.
    k = 64
    x = (rng.standard_normal((3, k)) * 1e5).astype(np.float32)
    blocks = x.reshape(3, -1, 32)
    scale = 2.0 ** np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True)))
    expected = ((blocks / scale).astype(np.float16).astype(np.float32) * scale).reshape(3, k)
    with Area(gpu, np.eye(k, dtype=np.float32)) as address:
        y = multiply(gpu, FORMATS["F32"], address, k, k, x, False, gpu.stream)
    np.testing.assert_array_equal(y, expected.astype(np.float32))


def test_int8_activations_are_what_the_formula_says(gpu: Device, rng: np.random.Generator) -> None:
    # The same with the identity in Q8_0: a one for each weight of the diagonal, scale 1.
    k = 64
    identity = np.zeros((k, k // 32), np.dtype([("d", np.float16), ("qs", np.int8, 32)]))
    identity["d"] = 1
    for i in range(k):
        identity["qs"][i, i // 32, i % 32] = 1
    x = rng.standard_normal((3, k)).astype(np.float32)
    blocks = x.reshape(3, -1, 32)
    d = np.abs(blocks).max(-1, keepdims=True) * np.float32(1 / 127)
    q = np.rint(blocks.astype(np.float64) * (np.float32(1) / d))  # the product is not rounded before it is
    expected = (q.astype(np.float32) * d).reshape(3, k)
    with Area(gpu, identity) as address:
        y = multiply(gpu, FORMATS["Q8_0"], address, k, k, x, True, gpu.stream)
    np.testing.assert_array_equal(y, expected)


def test_views_of_any_strides(gpu: Device, rng: np.random.Generator) -> None:
    block_format = FORMATS["Q5_0"]
    m, k = 7, 96
    data = blocks_of(block_format, m, k, rng)
    memory = rng.standard_normal((3, 4, 2 * k)).astype(np.float32)
    x = memory[:, ::2, ::2]
    outputs = np.zeros((3, 2, 2 * m), np.float32)
    with Area(gpu, data) as address, Area(gpu, memory) as source, Area(gpu, outputs) as target:
        expected = multiply(gpu, block_format, address, m, k, np.ascontiguousarray(x).reshape(6, k), True, gpu.stream)
        source_view = View(x.shape, x.strides, "float32", source, 0)
        spaced = outputs[..., ::2]
        target_view = View(spaced.shape, spaced.strides, "float32", target, 0)
        direct.matmul(gpu, block_format, address, m, k, source_view, target_view, True, gpu.stream)
        gpu.copy(outputs.ctypes.data, target, outputs.nbytes, gpu.stream)
        gpu.synchronize(gpu.stream)
    np.testing.assert_array_equal(outputs[..., ::2].reshape(6, m), expected)
    assert (outputs[..., 1::2] == 0).all()


def test_a_kernel_reads_bytes_where_they_lie(gpu: Device) -> None:
    data = np.arange(1000, dtype=np.uint16)
    with Area(gpu, data) as address:
        assert direct.read_bytes(gpu, address, data.nbytes, gpu.stream) == data.tobytes()


@pytest.mark.parametrize("in_flight", [1, 8])
@pytest.mark.parametrize("nbytes", [0, 15, 16, 4096, 100_000, (1 << 22) + 16 + 7])
def test_the_checksum_takes_in_each_piece(gpu: Device, nbytes: int, in_flight: int, rng: np.random.Generator) -> None:
    data = np.frombuffer(rng.bytes(nbytes), np.uint8)
    ctas = 7
    sums = np.empty(ctas * 32 * WARPS, np.uint32)
    with Area(gpu, data, after=64) as address, Area(gpu, sums) as target:
        prepared = gpu.prepare(plan_checksum(nbytes, ctas, in_flight), "a test")
        gpu.queue(prepared, address, 0, target, gpu.stream)
        gpu.copy(sums.ctypes.data, target, sums.nbytes, gpu.stream)
        gpu.synchronize(gpu.stream)
    words = data[: nbytes // 16 * 16].view(np.uint32)
    assert np.bitwise_xor.reduce(sums) == np.bitwise_xor.reduce(words, initial=np.uint32(0))
