"""The CUDA kernels' own source, run by the emulator, in memory that refuses what lies outside a tensor.

What runs is what Numba gets to compile, with the meanings of operations in place of PTX; what the emulator refuses,
:mod:`qmm.kernels.lang.targets.emulator` says.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulated_device import AMPERE, HOPPER, EmulatedDevice
from emulated_products import dequantized, expected_reads, run_dequantization, run_product
from gguf_files import random_blocks, small_blocks

from qmm import direct
from qmm.arrays import View
from qmm.kernels.formats import FORMATS
from qmm.kernels.lang.targets.emulator import EmulatorError, Region, Settings
from qmm.kernels.ops.layout import WARPS
from qmm.kernels.ops.matvec import naive
from qmm.kernels.ops.matvec.plan import NEXT_OF_L2, NOTHING, Product, plan
from qmm.kernels.ops.op import Architecture, WeightLayout
from qmm.kernels.ops.read import plan_checksum
from qmm.kernels.ops.tiling import Tiling
from qmm.sequence import Step, queue_sequence


def test_aligned_rows_are_read_exactly_once() -> None:
    for architecture in (HOPPER, AMPERE):
        outcome = run_product("Q4_K", 37, 512, 3, architecture=architecture)
        assert set(outcome.reads) == {1}


@pytest.mark.parametrize("architecture", [HOPPER, AMPERE], ids=["bulk", "by 16"])
@pytest.mark.parametrize(("name", "k", "shift"), [("F16", 3, 4), ("BF16", 5, 10), ("F32", 1, 12), ("Q4_0", 32, 15)])
def test_tensors_of_a_few_bytes(name: str, k: int, shift: int, architecture: Architecture) -> None:
    run_product(name, 1, k, 1, architecture=architecture, shift=shift)
    run_dequantization(name, 1, k, architecture=architecture, shift=shift)


@pytest.mark.parametrize("architecture", [HOPPER, AMPERE], ids=["bulk", "by 16"])
def test_tensors_that_start_and_end_anywhere(architecture: Architecture) -> None:
    for shift in range(16):
        run_dequantization("Q4_0", 1, 32, architecture=architecture, shift=shift)
        run_dequantization("Q8_0", 3, 32, architecture=architecture, shift=shift)


def test_expected_reads_by_hand() -> None:
    # Rows of 34 bytes from byte 2 of 16 on: 2..36, 36..70. The 16 bytes from 32 on are read for both.
    tiling = Tiling.of(FORMATS["Q8_0"], 2, 1 << 17)
    reads = expected_reads(FORMATS["Q8_0"], tiling, 256 + 2, 2, 32)
    assert reads.tolist() == [1] * 30 + [2] * 16 + [1] * 22


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shift", [0, 6])
def test_the_naive_product_computes_the_same(name: str, shift: int, rng: np.random.Generator) -> None:
    m, k, n = 7, 2 * FORMATS[name].block_weights, 3
    y, weights, _ = run_naive(name, m, k, n, shift, rng)
    matrix = dequantized(FORMATS[name], bytes(weights.data), m, k).astype(np.float64)
    x = NAIVE_X[:n, :k].astype(np.float64)
    np.testing.assert_allclose(y, x @ matrix.T, rtol=0, atol=k * 2.0**-23 * (abs(x) @ abs(matrix).T).max())
    assert (weights.reads >= n).all()  # each column reads them again, and each lane what a block's lanes share


NAIVE_X = np.random.default_rng(5).standard_normal((3, 512)).astype(np.float32)


def run_naive(
    name: str, m: int, k: int, n: int, shift: int, rng: np.random.Generator, faults: frozenset[str] = frozenset()
) -> tuple[np.ndarray, Region, Region]:
    device = EmulatedDevice(settings=Settings(faults=faults))
    weights = device.add("weights", random_blocks(name, (m, k), rng), constant=True, shift=shift)
    source, target = device.add("x", NAIVE_X[:n, :k].tobytes(), constant=True), device.add("y", 4 * n * m)
    work = naive.plan(FORMATS[name], m, k, WeightLayout.at(weights.start), n)
    device.queue(device.prepare(work, "a product"), weights.start, source.start, target.start, 0)
    return target.array(np.float32).reshape(n, m), weights, source


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_in_and_out(dtype: str) -> None:
    for int8 in (True, False):
        run_product("Q5_1", 20, 96, 3, dtype=dtype, int8=int8)


@pytest.mark.parametrize(
    ("mapped", "most"), [(False, 1 << 20), (False, 2000), (True, 1 << 20)], ids=["all", "some", "mapped"]
)
def test_what_comes_next_is_prefetched_and_nothing_else(mapped: bool, most: int, rng: np.random.Generator) -> None:
    require_what_comes_next(mapped, most, rng)


def require_what_comes_next(mapped: bool, most: int, rng: np.random.Generator, mask: str | None = None) -> None:
    sizes = [("Q8_0", 37, 96, 1), ("Q4_K", 20, 256, 3), ("Q6_K", 3, 256, 9), ("Q5_0", 51, 32, 2)]
    architecture = replace(HOPPER, l2_nbytes=NEXT_OF_L2 * most)
    device = EmulatedDevice(architecture, Settings(faults=frozenset() if mask is None else frozenset({mask})))
    weights, activations, steps = [], [], []
    for i, (name, m, k, n) in enumerate(sizes):
        weight = device.add(name, random_blocks(name, (m, k), rng), constant=True, shift=(0, 2, 6, 16)[i])
        x = rng.standard_normal((n, k)).astype(np.float32)
        source, target = view_of(device.add("x", x.tobytes()), (n, k)), view_of(device.add("y", 4 * n * m), (n, m))
        layout = WeightLayout.at(weight.start, mapped)
        prepared = direct.prepare(device, FORMATS[name], layout, m, k, source, target, True)
        weights.append(weight)
        activations.append(x)
        steps.append(Step(prepared, weight.start, source.address, target.address))
    queue_sequence(device, steps, 0)
    assert not any(weights[0].prefetched)
    for weight, (name, m, k, _), step in zip(weights[1:], sizes[1:], steps[1:], strict=True):
        require_prefetched(weight, FORMATS[name].row_nbytes(k), m, step.product, mapped, most)
    for (name, m, _, _), weight, x, step in zip(sizes, weights, activations, steps, strict=True):
        alone = multiply(device, name, weight.start, m, x, True)
        np.testing.assert_array_equal(device.memory.find(step.y, 4).array(np.float32), alone.ravel())


@pytest.mark.parametrize(
    ("names", "k", "int8"),
    [
        (("Q4_K", "F32", "Q4_K"), 256, False),
        (("Q8_0", "BF16", "Q8_0"), 256, False),
        (("Q3_K", "Q5_K", "Q3_K"), 5120, True),
    ],
)
def test_activations_that_a_product_between_may_have_overwritten_are_not_shared(
    names: tuple[str, ...], k: int, int8: bool, rng: np.random.Generator
) -> None:
    """One that quantizes for itself has its partial results where the others have their activations."""
    device = EmulatedDevice(replace(HOPPER, shared_nbytes=232448))
    n, m, x = 2, 16, rng.standard_normal((2, k)).astype(np.float32)
    source = view_of(device.add("x", x.tobytes()), (n, k))
    steps, matrices, targets = [], [], []
    for name in names:
        data = random_blocks(name, (m, k), rng)
        weight, target = device.add(name, data, constant=True), device.add("y", bytes(4 * n * 2 * m))
        y = View((n, m), (8 * m, 4), "float32", target.start, 0)  # not dense
        case = int8 and not FORMATS[name].plain
        prepared = direct.prepare(device, FORMATS[name], WeightLayout.at(weight.start), m, k, source, y, case)
        steps.append(Step(prepared, weight.start, source.address, y.address))
        matrices.append(dequantized(FORMATS[name], data, m, k).astype(np.float64))
        targets.append(target)
    first, between, last = (step.product for step in steps)
    assert first.quantized == last.quantized is not None
    assert between.quantized is None
    assert between.workspace_nbytes
    queue_sequence(device, steps, 0)
    for matrix, target in zip(matrices, targets, strict=True):
        exact = x @ matrix.T
        results = target.array(np.float32).reshape(n, 2 * m)[:, :m]
        assert np.sum((results - exact) ** 2) < 5e-4 * np.sum(exact**2)


def require_prefetched(weight: Region, row_nbytes: int, m: int, product: Product, mapped: bool, most: int) -> None:
    """Of what is worth having in L2, what shares 16 bytes with nothing else was asked for."""
    pitch, count, nbytes = product.prefetch_region
    if mapped:
        assert product.prefetch_region == NOTHING
    else:
        assert pitch % row_nbytes == 0
    assert count * pitch <= m * row_nbytes
    assert nbytes == pitch or nbytes < row_nbytes
    assert count * nbytes <= most
    prefetched = bytearray(len(weight.data))
    for i in range(count):
        start = weight.start + i * pitch
        first, last = -(-start // 16), (start + nbytes) // 16
        prefetched[16 * first - weight.start : 16 * last - weight.start] = b"\1" * (16 * (last - first))
    assert any(prefetched) or mapped
    assert weight.prefetched == prefetched


def view_of(region: Region, shape: tuple[int, ...], strides: tuple[int, ...] = (), dtype: str = "float32") -> View:
    """An array at the beginning of a region, row-major if nothing else is said."""
    item = 4 if dtype == "float32" else 2
    return View(shape, strides or (item * shape[-1], item), dtype, region.start, 0)


def multiply(device: EmulatedDevice, name: str, weights: int, m: int, x: np.ndarray, int8: bool) -> np.ndarray:
    """``x[n, k] @ W^T`` of a plain array."""
    n, k = x.shape
    target = device.add("y", 4 * n * m)
    source = view_of(device.add("x", np.ascontiguousarray(x).tobytes()), (n, k))
    direct.matmul(device, FORMATS[name], weights, m, k, source, view_of(target, (n, m)), int8, 0)
    return target.array(np.float32).reshape(n, m)


def weights_of(device: EmulatedDevice, name: str, m: int, k: int, rng: np.random.Generator) -> int:
    data = random_blocks(name, (m, k), rng)
    return device.add("weights", data, constant=True, shift=2).start


def test_views_of_any_strides(rng: np.random.Generator) -> None:
    m, k = 7, 96
    memory = rng.standard_normal((3, 4, 2 * k)).astype(np.float32)
    x = memory[:, ::2, ::2]
    spaced = np.zeros((3, 2, 2 * m), np.float32)[..., ::2]
    device = EmulatedDevice()
    weights = weights_of(device, "Q5_0", m, k, rng)
    source = device.add("x", memory.tobytes())
    target = device.add("y", bytes(2 * 4 * 6 * m))
    expected = multiply(device, "Q5_0", weights, m, x.reshape(6, k), True)
    x_view, y_view = view_of(source, x.shape, x.strides), view_of(target, spaced.shape, spaced.strides)
    direct.matmul(device, FORMATS["Q5_0"], weights, m, k, x_view, y_view, True, 0)
    outputs = target.array(np.float32).reshape(6, 2 * m)
    np.testing.assert_array_equal(outputs[:, ::2], expected)
    assert (outputs[:, 1::2] == 0).all()


@pytest.mark.parametrize("k", [37, 40])
def test_rows_of_any_length_that_begin_at_multiples_of_16(k: int, rng: np.random.Generator) -> None:
    m, spaced = 7, np.full((2, 44), np.nan, np.float32)
    x = spaced[:, :k] = rng.standard_normal((2, k)).astype(np.float32)
    device = EmulatedDevice()
    weights = weights_of(device, "F16", m, k, rng)
    source = device.add("x", spaced.tobytes()[: 4 * (44 + k)])
    target = device.add("y", bytes(4 * 2 * m))
    expected = multiply(device, "F16", weights, m, x, False)
    x_view = view_of(source, (2, k), (4 * 44, 4))
    direct.matmul(device, FORMATS["F16"], weights, m, k, x_view, view_of(target, (2, m)), False, 0)
    np.testing.assert_array_equal(target.array(np.float32).reshape(2, m), expected)


@pytest.mark.parametrize("name", ["Q8_0", "BF16"])
def test_results_may_take_the_place_of_the_activations(name: str, rng: np.random.Generator) -> None:
    size = 96
    int8 = not FORMATS[name].plain
    x = rng.standard_normal((1, size)).astype(np.float32)
    device = EmulatedDevice()
    weights = weights_of(device, name, size, size, rng)
    expected = multiply(device, name, weights, size, x, int8)
    both = device.add("x, then y", x.tobytes())
    view = view_of(both, (1, size))
    product = plan(
        *(FORMATS[name], size, size, WeightLayout.at(weights)),
        *(view.operand(), view.operand(), int8, device.architecture),
    )
    assert product.overlaps(both.start, both.start)
    direct.matmul(device, FORMATS[name], weights, size, size, view, view, int8, 0)
    np.testing.assert_array_equal(both.array(np.float32), expected[0])


RANGE = np.array([[3.4e38], [1e37], [1e-36], [2e-38]], np.float32)
"""Sizes of activations: where sums of a block would overflow as float32, and where a block's scale is subnormal."""
SUBNORMAL = np.array([[1e-40], [1e-42]], np.float32)


@pytest.mark.parametrize(
    ("name", "int8"),
    [*((name, True) for name in ("Q8_0", "Q4_1", "Q2_K", "Q4_K")), ("F16", False), ("Q5_1", False)],
    ids=lambda value: {True: "int8", False: "f16"}.get(value, value),
)
@pytest.mark.parametrize("x_shift", [0, 4], ids=["quantized here", "quantized before"])
def test_activations_may_be_of_any_size(name: str, int8: bool, x_shift: int, rng: np.random.Generator) -> None:
    m, k = 3, 512
    x = rng.uniform(-1, 1, (4, k)).astype(np.float32) * RANGE
    if int8:
        x = np.concatenate([x, rng.uniform(-1, 1, (2, k)).astype(np.float32) * SUBNORMAL])
    data = small_blocks(name, (m, k), rng)
    matrix = dequantized(FORMATS[name], data, m, k).astype(np.float64)
    device = EmulatedDevice()
    weights = device.add("weights", data, constant=True, shift=2)
    source, target = device.add("x", x.tobytes(), shift=x_shift), device.add("y", 4 * len(x) * m)
    x_view, y_view = view_of(source, x.shape), view_of(target, (len(x), m))
    direct.matmul(device, FORMATS[name], weights.start, m, k, x_view, y_view, int8, 0)
    y = target.array(np.float32).reshape(len(x), m)
    terms = (x.astype(np.float64) ** 2) @ (matrix.T**2)
    error = (y - x.astype(np.float64) @ matrix.T) ** 2
    rounding = k * 2.0**-150  # of sums that are subnormal numbers
    assert np.all(error <= (np.sqrt((5e-4 if int8 else 1e-6) * terms) + rounding) ** 2), error / terms


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
def test_what_is_not_finite_is_not_lost(int8: bool, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 512)).astype(np.float32)
    x[1, 300] = np.nan
    x[2, 7] = np.inf
    device = EmulatedDevice()
    weights = weights_of(device, "Q4_K", 5, 512, rng)
    y = multiply(device, "Q4_K", weights, 5, x, int8)
    clean = multiply(device, "Q4_K", weights, 5, x[[0, 3]], int8)
    assert not np.isfinite(y[1:3]).any()
    np.testing.assert_allclose(y[[0, 3]], clean, rtol=1e-5)


def test_bytes_are_read_where_they_lie(rng: np.random.Generator) -> None:
    data = rng.bytes(2000)
    device = EmulatedDevice()
    source = device.add("file", data, constant=True, shift=3)
    assert direct.read_bytes(device, source.start, len(data), 0) == data
    assert set(source.reads) == {1}


@pytest.mark.parametrize("nbytes", [0, 15, 16, 100_000])
def test_the_checksum_takes_in_each_piece(nbytes: int, rng: np.random.Generator) -> None:
    data = np.frombuffer(rng.bytes(nbytes), np.uint8)
    device = EmulatedDevice()
    source = device.add("file", data.tobytes(), constant=True)
    target = device.add("sums", 3 * 32 * WARPS * 4)
    device.queue(device.prepare(plan_checksum(nbytes, 3, 8), "a checksum"), source.start, 0, target.start, 0)
    whole = nbytes // 16 * 16
    assert set(source.reads[:whole]) <= {1}
    assert not source.reads[whole:].any()
    sums = target.array(np.uint32)
    assert np.bitwise_xor.reduce(sums) == np.bitwise_xor.reduce(data[:whole].view(np.uint32), initial=np.uint32(0))


# ---------------------------------------------------------------------------------------------------------------------
# What would not go unnoticed: the machine made faulty on purpose
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [HOPPER, AMPERE], ids=["bulk", "by 16"])
def test_a_product_that_waits_for_no_barrier_is_found(architecture: Architecture) -> None:
    architecture = replace(architecture, sms=1)
    settings = Settings(faults=frozenset({"waits"}))
    with pytest.raises(EmulatorError, match=r"target of a copy in flight|nobody has written"):
        run_product("Q8_0", 70, 2144, 1, architecture=architecture, shift=2, settings=settings)


def test_activations_read_too_early_are_found() -> None:
    settings = Settings(faults=frozenset({"predecessors"}))
    for x_shift in (0, 4):  # by the product, and by the kernel that quantizes
        with pytest.raises(EmulatorError, match="before it waits for the kernels that may write it"):
            run_product("Q8_0", 5, 64, 1, x_shift=x_shift, settings=settings)


def test_a_dequantization_that_does_not_wait_is_found() -> None:
    with pytest.raises(EmulatorError, match="copy in flight"):
        run_dequantization("Q6_K", 5, 512, shift=2, settings=Settings(faults=frozenset({"waits"})))


def test_a_naive_product_without_its_mask_is_found(rng: np.random.Generator) -> None:
    with pytest.raises(EmulatorError, match="are not within any of"):
        run_naive("Q4_0", 5, 64, 2, 0, rng, frozenset({"results, naive"}))


@pytest.mark.parametrize("mask", ["prefetch, first piece", "prefetch, last piece"])
def test_prefetches_of_what_belongs_to_others_are_found(mask: str, rng: np.random.Generator) -> None:
    with pytest.raises(EmulatorError, match=r"bytes at 0x1\w+ are not within any of"):
        require_what_comes_next(False, 1 << 20, rng, mask)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_without_weights_give_zeros_wherever_results_go(dtype: str) -> None:
    spaced = np.zeros((2, 3, 10), dtype)[..., ::2]
    device = EmulatedDevice()
    target = device.add("y", b"\xff" * 60 * spaced.itemsize)
    x_view = View((2, 3, 0), (0, 0, 4), "float32", 0, 0)
    y_view = view_of(target, spaced.shape, spaced.strides, dtype)
    direct.matmul(device, FORMATS["Q8_0"], 0, 5, 0, x_view, y_view, True, 0)
    results = target.array(dtype).reshape(6, 10)
    assert (results[:, ::2] == 0).all()
    assert np.isnan(results[:, 1::2]).all()
