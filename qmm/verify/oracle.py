"""The reference of products: float64 sums over the weights that ``gguf.quants.dequantize`` returns for the file's
bytes.

A result is compared with the sum in float64, by these rules:

* Where that is a number, its error counts in parts of ``sum(w^2)``, and the NMSE is the mean of that over all results.
  ``sum(w^2)`` is the mean of ``reference^2`` for standard normal activations: so a sum that is close to zero by
  chance fails nothing, and one huge weight hides no error in other rows.
* Where it is NaN, the result must be NaN; where it is infinite, the same infinity. A quantized type multiplies a whole
  block by one scale: if that is not finite, the result must not be finite either, but may be NaN for an infinity.
* A float32 sum may overflow before its end where ``sum(|w| max(|x|, 2))`` is beyond float32's range. There alone,
  infinity or NaN is right beside a finite reference. (2, because activations are stored as parts of a scale, up to
  twice of it.)
* Close to float32's smallest numbers each product is rounded by itself, to a multiple of ``2^-136`` at worst (TF32's
  smallest, :mod:`qmm.kernels.ops.quantize`). That much for each weight in a row is no error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from qmm.model import Tensor

__all__ = ["BLOCK_WEIGHTS", "Oracle", "same_bits", "weights_of"]

BLOCK_WEIGHTS = 1 << 20
"""Weights that are decoded at a time: 8 MB as float64, and a few times that inside gguf."""
ROUNDING = 2.0**-136
LEAST_ROW = 2.0**-12
"""The root of the least ``sum(w^2)`` of a row of blocks, relative to the greatest row's. Weights of a scale and a
minimum may cancel to zero, but their products only up to float32 rounding."""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]


def weights_of(tensor: Tensor) -> Iterator[tuple[int, int, Floats]]:
    """``(first_row, last_row, weights)`` for consecutive spans of rows, as gguf decodes the file's bytes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = tensor.data.reshape(tensor.m, -1) if tensor.nbytes else np.empty((tensor.m, 0), np.uint8)
    step = max(1, BLOCK_WEIGHTS // max(1, tensor.k))
    for first in range(0, tensor.m if tensor.nbytes else 0, step):
        last = min(first + step, tensor.m)
        yield first, last, dequantize(rows[first:last], GGMLQuantizationType[tensor.type])


def same_bits(actual: Floats, expected: Floats) -> bool:
    """Equal bit for bit, signs of zeros included; all NaN are equal, since the compiler chooses which."""
    if np.array_equal(actual.view(np.uint32), expected.view(np.uint32)):
        return True
    numbers = ~np.isnan(expected)
    if not np.array_equal(np.isnan(actual), ~numbers):
        return False
    return bool(np.array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32)))


class Oracle:
    """The products of a tensor with ``x``, ``(n, k)`` float32, and the errors of results.

    Attributes:
        products: ``(n, m)`` float64.
    """

    def __init__(
        self, tensor: Tensor, x: Floats, seen: Callable[[int, int, Floats], None] = lambda first, last, weights: None
    ) -> None:
        """Decode all weights; ``seen`` is called with each of :func:`weights_of`."""
        self._tensor, self._x = tensor, x
        self.products: Doubles = np.zeros((len(x), tensor.m))
        self._rows: Doubles = np.zeros(tensor.m)  # sum(w^2)
        wide = x.astype(np.float64)
        with np.errstate(all="ignore"):  # weights may be infinite or NaN
            for first, last, weights in weights_of(tensor):
                seen(first, last, weights)
                W = weights.astype(np.float64)
                self.products[:, first:last] = wide @ W.T
                self._rows[first:last] = np.einsum("ij,ij->i", W, W)
        if not tensor.format.plain:
            greatest = np.max(self._rows, where=np.isfinite(self._rows), initial=0.0)
            self._rows = np.maximum(self._rows, LEAST_ROW**2 * greatest)

    @functools.cached_property
    def _overflow(self) -> Booleans:
        """Where a float32 sum may overflow, ``(n, m)``; asked for only where a result is not finite."""
        reach = np.zeros_like(self.products)
        most = np.maximum(np.abs(self._x.astype(np.float64)), 2.0)
        with np.errstate(all="ignore"):
            for first, last, weights in weights_of(self._tensor):
                W = np.abs(weights.astype(np.float64))
                reach[:, first:last] = most @ np.where(np.isfinite(W), W, 0.0).T
        return np.asarray(reach > np.finfo(np.float32).max)

    def nmse(self, y: Floats, rows: slice = slice(None), reference: Doubles | None = None) -> float:
        """The NMSE of ``y``, ``(n, m)``, beside the products with the ``rows`` of x, or beside another ``reference``.

        Returns:
            NaN or infinity if a result breaks the rules above: finite where it must not be, or the reverse.
        """
        expected = self.products[rows] if reference is None else reference
        numbers = np.isfinite(y) & np.isfinite(expected)
        if not numbers.all():
            wrong = ~numbers & ~self._as_it_should_be(y, expected)
            if wrong.any():
                # A float32 reference may have overflowed itself; one of float64 is not finite because a weight is not.
                wrong &= ~self._overflow[rows] | (np.isfinite(y) if reference is None else False)
            if wrong.any():
                return float("nan" if np.isnan(y[wrong]).any() else "inf")
            if not numbers.any():
                return 0.0
        if not numbers.size:
            return 0.0
        a, b = y[numbers].astype(np.float64), expected[numbers]
        energy = np.broadcast_to(self._rows, y.shape)[numbers]
        error = np.maximum(np.abs(a - b) - self._tensor.k * ROUNDING, 0.0) ** 2
        shares = np.divide(error, energy, out=np.where(error > 0, np.inf, 0.0), where=energy > 0)
        return float(shares.mean())

    def _as_it_should_be(self, y: Floats, expected: Doubles) -> Booleans:
        """Where non-finite results are those of the reference."""
        same: Booleans = (np.isnan(y) & np.isnan(expected)) | (y == expected)
        return same if self._tensor.format.plain else same | (~np.isfinite(y) & ~np.isfinite(expected))
