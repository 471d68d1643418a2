"""Kernels of the CPU: called as functions are, compiled once, and loaded from the cache without a compiler."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from children import run_python
from llvmlite import binding
from numba.core import config
from numba.core.registry import cpu_target

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.simd import fetch_add
from qmm.kernels.lang.targets.cpu import CPUTarget
from qmm.kernels.runtime import build_cpu, cpu
from qmm.kernels.runtime.cache import CachedKernel, Code
from qmm.kernels.runtime.cpu import CPUKernel, host


@dataclass(frozen=True)
class Factor(Constants):
    FACTOR: int
    """What is added for each one."""


c = Factor.placeholder()


def add(target, count):
    """Adds ``count`` times the factor to the number at ``target``."""
    fetch_add(target, count * c.FACTOR)


def kernel_of(factor: int = 3) -> CPUKernel:
    """A kernel as a fresh process has it."""
    return CPUKernel.of("add", add, Factor(factor))


def result_of(kernel: CPUKernel, count: int = 2) -> int:
    number = np.zeros(1, np.int64)
    kernel(target=number.ctypes.data, count=count)
    return int(number[0])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache's folder, not there yet."""
    monkeypatch.setenv("QMM_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of functions that were compiled."""
    made, usual = [], build_cpu.compiled

    def compiled(function: Callable[..., None], target: CPUTarget) -> Code:
        made.append(function.__name__)
        return usual(function, target)

    monkeypatch.setattr(build_cpu, "compiled", compiled)
    return made


# Calls ----------------------------------------------------------------------------------------------------------------


def test_arguments_are_given_as_to_a_function() -> None:
    kernel, number = kernel_of(), np.zeros(1, np.int64)
    address = number.ctypes.data
    kernel(count=np.int32(1), target=np.uint64(address))
    kernel(address, 10)
    kernel(address, count=True)
    assert number[0] == 3 * 12
    for positional, named in [((address,), {}), ((), {}), ((address, 1, 2), {}), ((address, 1), {"count": 1})]:
        with pytest.raises(TypeError, match=r"add takes target, count; it was given [0-3]: "):
            kernel(*positional, **named)
    with pytest.raises(TypeError, match=r"given 2: target, county$"):
        kernel(target=address, county=1)
    assert number[0] == 3 * 12


def test_an_exception_of_a_kernel_is_an_error() -> None:
    def refuse(number):
        if number < 0:
            raise ValueError("negative")

    kernel = CPUKernel.of("refuse", refuse, Constants())
    kernel(1)
    with pytest.raises(RuntimeError, match="refuse raised an exception"):
        kernel(-1)


def test_threads_that_call_a_kernel_first_compile_it_once(folder: Path, compilations: list[str]) -> None:
    kernel, number, all_there = kernel_of(), np.zeros(1, np.int64), threading.Barrier(4)

    def call() -> None:
        all_there.wait()
        kernel(number.ctypes.data, 1)

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(call) for _ in range(4)]:
            future.result()
    assert (compilations, number[0]) == (["add"], 4 * 3)


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once_and_found_by_the_next_process(folder: Path, compilations: list[str]) -> None:
    assert [result_of(kernel_of(factor)) for factor in (3, 3, 5, 5)] == [6, 6, 10, 10]
    assert len(compilations) == len(list(folder.iterdir())) == 2


PRODUCT = """
import sys
import numpy as np
from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.cpu import products as cpu
form = FORMATS["Q8_0"]
weights = np.arange(6 * form.row_nbytes(64), dtype=np.uint8) & 63
y = np.empty((1, 6), np.float32)
cpu.matmul(form, weights.ctypes.data, 6, 64, np.linspace(-1, 1, 64, dtype=np.float32)[None], y)
print(y.tolist(), "numba" in sys.modules)
"""


def test_the_second_process_multiplies_without_numba(folder: Path) -> None:
    first, second = (run_python(PRODUCT) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("True\n")
    assert second.stdout == first.stdout.replace("True", "False"), second.stderr


def object_code(assembly: str) -> bytes:
    return cpu_target.target_context.codegen()._tm.emit_object(binding.parse_assembly(assembly))


OTHER = object_code("define i32 @other(ptr %arguments) { ret i32 0 }")
CALLS_NOTHING = object_code(
    "declare i32 @qmm_nowhere(ptr) define i32 @qmm_add(ptr %a) { %r = call i32 @qmm_nowhere(ptr %a) ret i32 %r }"
)


@pytest.mark.parametrize(
    "code",
    [Code("qmm_add", b""), Code("qmm_add", b"\x7fELF no more"), Code("qmm_add", OTHER), Code("qmm_add", CALLS_NOTHING)],
    ids=["empty", "no object", "no entry point", "calls what is not there"],
)
def test_code_that_cannot_be_loaded_is_replaced(code: Code, folder: Path, compilations: list[str]) -> None:
    kernel = kernel_of()
    CachedKernel(kernel.name, kernel.key, host()).put(code)
    assert [result_of(kernel), result_of(kernel_of())] == [6, 6]
    assert compilations == ["add"]


@pytest.mark.parametrize("damaged", [b"", b"\0"], ids=["cut", "longer"])
def test_a_damaged_entry_is_compiled_again(damaged: bytes, folder: Path, compilations: list[str]) -> None:
    result_of(kernel_of())
    (entry,) = folder.iterdir()
    data = entry.read_bytes()
    entry.write_bytes(data + damaged if damaged else data[:-1])
    assert [result_of(kernel_of()), result_of(kernel_of())] == [6, 6]
    assert compilations == ["add", "add"]


def test_kernels_work_without_a_cache(tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMM_CACHE_DIR", "")
    assert [result_of(kernel_of()), result_of(kernel_of())] == [6, 6]
    assert len(compilations) == 2


# What code depends on -------------------------------------------------------------------------------------------------


def test_the_cpu_and_every_setting_of_numba_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    described = [host()]
    for name in ("NUMBA_CPU_NAME", "NUMBA_OPT", "NUMBA_ENABLE_AVX"):
        monkeypatch.setenv(name, "1")
        described.append(host())
    usual = cpu._cpu()
    for change in ({"cpu": "another"}, {"features": "+another"}, {"triple": "another"}):
        monkeypatch.setattr(cpu, "_cpu", lambda change=change: {**usual, **change})
        described.append(host())
    assert None not in described
    assert all(one != other for one, other in itertools.combinations(map(json.dumps, described), 2))


def test_settings_of_a_file_keep_kernels_out(
    folder: Path, tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / cpu.SETTINGS_FILE).write_text("slp_vectorize: 1\n")
    assert result_of(kernel_of()) == 6
    (tmp_path / cpu.SETTINGS_FILE).unlink()
    assert not folder.exists()
    assert result_of(kernel_of()) == 6
    assert len(list(folder.iterdir())) == 1
    (tmp_path / cpu.SETTINGS_FILE).write_text("slp_vectorize: 1\n")
    assert result_of(kernel_of()) == 6
    assert len(compilations) == 3


@pytest.mark.parametrize(("name", "value"), [("OPT", 0), ("LOOP_VECTORIZE", 0), ("DEBUGINFO_DEFAULT", 1)])
def test_settings_of_the_program_keep_kernels_out(
    name: str, value: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.reload_config()  # Numba does so too, where the environment has changed, and would undo it
    with monkeypatch.context() as patch:
        patch.setattr(config, name, value)
        assert result_of(kernel_of()) == 6
    assert not folder.exists()
    assert result_of(kernel_of()) == 6
    assert folder.exists()
