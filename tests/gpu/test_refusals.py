"""What a driver, a limit or a file system refuses, and the child process that a first contact is tried in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_model import K, write_small_model

import qmm
from qmm.cuda import CudaCallError
from qmm.errors import RegistrationError
from qmm.loaders import FileMapping, HostRegistration
from qmm.loaders.access import chunks, preflight
from qmm.loaders.access import registered as registration


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


def test_without_read_only_support_mapped_is_refused_and_copies_are_made(
    path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = registration.attribute
    monkeypatch.setattr(
        registration,
        "attribute",
        lambda name, device: 0 if name == "HostRegisterReadOnlySupported" else usual(name, device),
    )
    with qmm.open(path) as model:
        with pytest.raises(RegistrationError, match=r"HostRegisterReadOnlySupported is 0.*placement=\"device\""):
            qmm.Engine(model, "cuda", "mapped")
        with qmm.Engine(model, "cuda", "device") as engine, qmm.Engine(model, "cpu") as cpu:
            np.testing.assert_allclose(engine.matmul("a", x), cpu.matmul("a", x), rtol=1e-4, atol=1e-4)
    assert not chunks.registered.now


def test_too_little_lockable_memory_is_said_with_the_way_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of this machine locks what it likes, whatever ulimit says: its refusal is made up."""
    usual = chunks.call

    def refuses(function: str, *arguments: object) -> object:
        if function == "cudaHostRegister":
            raise CudaCallError(f"{function} returned cudaErrorMemoryAllocation (2)", "cudaErrorMemoryAllocation", 2)
        return usual(function, *arguments)

    monkeypatch.setattr(chunks, "call", refuses)
    with qmm.open(path) as model, pytest.raises(RegistrationError, match=r"ulimit -l.*placement=\"device\""):
        qmm.Engine(model, "cuda", "mapped")
    assert not chunks.registered.now


def test_the_first_contact_is_made_in_a_child_and_remembered(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    usual = preflight.probe

    def probe(mapping: FileMapping, device: int) -> bool:
        made.append(mapping.path)
        return usual(mapping, device)

    monkeypatch.setattr(preflight, "probe", probe)
    monkeypatch.setattr(preflight, "_known", set())
    monkeypatch.setenv("QMM_CACHE_DIR", str(tmp_path / "cache"))
    with qmm.open(path) as model:
        for _ in range(2):
            with qmm.Engine(model, "cuda", "mapped", probe=True) as engine:
                assert engine.placement == "mapped"
        assert made == [path]
        preflight._known.clear()  # as in another process
        qmm.Engine(model, "cuda", "mapped", probe=True).close()
        assert made == [path]
        monkeypatch.setenv("QMM_CACHE_DIR", "")
        preflight._known.clear()
        qmm.Engine(model, "cuda", "mapped", probe=True).close()
        assert made == [path] * 2


def test_a_registration_that_hangs_in_the_child_is_an_error_and_copies_are_made_without(
    path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file here makes a registration hang: the child only sleeps."""
    usual = preflight.probe
    monkeypatch.setattr(preflight, "_known", set())
    monkeypatch.setenv("QMM_CACHE_DIR", "")
    monkeypatch.setattr(preflight, "probe", lambda mapping, device: usual(mapping, device, seconds=0.5))
    monkeypatch.setattr(preflight, "_child_source", lambda file, device: "import time; time.sleep(600)")
    registered: list[object] = []
    monkeypatch.setattr(HostRegistration, "of", lambda *arguments: registered.append(arguments))
    with qmm.open(path) as model:
        with pytest.raises(RegistrationError, match=r"had not ended after 0.5 s"):
            qmm.Engine(model, "cuda", "mapped", probe=True)
        with qmm.Engine(model, "cuda", "device", probe=True) as engine:
            engine.matmul("a", x)
    assert registered == []
