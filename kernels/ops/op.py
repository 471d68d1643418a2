"""Ops: planners of kernel launches.

An op is a pure planner. From shapes, a format and an :class:`Architecture` it plans :class:`Work`: which kernels, with
which arguments, and how much workspace. It allocates nothing and calls nothing of CUDA, so it is tested without a GPU;
:class:`qmm.device.Device` executes. Arguments are named as in the kernel's signature. An address that differs from call
to call is :class:`At` an offset from a base, which is bound when the work is queued: so one plan serves all arrays of
the same layout, and weights that have moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qmm.kernels.runtime.kernel import Kernel

__all__ = [
    "BASES",
    "DTYPES",
    "ITEM_NBYTES",
    "Architecture",
    "At",
    "LaunchSpec",
    "Operand",
    "Slab",
    "WeightLayout",
    "Work",
    "alignment_of",
    "rounded",
]

BASES = ("weights", "x", "y", "workspace", "zeros")
"""The bases of addresses: a tensor's first byte, the first element of the activations and of the results, the call's
workspace, and device memory that is zero."""
WORKSPACE_ALIGNMENT = 256
MOST_CTAS = (1 << 31) - 1
CTAS_PER_SM = 4
"""CTAs of 16 warps that fill the 64 warps of an SM."""
DTYPES = ("float32", "float16", "bfloat16")
"""Of activations and results."""
ITEM_NBYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Architecture:
    """The properties of a GPU that plans depend on.

    Attributes:
        sms: how many SMs it has.
        shared_nbytes: the most shared memory of a CTA.
        bulk: whether it has bulk copies and starts kernels before their predecessors end (sm_90 and later).
        l2_nbytes: the size of its L2 cache.
        bus_bits: the width of its memory bus, which tells an H200 from an H100.
    """

    sms: int
    shared_nbytes: int
    bulk: bool
    l2_nbytes: int = 0
    bus_bits: int = 0

    def ctas_for(self, wanted: int) -> int:
        """CTAs of 16 warps to launch: ``wanted``, but at most as many as the GPU holds at once."""
        return max(1, min(wanted, self.sms * CTAS_PER_SM))


class At(NamedTuple):
    """An argument that is an address: byte ``offset`` from ``base``, one of BASES."""

    base: str
    offset: int = 0


@dataclass(frozen=True)
class LaunchSpec:
    """One launch.

    Attributes:
        kernel: what is launched.
        ctas: how many CTAs.
        arguments: a value or an address for each parameter of the kernel, by name.
        shared_nbytes: dynamic shared memory of a CTA.
        early: whether it may start before its predecessor ends (programmatic dependent launch).

    Raises:
        ValueError: there are no CTAs or too many, or an address has none of BASES.
    """

    kernel: Kernel
    ctas: int
    arguments: Mapping[str, int | At]
    shared_nbytes: int = 0
    early: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.ctas <= MOST_CTAS:
            raise ValueError(f"{self.kernel.name}: ctas = {self.ctas}; a launch has 1 to {MOST_CTAS}")
        for name, value in self.arguments.items():
            if isinstance(value, At) and value.base not in BASES:
                raise ValueError(f"{self.kernel.name}: {name} = {value}; the base is one of {', '.join(BASES)}")

    @classmethod
    def of(
        cls, kernel: Kernel, ctas: int, *, shared_nbytes: int = 0, early: bool = False, **arguments: int | At
    ) -> LaunchSpec:
        """A launch with its arguments by name.

        Raises:
            TypeError: arguments are missing or unknown; the message names them.
            ValueError: as the constructor.
        """
        kernel.check(arguments)
        return cls(kernel, ctas, arguments, shared_nbytes, early)


@dataclass(frozen=True)
class Work:
    """The launches of a call, in order, and the workspace they need.

    Attributes:
        launches: see :class:`LaunchSpec`.
        workspace_nbytes: temporary device memory, at a multiple of 256 bytes.
    """

    launches: tuple[LaunchSpec, ...]
    workspace_nbytes: int = 0


class Slab(NamedTuple):
    """A part of an array that is two-dimensional in memory: ``rows`` rows from row ``first`` on, ``offset`` bytes from
    the array's first element; strides in bytes."""

    first: int
    rows: int
    offset: int
    row_stride: int
    column_stride: int


@dataclass(frozen=True)
class Operand:
    """Activations or results as a matrix: its rows are the last axis of an array.

    Attributes:
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        columns: of a row.
        slabs: all rows, in parts.
        aligned: whether its address is a multiple of 16.
        reach: its lowest byte and the one after its highest, from its first element on.
    """

    dtype: str
    columns: int
    slabs: tuple[Slab, ...]
    aligned: bool
    reach: tuple[int, int]

    @classmethod
    def contiguous(cls, rows: int, columns: int, dtype: str = "float32") -> Operand:
        """A row-major matrix without gaps, at a multiple of 16 bytes."""
        item = ITEM_NBYTES[dtype]
        slabs = (Slab(0, rows, 0, columns * item, item),)
        return cls(dtype, columns, slabs, True, (0, rows * columns * item))

    @property
    def rows(self) -> int:
        """Rows of all slabs."""
        return sum(slab.rows for slab in self.slabs)

    @property
    def dense(self) -> bool:
        """Whether it is float32, row-major and without gaps: a kernel may store its results there directly."""
        (first, *others) = self.slabs
        gapless = first.column_stride == 4 or self.columns == 1
        followed = first.row_stride == 4 * self.columns or first.rows == 1
        return self.dtype == "float32" and not others and gapless and followed


class WeightLayout(NamedTuple):
    """The properties of a weight's memory that plans depend on.

    Attributes:
        alignment: of its first byte, a power of two up to 16.
        mapped: whether it is read over the link to the host, uncached.
    """

    alignment: int
    mapped: bool

    @classmethod
    def at(cls, address: int, mapped: bool = False) -> WeightLayout:
        """The layout of a weight at an address."""
        return cls(alignment_of(address), mapped)


def alignment_of(number: int) -> int:
    """The largest power of two up to 16 that a number divides by."""
    return min(16, number & -number) if number else 16


def rounded(nbytes: int) -> int:
    """``nbytes`` rounded up to a multiple of 256, at which the parts of a workspace begin."""
    return -(-nbytes // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
