"""The description of a block format: its geometry, the loads of a lane, and how they are unpacked to runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from qmm.kernels.lang.constants import Constants

__all__ = ["Format", "FormatConstants"]

RANDOM_BLOCKS = 8
"""How many of them :meth:`Format.check` tries."""


@dataclass(frozen=True)
class FormatConstants(Constants):
    """The compile-time constants of every kernel that reads blocks."""

    BLOCK_NBYTES: int
    """Bytes of a block."""
    BLOCK_RUNS: int
    """Runs of 16 weights in a block."""
    LANES: int
    """Lanes that share a block."""
    RUNS: int
    """Runs that a lane unpacks."""
    HAS_MINIMUM: bool
    """Whether a run has a minimum."""
    PLAIN: bool
    """Whether blocks are plain numbers, of which a row's last block may have fewer."""
    load: Callable[..., Any]
    """The registers that a lane loads of a block: ``load(block, lane)``."""
    unpack: Callable[..., Any]
    """Their runs: ``unpack(lane, *registers)``."""
    position: Callable[[int, int], int]
    """Which run of the block a lane's is: ``position(lane, i)``."""


@dataclass(frozen=True)
class Format:
    """One block format of GGUF, as runs of 16 weights ``w = scale * q - minimum``.

    A block is shared by ``lanes`` lanes; each unpacks ``runs`` runs of it, so ``16 * lanes * runs == block_weights``.

    load(block, lane)
        The registers that the lane needs, from memory at ``block`` (the block's first byte). Every byte it reads lies
        in the block.
    unpack(lane, \\*registers)
        ``runs`` triples ``(q, scale, minimum)``: ``q`` is Words of 16 signed bytes, the others float32.
    unpack_product(lane, \\*registers)
        As ``unpack``, for products. It may multiply a part of the scale into ``q``, so that more runs share the
        rest; a zero ``scale * q`` may have the other sign.
    position(lane, i)
        Which of the block's ``block_weights // 16`` runs the lane's ``i``-th one is.

    Its numbers are checked when it is made, its functions by :meth:`check`.

    A plain format (F32, F16, BF16) consists of numbers, not of blocks: ``block_weights`` is 16, its ``q`` is Floats,
    and the last block of a row may be partial (``row_nbytes``).
    """

    name: str
    block_weights: int
    block_nbytes: int
    lanes: int
    runs: int
    has_minimum: bool
    load: Callable[..., Any]
    unpack: Callable[..., Any]
    position: Callable[[int, int], int]
    alignment: int
    """In a tensor that is aligned to 16 bytes, an ``n``-byte load of ``load`` is at a multiple of ``min(n,
    alignment)``."""
    plain: bool = False
    pairs: bool = False
    """Whether the runs ``2 j`` and ``2 j + 1`` of a lane are neighbours, at an even position, and share their scale in
    products."""
    run_minima: bool = False
    """Of a format with pairs: whether the two runs have different minima."""
    unpack_product: Callable[..., Any] | None = None
    """None if it is ``unpack``."""
    short: bool = False
    """Of a plain format: whether its numbers have at most 11 significant bits, which tensor cores multiply exactly."""

    def __post_init__(self) -> None:
        for field in ("block_weights", "block_nbytes", "lanes", "runs", "alignment"):
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}: {field} must be at least 1, not {getattr(self, field)}")
        for field in ("lanes", "alignment"):  # kernels find lanes and aligned addresses by masks
            if (value := getattr(self, field)) & (value - 1):
                raise ValueError(f"{self.name}: {field} must be a power of two, not {value}")
        if 16 * self.lanes * self.runs != self.block_weights:
            raise ValueError(
                f"{self.name}: {self.lanes} lanes of {self.runs} runs of 16 make "
                f"{16 * self.lanes * self.runs} weights, the block holds {self.block_weights}"
            )
        if gcd(self.block_nbytes, 16) % self.alignment:
            raise ValueError(f"{self.name}: blocks of {self.block_nbytes} bytes cannot be aligned to {self.alignment}")
        if self.plain and self.block_weights != 16:
            raise ValueError(f"{self.name}: block_weights of a plain format must be 16, not {self.block_weights}")
        if self.short and not self.plain:
            raise ValueError(f"{self.name}: short is for plain formats, whose numbers tensor cores take as they are")
        if self.pairs and self.runs % 2:
            raise ValueError(f"{self.name}: runs must be even for pairs of them, not {self.runs}")
        if self.run_minima and not self.pairs:
            raise ValueError(f"{self.name}: run_minima says how the runs of pairs differ, but pairs is False")

    def check(self) -> None:
        """Check what the format's functions do with a block of zeros and with random ones; for the tests of a format.

        Each lane's ``load`` and ``unpack`` are run in the emulator.

        Raises:
            ValueError: ``unpack`` gives another number of runs than ``runs``, something else than ``(q, scale,
                minimum)``, or a minimum without ``has_minimum``; or ``position`` does not give each run of the block
                once, pairs side by side.
            EmulatorError: ``load`` reads bytes outside the block, or at a multiple of less than ``alignment``; or the
                index into a table is past its end.
        """
        from qmm.kernels.lang.fields import FieldAccess
        from qmm.kernels.lang.ptx.grid import thread_index
        from qmm.kernels.lang.targets.emulator import Memory, launch

        lanes = [[self.position(lane, i) for i in range(self.runs)] for lane in range(self.lanes)]
        places, count = sorted(place for lane in lanes for place in lane), self.block_weights // 16
        if places != list(range(count)):
            raise ValueError(f"{self.name}: position must give each of 0 to {count - 1} once, but gives {places}")
        for lane in lanes if self.pairs else ():
            for first, second in zip(lane[::2], lane[1::2], strict=True):
                if first % 2 or second != first + 1:
                    raise ValueError(f"{self.name}: position gives a pair {first} and {second}, not 2 j and 2 j + 1")

        def visit(block: int) -> None:
            if thread_index() == 0:  # one after the other, since a block may have more lanes than a CTA
                for lane in range(self.lanes):
                    for name in ("unpack", "unpack_product"):
                        if (unpack := getattr(self, name)) is not None:
                            runs = unpack(lane, *self.load(block, lane))
                            self._check_runs(f"{self.name}: {name} of lane {lane}", runs)

        memory, random = Memory(), np.random.default_rng(0)
        fields = FieldAccess(self.alignment, "global")
        for content in (bytes(self.block_nbytes), *(random.bytes(self.block_nbytes) for _ in range(RANDOM_BLOCKS))):
            block = memory.add(f"a block of {self.name}", content, constant=True, shift=self.alignment)
            launch(visit, {"block": block.start}, memory=memory, grid=1, threads=32, fields=fields)

    def _check_runs(self, what: str, runs: Any) -> None:
        if len(runs) != self.runs:
            raise ValueError(f"{what} gives {len(runs)} runs, not {self.runs}")
        for run in runs:
            if not isinstance(run, tuple) or len(run) != 3:
                raise ValueError(f"{what} gives {run!r}, not (q, scale, minimum)")
            q, _, minimum = run
            found = getattr(q, "dtype", type(q).__name__), getattr(q, "shape", ())
            wanted = (np.dtype(np.float32), (16,)) if self.plain else (np.dtype(np.uint32), (4,))
            if found != wanted:
                raise ValueError(f"{what} gives q as {found[0]} {found[1]}, not {wanted[0]} {wanted[1]}")
            if not self.has_minimum and minimum != 0:
                raise ValueError(f"{what} gives the minimum {minimum}, but has_minimum is False")

    def constants(self, product: bool = False) -> FormatConstants:
        """The compile-time constants of the format, for products or for other kernels."""
        return FormatConstants(
            BLOCK_NBYTES=self.block_nbytes,
            BLOCK_RUNS=self.block_weights // 16,
            LANES=self.lanes,
            RUNS=self.runs,
            HAS_MINIMUM=self.has_minimum,
            PLAIN=self.plain,
            load=self.load,
            unpack=(product and self.unpack_product) or self.unpack,
            position=self.position,
        )

    def run_step(self, at_once: int = 1) -> int:
        """The distance between every ``at_once``-th run of a lane, if it is the same for the whole block and even; else
        0."""
        steps = {
            self.position(lane, i + at_once) - self.position(lane, i)
            for lane in range(self.lanes)
            for i in range(0, self.runs - at_once, at_once)
        }
        step = steps.pop() if len(steps) == 1 else 1
        return 0 if step % 2 else step

    def blocks(self, k: int) -> int:
        """Blocks in a row of ``k`` weights, a partial one included."""
        return -(-k // self.block_weights)

    def row_nbytes(self, k: int) -> int:
        """Bytes of a row of ``k`` weights.

        Raises:
            ValueError: ``k`` is no multiple of the block.
        """
        if self.plain:
            return k * self.block_nbytes // self.block_weights
        if k % self.block_weights:
            raise ValueError(f"{self.name} rows are whole blocks of {self.block_weights} weights, not {k}")
        return k // self.block_weights * self.block_nbytes
