"""Files that change, move or vanish while a GPU reads them, or copies of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numba import cuda
from small_model import CHANGES, LOSSES, K, M, is_mapped, write_small_model

import qmm
from qmm.cuda import call
from qmm.errors import MappingError, RegistrationError
from qmm.loaders import FileMapping, HostRegistration
from qmm.loaders.access import chunks


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_registered_is_an_error_before_its_next_use(
    path: Path, x: np.ndarray, change: Callable[[Path], object], says: str
) -> None:
    x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
    with qmm.open(path) as model, qmm.Engine(model, "cuda", "mapped") as engine:
        engine.matmul("a", x_there, y_there)
        plan = engine.plan([("a", x_there, y_there)])
        plan()
        change(path)
        for use in (
            lambda: engine.matmul("a", x),
            lambda: engine.matmul("a", x_there, y_there),
            lambda: engine.dequantize("b"),
            lambda: engine.plan([("b", x_there, y_there)]),
            plan,
        ):
            with pytest.raises(MappingError, match=f"model.gguf: .*{says}"):
                use()
    assert not is_mapped(path)
    assert not chunks.registered.now
    assert call("cudaDeviceSynchronize") is None


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_registered_file_is_used_when_its_name_is_gone(
    path: Path, x: np.ndarray, lose: Callable[[Path], object]
) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as cpu:
        exact = {name: cpu.dequantize(name) for name in model}
        with qmm.Engine(model, "cuda", "mapped") as engine:
            expected = engine.matmul("a", x)
            lose(path)
            np.testing.assert_array_equal(engine.matmul("a", x), expected)
            np.testing.assert_array_equal(engine.dequantize("b"), exact["b"])
        with qmm.Engine(model, "cuda", "mapped") as engine:  # registered when the name is gone
            np.testing.assert_array_equal(engine.matmul("a", x), expected)
    assert not is_mapped(path)
    assert not chunks.registered.now


def test_a_copy_is_used_whatever_becomes_of_the_file(path: Path, x: np.ndarray) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cuda", "device") as engine:
        expected = engine.matmul("a", x)
        os.truncate(path, 100)
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
        with pytest.raises(MappingError, match="nbytes was"):
            engine.matmul("b", x)  # was not copied yet


def test_a_copy_takes_in_what_others_have_registered_of_a_tensor(path: Path, x: np.ndarray) -> None:
    """CUDA copies from no two registrations at once, nor from registered and other pages."""
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as cpu, FileMapping.open(path) as mapping:
        expected = {name: cpu.matmul(name, x) for name in ("a", "b")}
        start = model["a"].info.offset
        with (
            HostRegistration.of(mapping, [(start + 100, 1), (start + 9000, 1)]),
            qmm.Engine(model, "cuda", "device") as engine,
        ):
            np.testing.assert_allclose(engine.matmul("a", x), expected["a"], rtol=1e-4, atol=1e-4)
        page = mapping.address + (model["b"].info.offset // 4096 + 1) * 4096
        call("cudaHostRegister", page, 4096, 0x0B)  # not by qmm
        try:
            with qmm.Engine(model, "cuda", "device") as engine:
                np.testing.assert_allclose(engine.matmul("b", x), expected["b"], rtol=1e-4, atol=1e-4)
        finally:
            call("cudaHostUnregister", page)


def test_a_file_that_was_cut_off_is_refused_by_the_driver_too(tmp_path: Path) -> None:
    """Between the check and the call nothing can be done: the driver finds no pages there."""
    path = tmp_path / "cut"
    path.write_bytes(bytes(1 << 20))
    with FileMapping.open(path) as mapping:
        os.truncate(path, 4096)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileMapping, "check", lambda self: None)
            with pytest.raises(RegistrationError, match="cudaErrorInvalidValue"):
                HostRegistration.of(mapping, [(0, 1 << 20)])
    assert not chunks.registered.now
