"""Multiply by the quantized weights of a GGUF file where they lie.

``import qmm`` loads neither Numba nor CUDA: each name below is fetched from its module the first time it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qmm.errors import (
    ArrayError,
    ClosedError,
    CopyError,
    DeviceError,
    EmulatorError,
    FileAccessError,
    FileMissingError,
    GGUFError,
    MappingError,
    OutOfMemoryError,
    PatternError,
    QmmError,
    RegistrationError,
    TensorNotFoundError,
    UnsupportedTypeError,
)

if TYPE_CHECKING:
    from qmm.engine import Engine
    from qmm.model import Model, Tensor
    from qmm.model import open_model as open
    from qmm.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "ArrayError",
    "ClosedError",
    "CopyError",
    "DeviceError",
    "EmulatorError",
    "Engine",
    "FileAccessError",
    "FileMissingError",
    "GGUFError",
    "MappingError",
    "Model",
    "OutOfMemoryError",
    "PatternError",
    "Plan",
    "QmmError",
    "RegistrationError",
    "Tensor",
    "TensorNotFoundError",
    "UnsupportedTypeError",
    "__version__",
    "open",
]

_LAZY = {
    "Engine": ("qmm.engine", "Engine"),
    "Model": ("qmm.model", "Model"),
    "Plan": ("qmm.plan", "Plan"),
    "Tensor": ("qmm.model", "Tensor"),
    "open": ("qmm.model", "open_model"),
}


def __getattr__(name: str) -> object:
    """Fetch a lazy name from its module (PEP 562) and keep it, so that this runs once a name."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value: object = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
