"""The CPU as a target, compiled by Numba."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numba
import numpy as np
from numba import extending
from numba.core import types
from numba.core.errors import RequireLiteralValue
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from qmm.kernels.lang.fields import DEFAULT_FIELDS
from qmm.kernels.lang.intrinsics import Intrinsics, Toolkit
from qmm.kernels.lang.operation import Operation
from qmm.kernels.runtime.compiler import check_cpu, compiling

__all__ = ["CPU", "CPU_PRODUCTS", "CPUKernel"]

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


class CPUKernel:
    """A function that is compiled at its first call, for arguments of these types.

    Raises:
        DeviceError: a setting of Numba forbids compiling.
    """

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher

    def __call__(self, *arguments: Any) -> None:
        """Run it."""
        # An address that is NumPy's uint64 would become a float64 when an offset is added to it.
        arguments = tuple([int(value) if isinstance(value, np.integer) else value for value in arguments])
        if not self._dispatcher.overloads:
            check_cpu()
            with compiling():
                self._dispatcher.compile(tuple(map(numba.typeof, arguments)))
        self._dispatcher(*arguments)


class CPUTarget:
    """Specializes kernels for the CPU that runs them.

    Args:
        fastmath: what LLVM may do to float arithmetic. Nothing, where results must be an oracle's bit for bit.
    """

    name = "cpu"
    absent_masks: frozenset[str] = frozenset()

    def __init__(self, fastmath: Collection[str] = ()) -> None:
        self._options = {"error_model": "numpy", "nogil": True, "fastmath": set(fastmath)}

    def intrinsic(self, value: object) -> object | None:
        """The target's implementation of an operation; None where ``value`` is not one."""
        return INTRINSICS.of(value, DEFAULT_FIELDS) if isinstance(value, Operation) else None

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that kernels call."""
        check_cpu()
        return numba.njit(**self._options)(function)

    def kernel(self, function: Callable[..., Any]) -> CPUKernel:
        """A function that Python calls."""
        return CPUKernel(self.device_function(function))


CPU = CPUTarget()
CPU_PRODUCTS = CPUTarget(("contract", "nsz", "reassoc"))
"""For products: a scale of the activations may be multiplied in where it is shared, which makes Q4_K 9% faster and Q6_K
3% (14336x4096 on a Zen 4 core). A NaN or an infinity stays one."""
