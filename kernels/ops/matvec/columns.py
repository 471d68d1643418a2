"""The addresses from which a consumer lane loads the activations of its CTA, and the loads."""

from __future__ import annotations

from typing import NamedTuple

from qmm.kernels.lang.ptx.global_memory import load_global16, load_global_floats
from qmm.kernels.lang.ptx.shared_memory import load_shared16, load_shared_floats
from qmm.kernels.ops.matvec.constants import MatvecConstants

__all__ = ["Columns", "c", "load_all", "load_one", "load_pair", "load_values"]

c = MatvecConstants.placeholder()


class Columns(NamedTuple):
    """Addresses, in shared or in global memory, of activations as :class:`qmm.kernels.ops.layout.Activations` has them.

    Attributes:
        values: of the values.
        scales: of the scales.
        sums: of the sums.
        other_sums: bytes from the sums of first runs to those of second runs.
        zeros: zeros, for what a lane leaves out.
        diagonal: of the column whose runs the lane passes to mma_s8, or of zeros.
        inside: -1 where it is a column, else 0: a mask for offsets from ``diagonal``.
    """

    values: int
    scales: int
    sums: int
    other_sums: int
    zeros: int
    diagonal: int
    inside: int


def load_values(address):
    """Sixteen int8 activations, or eight float16."""
    return load_shared16(address) if c.X_SHARED else load_global16(address)


def load_all(address):
    """A float of each column."""
    return load_shared_floats(address, c.COLUMNS) if c.X_SHARED else load_global_floats(address, c.COLUMNS)


def load_pair(address):
    """A float of each of two neighbouring columns."""
    return load_shared_floats(address, 2) if c.X_SHARED else load_global_floats(address, 2)


def load_one(address):
    """A float."""
    (value,) = load_shared_floats(address, 1) if c.X_SHARED else load_global_floats(address, 1)
    return value
