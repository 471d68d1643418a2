"""The ctypes side of the comparison with ggml, on ggml's CPU backend: the same code as on a GPU but for the backend."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import FORMATS, random_blocks

from benchmarks.support import ggml_gpu


@pytest.fixture(scope="module")
def backend() -> Iterator[ggml_gpu.Backend]:
    import libggml

    made = ggml_gpu.Backend(Path(libggml.__file__).parent / "lib64", "cpu")
    yield made
    made.close()


@pytest.mark.parametrize(("name", "n"), [("Q8_0", 1), ("Q4_K", 3)])
def test_products_are_those_of_the_dequantized_weights(
    backend: ggml_gpu.Backend, name: str, n: int, rng: np.random.Generator
) -> None:
    m, k, copies, count = 7, 512, 3, 8
    data = np.frombuffer(random_blocks(name, (m, k), rng), np.uint8)
    x = rng.standard_normal((n, k), dtype=np.float32)
    filled: list[int] = []

    def fill(address: int) -> None:
        ctypes.memmove(address, data.ctypes.data, data.nbytes)
        filled.append(address)

    weights = ggml_gpu.Weights(backend, FORMATS[name].number, m, k, copies, fill)
    product = ggml_gpu.Product(weights, x, count, graph_products=3)
    try:
        assert (weights.nbytes, len(set(filled))) == (data.nbytes, copies)
        product.warm_up()
        expected = x.astype(np.float64) @ gguf.dequantize(data.reshape(m, -1), FORMATS[name].number).reshape(m, k).T
        for i in range(count):
            y = product.result(i)
            assert y.shape == (n, m)
            assert np.sum((y - expected) ** 2) <= 5e-4 * np.sum(expected**2)
        assert not product.replayed()  # the CPU backend has no CUDA graphs, and the log says nothing of them
    finally:
        product.close()
        weights.close()


def test_each_product_reads_a_copy_of_its_own(backend: ggml_gpu.Backend, rng: np.random.Generator) -> None:
    scales = iter([1.0, 2.0, 4.0])
    values = rng.standard_normal((2, 32), dtype=np.float32)

    def fill(address: int) -> None:
        scaled = values * np.float32(next(scales))
        ctypes.memmove(address, scaled.ctypes.data, scaled.nbytes)

    weights = ggml_gpu.Weights(backend, FORMATS["F32"].number, 2, 32, 3, fill)
    product = ggml_gpu.Product(weights, np.ones((1, 32), np.float32), 5)
    try:
        product.queue()
        product.wait()
        sums = [product.result(i)[0, 0] / product.result(0)[0, 0] for i in range(5)]
        np.testing.assert_allclose(sums, [1, 2, 4, 1, 2], rtol=1e-6)
    finally:
        product.close()
        weights.close()


def test_the_log_tells_whether_a_graph_is_replayed(backend: ggml_gpu.Backend) -> None:
    weights = ggml_gpu.Weights(backend, FORMATS["F32"].number, 1, 32, 1, lambda _: None)
    product = ggml_gpu.Product(weights, np.ones((1, 32), np.float32), 4, graph_products=2)
    captured, reset = f"graph_compute: {ggml_gpu.CAPTURED}\n", "graph_compute: CUDA graph warmup reset\n"
    try:
        for before, after, replayed in (
            ([], [], False),
            ([captured], [], False),  # one graph of two
            ([captured, captured], [], True),
            ([reset, captured, captured], [], True),  # the step back was from an older graph at the same address
            ([captured, captured], [reset], False),
            ([captured, captured], [captured], False),
            ([captured, captured], ["something else\n"], True),
        ):
            product._log_start = len(backend.log)
            backend.log.extend(before)
            product._log_warm = len(backend.log)
            backend.log.extend(after)
            assert product.replayed() == replayed, (before, after)
    finally:
        product.close()
        weights.close()


def test_folders_without_the_cuda_library_count_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ggml_gpu.VARIABLE, str(tmp_path))
    (tmp_path / "libggml-base.so").touch()
    (tmp_path / "libggml-cuda.so.0.xz").touch()
    assert ggml_gpu.find() is None
    assert str(tmp_path) in str(ggml_gpu.missing())
    (tmp_path / "libggml-cuda.so").touch()
    assert ggml_gpu.find() == tmp_path
    assert "cannot be used" in str(ggml_gpu.missing())  # empty files


def test_another_ggml_in_the_process_is_refused(backend: ggml_gpu.Backend, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is loaded already"):
        ggml_gpu.load(tmp_path, "cpu")
    assert ggml_gpu.load(backend.ggml.folder, "cpu") is backend.ggml
