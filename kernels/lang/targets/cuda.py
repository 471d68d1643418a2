"""The GPU as a target, compiled by numba-cuda."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types
from numba.cuda.core.errors import RequireLiteralValue
from numba.cuda.extending import core_models, intrinsic, lower_builtin, register_model
from numba.cuda.typing.templates import AbstractTemplate, infer_global, signature

from qmm.kernels.lang.fields import DEFAULT_FIELDS, HOW, LOADS, FieldAccess
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

    def __init__(self, fields: FieldAccess | None = None) -> None:
        """Args are how kernels read block fields; None if they read none."""
        self._fields = fields

    def intrinsic(self, value: object) -> object | None:
        """The target's implementation of an operation; None where ``value`` is not one.

        Raises:
            TypeError: GPUs have no such operation.
            ValueError: it loads fields, and nobody said from which memory.
        """
        if not isinstance(value, Operation):
            return None
        if self._fields is None and value in LOADS:
            raise ValueError(f"{value.name} loads a field of a block, but the kernel has no FieldAccess: give it {HOW}")
        return INTRINSICS.of(value, self._fields or DEFAULT_FIELDS)

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that kernels call."""
        return cuda.jit(device=True)(function)
