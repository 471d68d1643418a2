"""The GPU as a target, compiled by numba-cuda."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types
from numba.cuda.core.errors import RequireLiteralValue
from numba.cuda.extending import core_models, intrinsic, lower_builtin, register_model
from numba.cuda.typing.templates import AbstractTemplate, infer_global, signature

from qmm.kernels.lang.fields import DEFAULT_FIELDS, FieldAccess
from qmm.kernels.lang.intrinsics import Intrinsics, Toolkit
from qmm.kernels.lang.operation import Operation

__all__ = ["CUDATarget"]

INTRINSICS = Intrinsics(
    "cuda",
    Toolkit(
        types=types,
        intrinsic=intrinsic,
        lower_builtin=lower_builtin,
        register_model=register_model,
        primitive_model=core_models.PrimitiveModel,
        abstract_template=AbstractTemplate,
        infer_global=infer_global,
        signature=signature,
        require_literal=RequireLiteralValue,
    ),
)


class CUDATarget:
    """Specializes kernels for the GPU. Every number of a kernel is an int64, addresses of shared memory too, which are
    the 32-bit shared-window addresses that ``ld.shared`` takes."""

    name = "cuda"
    absent_masks: frozenset[str] = frozenset()

    def __init__(self, fields: FieldAccess = DEFAULT_FIELDS) -> None:
        """Args are how kernels read block fields."""
        self._fields = fields

    def intrinsic(self, value: object) -> object | None:
        """The target's implementation of an operation; None where ``value`` is not one."""
        return INTRINSICS.of(value, self._fields) if isinstance(value, Operation) else None

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that kernels call."""
        return cuda.jit(device=True)(function)
