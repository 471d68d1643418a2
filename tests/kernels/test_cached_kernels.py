"""GPU kernels from the cache: compiled once, loaded without a compiler, and compiled again where the driver refuses."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_driver
import pytest
from children import run_python
from fake_driver import Driver
from ptx_compile import without_gpu
from ptx_kernels import MAKERS, groups

from qmm.cuda import CudaCallError
from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.read import read_kernel
from qmm.kernels.runtime import build, launch
from qmm.kernels.runtime.cache import CachedKernel, Code

ELF = b"\x7fELF"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache's folder, not there yet."""
    monkeypatch.setenv("QMM_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of kernels that were compiled."""
    made, usual = [], build.compiled

    def compiled(kernel: Any, capability: tuple[int, int]) -> tuple[str, bytes]:
        made.append(kernel.name)
        return usual(kernel, capability)

    monkeypatch.setattr(build, "compiled", compiled)
    with without_gpu():
        yield made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return fake_driver.install(monkeypatch)


def load_anew() -> None:
    """Load a kernel as a fresh process would."""
    launch._loaded.clear()
    launch.load(read_kernel(), 0)


@pytest.mark.usefixtures("fake")
def test_a_kernel_is_compiled_once_and_found_by_the_next_process(folder: Path, compilations: list[str]) -> None:
    load_anew()
    (entry,) = folder.iterdir()
    load_anew()
    assert compilations == ["read"]
    # Damaged: compiled again, and the file is right again (code differs from one compilation to the next, by a name).
    entry.write_bytes(entry.read_bytes()[:-1])
    load_anew()
    load_anew()
    assert compilations == ["read", "read"]


@pytest.mark.usefixtures("fake", "folder")
@pytest.mark.parametrize("code", [Code("read", b"no ELF"), Code("unknown", ELF + b" of another kernel")], ids=str)
def test_code_that_the_driver_refuses_is_replaced(code: Code, compilations: list[str]) -> None:
    kernel = read_kernel()
    cached = CachedKernel(kernel.name, kernel.described(), (9, 0))
    cached.put(code)
    load_anew()
    found = cached.get()
    assert compilations == ["read"]
    assert found is not None
    assert found.code.startswith(ELF)
    assert found.entry.encode() in found.code


@pytest.mark.usefixtures("compilations")
def test_code_that_the_driver_refuses_is_not_kept(fake: Driver, folder: Path) -> None:
    fake.accepts = lambda code: False
    with pytest.raises(CudaCallError):
        load_anew()
    assert not folder.exists()


@pytest.mark.usefixtures("fake")
def test_kernels_work_without_a_cache(tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QMM_CACHE_DIR", "")
    load_anew()
    load_anew()
    assert compilations == ["read", "read"]
    assert list(tmp_path.iterdir()) == []


LOADS = """
import importlib, pickle, sys
import fake_driver, pytest
import qmm.device, qmm.engine
from qmm.kernels.formats import FORMATS
from qmm.kernels.runtime.launch import load
fake_driver.install(pytest.MonkeyPatch())
for module, maker, arguments in pickle.loads(bytes.fromhex(sys.argv[1])):
    named = [FORMATS.get(value, value) if isinstance(value, str) else value for value in arguments]
    load(getattr(importlib.import_module(module), maker)(*named), 0)
print(sorted({name.split(".")[0] for name in sys.modules} & {"numba", "llvmlite", "gguf"}))
"""


def test_from_a_filled_cache_kernels_are_loaded_without_a_compiler(folder: Path) -> None:
    specs = [spec for group in ("Q4_K", "F32", "activations", "probes") for spec in groups(False)[group]]
    for spec in specs:
        kernel = spec.kernel()
        CachedKernel(kernel.name, kernel.described(), (9, 0)).put(Code(kernel.name, ELF + kernel.name.encode()))
    kept = sorted(folder.iterdir())
    assert len(kept) == len(specs)
    makers = [(MAKERS[spec.maker].__module__, spec.maker, spec.arguments) for spec in specs]
    done = run_python(LOADS, pickle.dumps(makers).hex())
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert sorted(folder.iterdir()) == kept  # none was looked for under another key, compiled and put


def test_every_kernel_is_described_and_told_from_every_other() -> None:
    kernels = {spec.kernel() for specs in groups(True).values() for spec in specs}
    keys = {CachedKernel(kernel.name, kernel.described(), (9, 0))._key for kernel in kernels}
    assert None not in keys
    assert len(keys) > len(FORMATS)
    assert len(keys) == len({str(sorted(kernel.described().items(), key=str)) for kernel in kernels})
