"""Checks for settings of Numba under which kernels cannot be compiled.

LLVM ends the process at a CPU name that it does not know, and a CPU at instructions that it does not have. So a CPU
that the user names is tried in a child process, once a process.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from qmm.children import ending, no_start, python
from qmm.errors import DeviceError, QmmError

__all__ = ["check_cpu", "check_cuda", "compiling", "trust_cpu"]

WAY_OUT = "Unset that: in the environment, in .numba_config.yaml, or in numba.config."
NO_SIMULATION = "Numba's simulator of a GPU cannot run the kernels, which are written for a real one"
CHILD = "from qmm.kernels.ops.cpu.trial import try_cpu; sys.exit(try_cpu())"
"""The child process's program. It runs products, so it is with them; nothing here imports it."""

_failures: dict[tuple[str | None, str | None], str] = {}
"""The failure of compiling for a CPU's name and features; empty if it works."""


def check_cpu() -> None:
    """Check that kernels can be compiled for the CPU.

    Raises:
        DeviceError: they cannot; the message names the setting and its value.
    """
    config = _settings()
    from llvmlite import binding

    if config.DISABLE_JIT:
        raise DeviceError(f"NUMBA_DISABLE_JIT={config.DISABLE_JIT}: the kernels exist only compiled. {WAY_OUT}")
    asked = config.CPU_NAME, config.CPU_FEATURES
    if asked in ((None, None), ("generic", ""), ("generic", None), (binding.get_host_cpu_name(), None)):
        return
    if asked not in _failures:
        _failures[asked] = _tried(*asked)
    if _failures[asked]:
        raise DeviceError(_failures[asked])


def check_cuda() -> None:
    """Check that kernels can be compiled for a GPU.

    Raises:
        DeviceError: they cannot; the message names the setting and its value.
    """
    _refuse("NUMBA_ENABLE_CUDASIM", _settings().ENABLE_CUDASIM, NO_SIMULATION)
    from numba.cuda.core import config  # numba-cuda has its own

    _refuse("NUMBA_ENABLE_CUDASIM", config.ENABLE_CUDASIM, NO_SIMULATION)
    _refuse("NUMBA_CUDA_DEBUGINFO", config.CUDA_DEBUGINFO_DEFAULT, "kernels with it are in parts that cannot be linked")
    _refuse("NUMBA_FORCE_CUDA_CC", config.FORCE_CUDA_CC, "kernels are compiled for the GPU that runs them")


@contextmanager
def compiling() -> Iterator[None]:
    """If Numba fails and the user changed its settings, raise a DeviceError that names them."""
    try:
        yield
    except (QmmError, MemoryError, OSError):
        raise
    except Exception as reason:
        given = _given()
        if not given:
            raise
        said = " ".join(str(reason).split())[:500] or type(reason).__name__
        raise DeviceError(
            f"compiling a kernel failed: {said}. The reason may be Numba's settings in force, {given}. {WAY_OUT}"
        ) from reason


def _refuse(setting: str, value: object, why: str) -> None:
    if value:
        raise DeviceError(f'{setting}={value}: {why}. {WAY_OUT} device="cpu" works all the same.')


def _given() -> str:
    """The settings of Numba in the environment."""
    return ", ".join(f"{name}={value!r}" for name, value in os.environ.items() if name.startswith("NUMBA_"))


def _settings() -> ModuleType:
    """``numba.config``, as it is now."""
    try:
        from numba.core import config

        config.reload_config()  # Numba does it too, when it compiles
    except (ValueError, RuntimeError) as reason:
        raise DeviceError(f"Numba does not take its settings ({_given()}): {reason} {WAY_OUT}") from reason
    return config


def _tried(name: str | None, features: str | None) -> str:
    """The failure of a CPU's name and features; empty if they work."""
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    given = {setting: value for setting, value in settings.items() if value is not None}
    text = " and ".join(f"{setting}={value!r}" for setting, value in given.items())
    what = f"{text}: compiling a kernel for such a CPU and running it here was tried in a child process, which"
    kept = {setting: value for setting, value in os.environ.items() if setting not in settings}
    command, environment = python(CHILD), {**kept, **given, "QMM_CACHE_DIR": ""}  # it is to compile
    try:  # in its own session, or a Ctrl-C would be taken for its failure
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, start_new_session=True
        )
    except OSError as reason:  # it may be able to later: nothing is remembered
        raise DeviceError(f"{what} {no_start(reason)}") from reason
    if not done.returncode:
        return ""
    said = done.stderr.strip().rpartition("\n")[2][-500:].rstrip("!.")
    return f"{what} {ending(done.returncode)}{': ' if said else ''}{said}. {WAY_OUT}"


def trust_cpu() -> None:
    """Take the CPU that the settings name as tried, in the child process that tries it."""
    config = _settings()
    _failures[config.CPU_NAME, config.CPU_FEATURES] = ""
