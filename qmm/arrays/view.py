"""Where an array lies, whichever library it is from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qmm.errors import ArrayError
from qmm.kernels.ops.op import ITEM_NBYTES, Operand, Slab

__all__ = ["View"]


@dataclass(frozen=True)
class View:
    """Where an array lies and how, whichever library it is from.

    Attributes:
        shape: its dimensions.
        strides: bytes from one index to the next, for each dimension.
        dtype: one of DTYPES.
        address: of its first element.
        device: CUDA's number of the GPU that holds it; None for host memory.
        writable: whether results may be stored in it.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    address: int
    device: int | None
    writable: bool = True

    @property
    def contiguous(self) -> bool:
        """Whether it is row-major without gaps."""
        expected = ITEM_NBYTES[self.dtype]
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length > 1 and stride != expected:
                return False
            expected *= length
        return True

    @property
    def aligned(self) -> bool:
        """Whether each element lies at a multiple of its size."""
        steps = [stride for length, stride in zip(self.shape, self.strides, strict=True) if length > 1]
        return math.gcd(self.address, *steps) % ITEM_NBYTES[self.dtype] == 0

    @property
    def overlaps_itself(self) -> bool:
        """Whether two elements may share memory, as in a broadcast array."""
        if 0 in self.shape:  # NumPy's strides are 0 then
            return False
        axes = sorted(
            (abs(stride), length) for length, stride in zip(self.shape, self.strides, strict=True) if length > 1
        )
        reach = ITEM_NBYTES[self.dtype]
        for stride, length in axes:
            if stride < reach:
                return True
            reach = stride * (length - 1) + reach
        return False

    @property
    def reach(self) -> tuple[int, int]:
        """Its lowest byte and the one after its highest, from ``address`` on."""
        if 0 in self.shape:
            return 0, 0
        ends = [(length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True)]
        return sum(min(0, end) for end in ends), sum(max(0, end) for end in ends) + ITEM_NBYTES[self.dtype]

    def rows(self, leading: int) -> View:
        """The same memory with all dimensions after the first ``leading`` joined into one.

        Raises:
            ArrayError: no single stride covers them.
        """
        length, stride = 1, ITEM_NBYTES[self.dtype]
        for size, step in zip(reversed(self.shape[leading:]), reversed(self.strides[leading:]), strict=True):
            if length > 1 and size > 1 and step != stride * length:
                raise ArrayError(
                    f"out has strides {self.strides}: its last {len(self.shape) - leading} dimensions are not one row. "
                    "Pass a contiguous array."
                )
            if length == 1 and size > 1:
                stride = step
            length *= size
        shape, strides = (*self.shape[:leading], length), (*self.strides[:leading], stride)
        return replace(self, shape=shape, strides=strides)

    def operand(self) -> Operand:
        """The array as an op's operand: its last axis is a row."""
        return Operand(self.dtype, self.shape[-1], tuple(self._slabs()), self.address % 16 == 0, self.reach)

    def _slabs(self) -> Iterator[Slab]:
        """As few two-dimensional slabs as the strides allow; nothing is copied."""
        if len(self.shape) == 1:
            yield Slab(0, 1, 0, 0, self.strides[0])
            return
        *leading, _ = self.shape
        if 0 in leading:
            return
        column_stride = self.strides[-1]
        # From the inside out, take in every axis that continues the rows so far at one stride.
        count, row_stride, axis = 1, 0, len(leading)
        while axis:
            length, stride = self.shape[axis - 1], self.strides[axis - 1]
            if count == 1:
                row_stride = stride
            elif length > 1 and stride != row_stride * count:
                break
            count *= length
            axis -= 1
        for number, index in enumerate(np.ndindex(*self.shape[:axis])):
            offset = sum(i * stride for i, stride in zip(index, self.strides, strict=False))
            yield Slab(number * count, count, offset, row_stride, column_stride)
