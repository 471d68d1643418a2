"""The CPU as a target, compiled by Numba."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numba
from numba import extending
from numba.core import types
from numba.core.errors import RequireLiteralValue
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from qmm.kernels.lang.fields import DEFAULT_FIELDS
from qmm.kernels.lang.intrinsics import Intrinsics, Toolkit
from qmm.kernels.lang.operation import Operation

__all__ = ["CPUTarget"]

INTRINSICS = Intrinsics(
    "cpu",
    Toolkit(
        types=types,
        intrinsic=extending.intrinsic,
        lower_builtin=extending.lower_builtin,
        register_model=extending.register_model,
        primitive_model=extending.models.PrimitiveModel,
        abstract_template=AbstractTemplate,
        infer_global=infer_global,
        signature=signature,
        require_literal=RequireLiteralValue,
    ),
)


class CPUTarget:
    """Specializes kernels for the CPU that runs them.

    Args:
        fastmath: LLVM's fast-math flags; none where results must equal the reference's bit for bit.
    """

    name = "cpu"
    absent_masks: frozenset[str] = frozenset()

    def __init__(self, fastmath: Collection[str] = ()) -> None:
        # Without the wrappers for calls from Python, a kernel compiles in two thirds of the time.
        self._options = {
            "error_model": "numpy",
            "fastmath": set(fastmath),
            "no_cfunc_wrapper": True,
            "no_cpython_wrapper": True,
        }

    def intrinsic(self, value: object) -> object | None:
        """The target's implementation of an operation; None where ``value`` is not one."""
        return INTRINSICS.of(value, DEFAULT_FIELDS) if isinstance(value, Operation) else None

    def device_function(self, function: Callable[..., Any]) -> Any:
        """A function that only kernels call."""
        return numba.njit(**self._options)(function)
