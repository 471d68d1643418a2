"""Products of an engine with arrays in host memory, computed on the CPU or on the GPU. They wait for the result."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from qmm.arrays import ArrayKind
from qmm.calls import Calls, check_activations, check_input, check_output
from qmm.children import PerProcess
from qmm.errors import ArrayError
from qmm.in_flight import InFlight
from qmm.memory.placement import Weights
from qmm.model import Tensor

__all__ = ["HostProducts", "cpu"]

Matrix = npt.NDArray[np.float32]


class HostProducts:
    """Checks and multiplies."""

    def __init__(
        self, weights: Weights, device: str, in_flight: PerProcess[InFlight], calls: Calls | None = None
    ) -> None:
        """Args are the engine's; ``calls`` are those of its GPU, None on the CPU."""
        self._weights, self._device, self._in_flight, self._calls = weights, device, in_flight, calls

    def matmul(
        self,
        tensor: Tensor,
        mode: str,
        kind: ArrayKind,
        x: Any,
        out: Any,
        stream: Any,
        quantized: dict[bool, Any] | None = None,
    ) -> Any:
        """The product of ``x``, into ``out`` or a new array.

        Args:
            tensor: the weight.
            mode: how activations are stored, one of ``qmm.calls.ACTIVATIONS``.
            kind: of both arrays.
            x: activations, in host memory.
            out: where results go; None for a new array.
            stream: None; there is no stream to wait for.
            quantized: on the CPU, the activations of the same ``x`` quantized so far, by whether they are int8; filled
                here.

        Raises:
            ArrayError: as :meth:`qmm.Engine.matmul`.
        """
        if stream is not None:
            raise ArrayError("stream= is for arrays on the GPU; x is in host memory, where the call waits anyway")
        check_activations(mode)
        source = kind.view(x)
        check_input(tensor, source, self._device)
        shape = (*source.shape[:-1], *tensor.shape[:-1])
        if out is None:
            out = kind.empty(shape, x)
        else:
            check_output(tensor, kind, source, out, shape)
        int8 = mode == "int8" and not tensor.format.plain
        quantized = {} if quantized is None else quantized
        with self._in_flight.now:
            values = kind.to_host(x)
            results = kind.in_place(out, (len(values), tensor.m))
            if results is None or np.may_share_memory(results, values):
                results = np.empty((len(values), tensor.m), np.float32)
                self._multiply(tensor, values, results, int8, quantized)
                kind.from_host(results, out)
            else:
                self._multiply(tensor, values, results, int8, quantized)
        return out

    def _multiply(self, tensor: Tensor, x: Matrix, y: Matrix, int8: bool, quantized: dict[bool, Any]) -> None:
        """``y[n, m] = x[n, k] @ W^T``, both row-major."""
        if not y.size:
            self._weights[tensor].check()
        elif self._calls is not None:
            self._calls.multiply_host(tensor, x, y, int8)
        else:
            address = self._weights[tensor].lease()
            if int8 not in quantized:
                quantized[int8] = cpu().quantize(x, int8)
            cpu().matmul(tensor.format, address, tensor.m, tensor.k, quantized[int8], y)


@functools.cache
def cpu() -> ModuleType:
    """The products on the CPU, imported at first use."""
    from qmm.kernels.ops.cpu import products

    return products
