"""The cache keys of kernels: text with everything that the machine code depends on.

That is the kernel and its compile-time constants, a digest of this package's source, the versions of the compilers,
the target, and the settings that change code. Functions of this package are named, since the digest holds their source;
a user's function is described by its source and by all that it uses. A kernel that text cannot describe unambiguously
has no key, and is compiled in every process.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.operation import Operation

__all__ = ["digest_of_sources", "key_of", "unchanged_sources"]

DISTRIBUTIONS = (
    *("qmm", "numpy", "numba", "llvmlite", "numba-cuda", "cuda-bindings", "cuda-python", "cuda-pathfinder"),
    *("nvidia-cuda-nvcc", "nvidia-nvjitlink", "nvidia-nvvm"),
    *("nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12", "nvidia-nvvm-cu12"),
)
LIBRARIES = ("builtins", "math", "numpy", "operator")
"""Modules that are described by their versions."""

SETTINGS = ("CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH")
"""Environment variables of the folder of a compiler that no wheel installed."""
SETTING_PREFIXES = ("NUMBA_CUDA_", "NUMBA_DEBUG", "NUMBA_OPT")

PACKAGE = "qmm.kernels"
FOLDER = Path(__file__).parents[1]


class _CannotBeDescribedError(Exception):
    """A kernel uses a value that the text of a key cannot describe unambiguously."""


def key_of(name: str, constants: Mapping[str, Any], target: object) -> str | None:
    """Everything that a kernel's machine code depends on, as text; None if text cannot describe it.

    Args:
        name: the kernel's.
        constants: its compile-time constants: numbers, strings, arrays, functions, and tuples and mappings of them.
        target: what it is compiled for, as JSON can hold it: a GPU's compute capability, or what
            :func:`qmm.kernels.runtime.cpu.host` says of the CPU. None if it is unknown.
    """
    if not SOURCES or target is None:
        return None
    try:
        kernel = _described(constants, {})
    except _CannotBeDescribedError:
        return None
    settings = {
        setting: value
        for setting, value in os.environ.items()
        if setting in SETTINGS or setting.startswith(SETTING_PREFIXES)
    }
    key = {
        "name": name,
        "kernel": kernel,
        "target": target,
        "sources": SOURCES,
        "versions": _versions(),
        "settings": settings,
    }
    return json.dumps(key, sort_keys=True)


@functools.cache
def _versions() -> dict[str, str]:
    """The versions of the packages that take part in compiling."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version}
    for distribution in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            found[distribution] = version(distribution)
    return found


def digest_of_sources(folder: Path) -> str:
    """A digest of the names and texts of all Python files in a folder and below; empty where there are none."""
    digest = hashlib.sha256()
    paths = sorted(folder.rglob("*.py"))
    try:
        for path in paths:
            text = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(text)}\n".encode() + text)
    except OSError:
        return ""
    return digest.hexdigest() if paths else ""


# Read when the modules are imported: their files may be edited while the process runs.
SOURCES = digest_of_sources(FOLDER)


def unchanged_sources() -> bool:
    """Whether the files of the package are as they were when it was imported."""
    return digest_of_sources(FOLDER) == SOURCES


def _described(value: Any, functions: dict[types.FunctionType, int]) -> Any:
    """A value as JSON can hold it, the same only for values that make the same kernel. ``functions`` counts the
    functions so far."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): _described(inner, functions) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_described(inner, functions) for inner in value]
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return {"array": [value.dtype.str, *value.shape], "sha256": hashlib.sha256(value.tobytes()).hexdigest()}
    if isinstance(value, types.FunctionType):
        return _described_function(value, functions)
    if isinstance(value, Operation):
        return _described_operation(value, functions)
    if isinstance(value, Constants):  # what a kernel reads its constants from; their values are described beside it
        return {"namespace": f"{type(value).__module__}:{type(value).__qualname__}"}
    if isinstance(value, types.ModuleType) and (
        value.__name__ in LIBRARIES or value.__name__.startswith(f"{PACKAGE}.")
    ):
        return {"module": value.__name__}
    if isinstance(value, type | types.BuiltinFunctionType) and value.__module__ in LIBRARIES:
        return {"function": f"{value.__module__}:{value.__qualname__}"}
    raise _CannotBeDescribedError(repr(value))


def _described_function(function: types.FunctionType, functions: dict[types.FunctionType, int]) -> Any:
    """One of this package by its name, since the key has the package's source; any other by all that it uses."""
    name = f"{function.__module__}:{function.__qualname__}"
    ours = function.__module__.startswith(f"{PACKAGE}.")
    if ours and getattr(sys.modules.get(function.__module__), function.__qualname__, None) is function:
        return {"function": name}
    if function in functions:
        return {"function": name, "number": functions[function]}
    functions[function] = len(functions)
    try:
        source = inspect.getsource(function)  # which is what gets compiled, not the code object
    except (OSError, TypeError) as reason:
        raise _CannotBeDescribedError(f"{name} has no source") from reason
    used = inspect.getclosurevars(function)
    return {
        "function": name,
        "source": source,
        "defaults": _described([function.__defaults__, function.__kwdefaults__], functions),
        "uses": _described({**_globals_within(function), **used.globals, **used.nonlocals}, functions),
    }


def _globals_within(function: types.FunctionType) -> dict[str, Any]:
    """The globals that functions and comprehensions inside a function may use, which ``getclosurevars`` leaves out."""
    found: dict[str, Any] = {}
    inside = [code for code in function.__code__.co_consts if isinstance(code, types.CodeType)]
    while inside:
        code = inside.pop()
        inside += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        found |= {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    return found


def _described_operation(operation: Operation, functions: dict[types.FunctionType, int]) -> Any:
    """One of this package by its name, any other by its types and lowerings."""
    name = f"{operation.__module__}:{operation.name}"
    ours = operation.__module__.startswith(f"{PACKAGE}.")
    if ours and getattr(sys.modules.get(operation.__module__), operation.name, None) is operation:
        return {"operation": name}
    parts = [operation.arguments, operation.result, operation.lowerings]
    return {"operation": name, "declared": _described(parts, functions)}
