"""Whose memory it is while a stream still works: that of results, of `out`, and of activations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from busy import checked, keep_busy, stream_of_its_own, synchronize
from cuda.bindings import runtime

import qmm

N, K, M = 64, 4096, 8192
BUSY = (0.0, 0.3)
"""Seconds. The first round loads the libraries' own kernels, for which they wait."""


class Torch:
    """How a library makes and reads arrays on the device, on its current stream, which is the default one."""

    name = "torch"

    def __init__(self) -> None:
        self.library = pytest.importorskip(self.name)

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        return self.library.full(shape, value, dtype=self.library.float32, device="cuda")

    def array(self, values: np.ndarray) -> Any:
        return self.library.from_numpy(values).cuda()

    def host(self, array: Any) -> np.ndarray:
        return array.cpu().numpy()

    def close(self) -> None:
        pass


class CuPy(Torch):
    name = "cupy"

    def full(self, shape: tuple[int, ...], value: float) -> Any:
        return self.library.full(shape, value, self.library.float32)

    def array(self, values: np.ndarray) -> Any:
        return self.library.asarray(values)

    def host(self, array: Any) -> np.ndarray:
        return self.library.asnumpy(array)


class CuPyAsync(CuPy):
    """CuPy with CUDA's own pool, which reuses memory in the order of streams."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.library.cuda.get_allocator()
        self.library.cuda.set_allocator(self.library.cuda.MemoryAsyncPool().malloc)

    def close(self) -> None:
        self.library.cuda.set_allocator(self.before)


@pytest.fixture(params=[Torch, CuPy, CuPyAsync], ids=lambda made: made.__name__)
def library(request: pytest.FixtureRequest) -> Iterator[Torch]:
    library = request.param()
    yield library
    synchronize()
    gc.collect()
    library.close()


Product = Callable[..., Any]
PRODUCTS: dict[str, Product] = {
    "matmul": lambda engine, x, stream, out=None: engine.matmul("w", x, out, stream),
    "matmul_each": lambda engine, x, stream, out=None: engine.matmul_each(
        ["w"], x, None if out is None else [out], stream
    )[0],
}


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest) -> Product:
    return PRODUCTS[request.param]


@pytest.fixture
def stream() -> Iterator[int]:
    """A stream on which no library works."""
    with stream_of_its_own() as stream:
        yield stream


@pytest.fixture
def values(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((N, K), np.float32)


@pytest.fixture
def right(engine: qmm.Engine, values: np.ndarray) -> np.ndarray:
    return engine.matmul("w", values)


def test_a_result_is_not_written_to_by_who_had_its_memory_before(
    engine: qmm.Engine, library: Torch, product: Product, stream: int, values: np.ndarray, right: np.ndarray
) -> None:
    x = library.array(values)
    synchronize()
    for seconds in BUSY:
        keep_busy(0, seconds)
        before = library.full((N, M), 7)  # queued
        del before  # which the library may give to others on the same stream now
        y = product(engine, x, stream)
        synchronize()
        np.testing.assert_array_equal(library.host(y), right)
        del y


def test_a_result_is_right_as_soon_as_its_stream_is_done(
    engine: qmm.Engine, library: Torch, product: Product, stream: int, values: np.ndarray, right: np.ndarray
) -> None:
    """That of the call, not the one that the library uses now."""
    x, then = library.array(values), np.empty_like(right)
    synchronize()
    for seconds in BUSY:
        keep_busy(0, seconds)
        before = library.full((N, M), 7)
        del before
        y = product(engine, x, stream)
        address = y.__cuda_array_interface__["data"][0]
        to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(runtime.cudaMemcpyAsync(then.ctypes.data, address, then.nbytes, to_host, stream))
        checked(runtime.cudaStreamSynchronize(stream))
        np.testing.assert_array_equal(then, right)
        del y


def test_a_result_that_is_dropped_early_is_written_to_nobody_else(
    engine: qmm.Engine, library: Torch, product: Product, stream: int, values: np.ndarray
) -> None:
    x = library.array(values)
    synchronize()
    for seconds in BUSY:
        keep_busy(stream, seconds)
        y = product(engine, x, stream)
        del y
        other = library.full((N, M), 1)
        synchronize()
        assert (library.host(other) == 1).all()
        del other


def test_an_out_that_is_dropped_early_is_written_to_nobody_else(
    engine: qmm.Engine, library: Torch, product: Product, stream: int, values: np.ndarray
) -> None:
    x = library.array(values)
    for seconds in BUSY:
        out = library.full((N, M), 0)
        synchronize()
        keep_busy(stream, seconds)
        product(engine, x, stream, out)
        del out
        other = library.full((N, M), 1)
        synchronize()
        assert (library.host(other) == 1).all()
        del other


def test_activations_that_are_dropped_early_are_read_as_they_were(
    engine: qmm.Engine, library: Torch, product: Product, stream: int, values: np.ndarray, right: np.ndarray
) -> None:
    out = library.full((N, M), 0)
    for seconds in BUSY:
        x = library.array(values)
        synchronize()
        keep_busy(stream, seconds)
        product(engine, x, stream, out)
        del x
        other = library.full((N, K), 0)
        synchronize()
        np.testing.assert_array_equal(library.host(out), right)
        del other


def test_what_torch_fills_for_determinism_comes_before_the_result(
    engine: qmm.Engine, torch: Any, product: Product, stream: int, values: np.ndarray, right: np.ndarray
) -> None:
    x = torch.from_numpy(values).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        for seconds in BUSY:
            synchronize()
            keep_busy(0, seconds)
            y = product(engine, x, stream)
            synchronize()
            np.testing.assert_array_equal(y.cpu().numpy(), right)
    finally:
        torch.use_deterministic_algorithms(False)
