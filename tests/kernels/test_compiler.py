"""Settings of Numba under which nothing can be compiled: an error that names them, and no process that ends."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf_files
import numba
import pytest
from numba.cuda.core import config as cuda_config

from qmm.errors import DeviceError
from qmm.kernels.lang.targets.cpu import CPUTarget
from qmm.kernels.runtime import build_cpu, compiler

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiler") / "model.gguf"
    gguf_files.write_gguf(path, {"a": ("F32", (2, 32), bytes(256))})
    return path


def started(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qmm", *map(str, arguments)]
    environment = {**os.environ, **settings}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT=1"),
        ({"NUMBA_NUM_THREADS": "0"}, "NUMBA_NUM_THREADS='0'"),  # with which Numba cannot be imported
        ({"NUMBA_CPU_FEATURES": "nonsense"}, "NUMBA_CPU_FEATURES='nonsense'"),  # at which LLVM aborts
    ],
)
def test_a_setting_that_forbids_compiling_is_an_error_that_names_it(
    model: Path, settings: dict[str, str], named: str
) -> None:
    done = started("run", model, "--device", "cpu", **settings)
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert named in line
    assert line.endswith(compiler.WAY_OUT)


def test_what_compiles_nothing_works_whatever_is_set(model: Path) -> None:
    done = started("info", model, NUMBA_DISABLE_JIT="1", NUMBA_NUM_THREADS="0", NUMBA_CPU_FEATURES="nonsense")
    assert (done.returncode, done.stderr) == (0, "")


def function(x: int) -> None:
    """A kernel that does nothing."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the name of an x86-64 CPU")
def test_a_cpu_that_cannot_run_kernels_is_tried_once_and_leaves_a_process_that_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = CPUTarget()
    with monkeypatch.context() as patch:
        patch.setattr(numba.config, "CPU_NAME", "i686")
        patch.setattr(numba.config, "CPU_FEATURES", "")
        with pytest.raises(DeviceError, match=r"NUMBA_CPU_NAME='i686' and NUMBA_CPU_FEATURES=''.*64-bit"):
            build_cpu.compiled(function, target)
        patch.setattr(compiler, "CHILD", "sys.exit(0)")
        with pytest.raises(DeviceError, match="i686"):
            build_cpu.compiled(function, target)
    assert build_cpu.compiled(function, target).code


def test_a_child_that_tries_a_cpu_neither_uses_nor_fills_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it compiled might end the next process, and what it found would try nothing."""
    monkeypatch.setenv("QMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba.config, "CPU_NAME", "a name for this test")
    monkeypatch.setattr(compiler, "CHILD", "from qmm.kernels.runtime.cache import store; sys.exit(store() is not None)")
    compiler.check_cpu()


def test_a_child_that_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CPU_NAME", "some name")
    monkeypatch.setattr(compiler, "CHILD", "sys.exit(0)")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/python")
        with pytest.raises(DeviceError, match=r"NUMBA_CPU_NAME='some name'.*could not be started"):
            compiler.check_cpu()
    compiler.check_cpu()  # it could later


def test_what_every_cpu_can_run_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "CHILD", "sys.exit(1)")
    monkeypatch.setattr(numba.config, "CPU_NAME", "generic")
    compiler.check_cpu()


@pytest.mark.parametrize(
    ("config", "attribute", "value", "named"),
    [
        (numba.config, "ENABLE_CUDASIM", 1, "NUMBA_ENABLE_CUDASIM=1"),
        (cuda_config, "ENABLE_CUDASIM", 1, "NUMBA_ENABLE_CUDASIM=1"),
        (cuda_config, "CUDA_DEBUGINFO_DEFAULT", 1, "NUMBA_CUDA_DEBUGINFO=1"),
        (cuda_config, "FORCE_CUDA_CC", (5, 0), r"NUMBA_FORCE_CUDA_CC=\(5, 0\)"),
    ],
)
def test_a_setting_that_forbids_compiling_for_a_gpu_is_named(
    config: Any, attribute: str, value: object, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, attribute, value)
    with pytest.raises(DeviceError, match=f"^{named}: "):
        compiler.check_cuda()


def test_any_other_failure_names_the_settings_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NUMBA_")]:
        monkeypatch.delenv(name)
    with pytest.raises(ImportError, match=r"^jinja2"), compiler.compiling():
        raise ImportError("jinja2 is missing")
    monkeypatch.setenv("NUMBA_DUMP_HTML", "a.html")
    with (
        pytest.raises(DeviceError, match=r"jinja2 is missing\. .* NUMBA_DUMP_HTML='a.html'") as caught,
        compiler.compiling(),
    ):
        raise ImportError("jinja2 is missing")
    assert isinstance(caught.value.__cause__, ImportError)
