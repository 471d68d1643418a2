"""The CUDA kernels' own source, run lane by lane on the CPU, in memory that refuses what lies outside a tensor.

What runs is what Numba gets to compile, with the meanings of operations in place of PTX; what the emulator refuses,
:mod:`qmm.kernels.lang.targets.emulator` says.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulated_device import EmulatedGPU, dequantized, expected_reads, run_dequantization, run_product
from gguf_files import random_blocks, small_blocks

from qmm.arrays import View
from qmm.device import NOTHING
from qmm.kernels.formats import FORMATS
from qmm.kernels.lang.targets.emulator import EmulatorError, Settings
from qmm.kernels.ops.matvec.plan import WARPS, Machine, Tiling
from qmm.kernels.runtime import launch

HOPPER = Machine(2, 232448, True)
AMPERE = Machine(2, 166912, False)


def test_aligned_rows_are_read_exactly_once() -> None:
    for machine in (HOPPER, AMPERE):
        outcome = run_product("Q4_K", 37, 512, 3, machine=machine)
        assert set(outcome.reads) == {1}


@pytest.mark.parametrize("machine", [HOPPER, AMPERE], ids=["bulk", "by 16"])
@pytest.mark.parametrize(("name", "k", "shift"), [("F16", 3, 4), ("BF16", 5, 10), ("F32", 1, 12), ("Q4_0", 32, 15)])
def test_tensors_of_a_few_bytes(name: str, k: int, shift: int, machine: Machine) -> None:
    run_product(name, 1, k, 1, machine=machine, shift=shift)
    run_dequantization(name, 1, k, machine=machine, shift=shift)


@pytest.mark.parametrize("machine", [HOPPER, AMPERE], ids=["bulk", "by 16"])
def test_tensors_that_start_and_end_anywhere(machine: Machine) -> None:
    for shift in range(16):
        run_dequantization("Q4_0", 1, 32, machine=machine, shift=shift)
        run_dequantization("Q8_0", 3, 32, machine=machine, shift=shift)


def test_expected_reads_by_hand() -> None:
    # Rows of 34 bytes from byte 2 of 16 on: 2..36, 36..70. The 16 bytes from 32 on are read for both.
    tiling = Tiling.of(FORMATS["Q8_0"], 2, 1 << 17)
    reads = expected_reads(FORMATS["Q8_0"], tiling, 256 + 2, 2, 32)
    assert reads.tolist() == [1] * 30 + [2] * 16 + [1] * 22


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_in_and_out(dtype: str) -> None:
    for int8 in (True, False):
        run_product("Q5_1", 20, 96, 3, dtype=dtype, int8=int8)


@pytest.mark.parametrize(
    ("mapped", "most"), [(False, 1 << 20), (False, 2000), (True, 1 << 20)], ids=["all", "some", "mapped"]
)
def test_what_comes_next_is_brought_in_and_nothing_else(mapped: bool, most: int, rng: np.random.Generator) -> None:
    require_what_comes_next(mapped, most, rng)


def require_what_comes_next(mapped: bool, most: int, rng: np.random.Generator, mask: str | None = None) -> None:
    sizes = [("Q8_0", 37, 96, 1), ("Q4_K", 20, 512, 8), ("Q6_K", 3, 256, 12), ("Q5_0", 51, 32, 2)]
    settings = Settings(faults=frozenset() if mask is None else frozenset({mask}))
    with EmulatedGPU(HOPPER, settings, mapped) as gpu:
        gpu._next_nbytes = most
        weights, products, expected = [], [], []
        for i, (name, m, k, n) in enumerate(sizes):
            weight = gpu.add(name, random_blocks(name, (m, k), rng), constant=True, shift=(0, 2, 6, 16)[i])
            x = rng.standard_normal((n, k)).astype(np.float32)
            source, target = gpu.add("x", x.tobytes()), gpu.add("y", 4 * n * m)
            expected.append(gpu.matmul_host(FORMATS[name], weight.start, m, k, x, True, 0))
            x_view = View((n, k), (4 * k, 4), "float32", source.start, 0)
            y_view = View((n, m), (4 * m, 4), "float32", target.start, 0)
            weights.append(weight)
            products.append((gpu.prepare(FORMATS[name], weight.start, m, k, x_view, y_view, True), x_view, y_view))
        scratch = gpu.allocate(max(product.scratch_nbytes for product, _, _ in products), "scratch")
        gpu.sequence([(product, x.address, y.address) for product, x, y in products], 0, scratch)
        for (_, _, y), values in zip(products, expected, strict=True):
            got = np.frombuffer(gpu.memory.find(y.address, 4).data, np.float32)
            np.testing.assert_array_equal(got, values.ravel())
    assert not any(weights[0].prefetched)
    for weight, (name, m, k, _), (product, _, _) in zip(weights[1:], sizes[1:], products[1:], strict=True):
        row_nbytes = FORMATS[name].row_nbytes(k)
        start, pitch, count, nbytes = product.opening
        if mapped:
            assert product.opening == NOTHING
        else:
            assert (start, pitch % row_nbytes) == (weight.start, 0)
        assert count * pitch <= m * row_nbytes
        assert nbytes == pitch or nbytes < row_nbytes
        assert count * nbytes <= most
        brought = bytearray(len(weight.data))
        for i in range(count):
            first, last = -(-(start + i * pitch) // 16), (start + i * pitch + nbytes) // 16
            brought[16 * first - weight.start : 16 * last - weight.start] = b"\1" * (16 * (last - first))
        assert any(brought) or mapped
        assert weight.prefetched == brought


def weights_of(gpu: EmulatedGPU, name: str, m: int, k: int, rng: np.random.Generator) -> int:
    data = random_blocks(name, (m, k), rng)
    return gpu.add("weights", data, constant=True, shift=2).start


def test_views_of_any_strides(rng: np.random.Generator) -> None:
    m, k = 7, 96
    memory = rng.standard_normal((3, 4, 2 * k)).astype(np.float32)
    x = memory[:, ::2, ::2]
    spaced = np.zeros((3, 2, 2 * m), np.float32)[..., ::2]
    with EmulatedGPU(HOPPER) as gpu:
        weights = weights_of(gpu, "Q5_0", m, k, rng)
        source = gpu.add("x", memory.tobytes())
        target = gpu.add("y", bytes(2 * 4 * 6 * m))
        expected = gpu.matmul_host(FORMATS["Q5_0"], weights, m, k, np.ascontiguousarray(x).reshape(6, k), True, 0)
        x_view = View(x.shape, x.strides, "float32", source.start, 0)
        y_view = View(spaced.shape, spaced.strides, "float32", target.start, 0)
        gpu.matmul(FORMATS["Q5_0"], weights, m, k, x_view, y_view, True, 0)
    outputs = np.frombuffer(target.data, np.float32).reshape(6, 2 * m)
    np.testing.assert_array_equal(outputs[:, ::2], expected)
    assert (outputs[:, 1::2] == 0).all()


@pytest.mark.parametrize("k", [37, 40])
def test_rows_of_any_length_that_begin_at_multiples_of_16(k: int, rng: np.random.Generator) -> None:
    m, spaced = 7, np.full((2, 44), np.nan, np.float32)
    x = spaced[:, :k] = rng.standard_normal((2, k)).astype(np.float32)
    with EmulatedGPU(HOPPER) as gpu:
        weights = weights_of(gpu, "F16", m, k, rng)
        source = gpu.add("x", spaced.tobytes()[: 4 * (44 + k)])
        target = gpu.add("y", bytes(4 * 2 * m))
        expected = gpu.matmul_host(FORMATS["F16"], weights, m, k, x, False, 0)
        x_view = View((2, k), (4 * 44, 4), "float32", source.start, 0)
        gpu.matmul(
            FORMATS["F16"], weights, m, k, x_view, View((2, m), (4 * m, 4), "float32", target.start, 0), False, 0
        )
    np.testing.assert_array_equal(np.frombuffer(target.data, np.float32).reshape(2, m), expected)


@pytest.mark.parametrize("name", ["Q8_0", "BF16"])
def test_results_may_take_the_place_of_the_activations(name: str, rng: np.random.Generator) -> None:
    size = 96
    int8 = not FORMATS[name].plain
    x = rng.standard_normal((1, size)).astype(np.float32)
    with EmulatedGPU(HOPPER) as gpu:
        weights = weights_of(gpu, name, size, size, rng)
        expected = gpu.matmul_host(FORMATS[name], weights, size, size, x, int8, 0)
        both = gpu.add("x, then y", x.tobytes())
        view = View((1, size), (4 * size, 4), "float32", both.start, 0)
        assert gpu.prepare(FORMATS[name], weights, size, size, view, view, int8).meet(both.start, both.start)
        gpu.matmul(FORMATS[name], weights, size, size, view, view, int8, 0)
    np.testing.assert_array_equal(np.frombuffer(both.data, np.float32), expected[0])


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
    with EmulatedGPU(HOPPER) as gpu:
        weights = gpu.add("weights", data, constant=True, shift=2)
        source, target = gpu.add("x", x.tobytes(), shift=x_shift), gpu.add("y", 4 * len(x) * m)
        x_view = View(x.shape, (4 * k, 4), "float32", source.start, 0)
        y_view = View((len(x), m), (4 * m, 4), "float32", target.start, 0)
        gpu.matmul(FORMATS[name], weights.start, m, k, x_view, y_view, int8, 0)
    y = np.frombuffer(target.data, np.float32).reshape(len(x), m)
    terms = (x.astype(np.float64) ** 2) @ (matrix.T**2)
    error = (y - x.astype(np.float64) @ matrix.T) ** 2
    rounding = k * 2.0**-150  # of sums that are subnormal numbers
    assert np.all(error <= (np.sqrt((5e-4 if int8 else 1e-6) * terms) + rounding) ** 2), error / terms


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "f16"])
def test_what_is_not_finite_is_not_lost(int8: bool, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 512)).astype(np.float32)
    x[1, 300] = np.nan
    x[2, 7] = np.inf
    with EmulatedGPU(HOPPER) as gpu:
        weights = weights_of(gpu, "Q4_K", 5, 512, rng)
        y = gpu.matmul_host(FORMATS["Q4_K"], weights, 5, 512, x, int8, 0)
        clean = gpu.matmul_host(FORMATS["Q4_K"], weights, 5, 512, x[[0, 3]], int8, 0)
    assert not np.isfinite(y[1:3]).any()
    np.testing.assert_allclose(y[[0, 3]], clean, rtol=1e-5)


def test_bytes_are_read_where_they_lie(rng: np.random.Generator) -> None:
    data = rng.bytes(2000)
    with EmulatedGPU(HOPPER) as gpu:
        source = gpu.add("file", data, constant=True, shift=3)
        assert gpu.read_bytes(source.start, len(data), 0) == data
    assert set(source.reads) == {1}


@pytest.mark.parametrize("nbytes", [0, 15, 16, 100_000])
def test_the_checksum_takes_in_each_piece(nbytes: int, rng: np.random.Generator) -> None:
    data = np.frombuffer(rng.bytes(nbytes), np.uint8)
    with EmulatedGPU(HOPPER) as gpu:
        source = gpu.add("file", data.tobytes(), constant=True)
        target = gpu.add("sums", 3 * 32 * WARPS * 4)
        launch.checksum_kernel(8).launch(0, 3, 0, source.start, nbytes, target.start)
    whole = nbytes // 16 * 16
    assert set(source.reads[:whole]) <= {1}
    assert not source.reads[whole:].any()
    sums = np.frombuffer(target.data, np.uint32)
    assert np.bitwise_xor.reduce(sums) == np.bitwise_xor.reduce(data[:whole].view(np.uint32), initial=np.uint32(0))


# ---------------------------------------------------------------------------------------------------------------------
# What would not go unnoticed: the machine made faulty on purpose
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [HOPPER, AMPERE], ids=["bulk", "by 16"])
def test_a_product_that_waits_for_no_barrier_is_found(machine: Machine) -> None:
    machine = replace(machine, multiprocessors=1)
    settings = Settings(faults=frozenset({"waits"}))
    with pytest.raises(EmulatorError, match=r"target of a copy under way|nobody has written"):
        run_product("Q8_0", 70, 2144, 1, machine=machine, shift=2, settings=settings)


def test_activations_read_too_early_are_found() -> None:
    settings = Settings(faults=frozenset({"predecessors"}))
    for x_shift in (0, 4):  # by the product, and by the kernel that quantizes
        with pytest.raises(EmulatorError, match="before it waits for the kernels that may write it"):
            run_product("Q8_0", 5, 64, 1, x_shift=x_shift, settings=settings)


def test_a_dequantization_that_does_not_wait_is_found() -> None:
    with pytest.raises(EmulatorError, match="copy under way"):
        run_dequantization("Q6_K", 5, 512, shift=2, settings=Settings(faults=frozenset({"waits"})))


@pytest.mark.parametrize("mask", ["brought, before", "brought, after"])
def test_bytes_of_others_that_are_brought_in_are_found(mask: str, rng: np.random.Generator) -> None:
    with pytest.raises(EmulatorError, match=r"bytes at 0x1000000000b.* are not within any of"):
        require_what_comes_next(False, 1 << 20, rng, mask)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_without_weights_give_zeros_wherever_results_go(dtype: str) -> None:
    spaced = np.zeros((2, 3, 10), dtype)[..., ::2]
    with EmulatedGPU(HOPPER) as gpu:
        target = gpu.add("y", b"\xff" * 60 * spaced.itemsize)
        x_view = View((2, 3, 0), (0, 0, 4), "float32", 0, 0)
        y_view = View(spaced.shape, spaced.strides, dtype, target.start, 0)
        gpu.matmul(FORMATS["Q8_0"], 0, 5, 0, x_view, y_view, True, 0)
    results = np.frombuffer(target.data, dtype).reshape(6, 10)
    assert (results[:, ::2] == 0).all()
    assert np.isnan(results[:, 1::2]).all()
