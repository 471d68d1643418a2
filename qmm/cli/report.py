"""What the commands report: one data model, shown as tables or written as one JSON document.

A command builds a :class:`Report`; ``document()`` is what ``--json`` prints and ``blocks()`` what people see. In
JSON a value that was not measured is null, and a non-finite value is the string ``"nan"``, ``"inf"`` or ``"-inf"``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from qmm.cli.tables import Block, Facts, Table, dimensions, mark, plain, scientific, significant, worst
from qmm.output import json_text

__all__ = [
    "DemoReport",
    "DemoRow",
    "GuardCheck",
    "Report",
    "RunReport",
    "SmokeReport",
    "Step",
    "TensorCheck",
    "VerifyReport",
]


@dataclass(frozen=True)
class Report:
    """What one command found; ``ok`` False makes its exit code 1."""

    command: ClassVar[str]

    @property
    def ok(self) -> bool:
        """Whether every check of the command passed."""
        return True

    def blocks(self) -> Iterator[Block]:
        """The report for people, from top to bottom."""
        raise NotImplementedError

    def document(self) -> str:
        """The report for programs: one JSON object."""
        return json_text({"command": self.command, "ok": self.ok, **plain(self)}, indent=2)


# qmm run, qmm verify --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunReport(Report):
    """``qmm run``: one product, timed and checked. ``gflops`` are 1e9 operations a second, two a weight and column."""

    command: ClassVar[str] = "run"
    file: str
    tensor: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    device: str
    placement: str
    explanation: str
    activations: str
    n: int
    seed: int
    y: tuple[float, ...]
    ms: float
    repeats: int
    gb_per_s: float
    nmse: float
    tolerance: float
    gflops: float = field(init=False)

    def __post_init__(self) -> None:
        operations = 2 * math.prod(self.shape) * self.n
        object.__setattr__(self, "gflops", operations / self.ms / 1e6 if self.ms else math.nan)

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; not-a-number is not."""
        return self.nmse <= self.tolerance

    def blocks(self) -> Iterator[Block]:
        """The report for people."""
        speed = f"{significant(self.gb_per_s)} GB/s of weights"
        if self.n > 1:
            speed += f", {significant(self.gflops)} GFLOP/s"
        yield Facts(
            [
                ("tensor", f"{self.tensor}: {dimensions(self.shape)} {self.type}, {self.nbytes:,} bytes"),
                ("engine", self.explanation),
                ("x", f"{self.n} x {self.shape[-1]}, standard normal, seed {self.seed}, as {self.activations}"),
                ("y", " ".join(f"{value:.5g}" for value in self.y) + (" ..." if self.y else "")),
                ("time", f"{significant(self.ms)} ms, median of {self.repeats} products with warm caches"),
                ("speed", speed),
                ("NMSE", f"{scientific(self.nmse)}, at most {scientific(self.tolerance)} is right: {mark(self.ok)}"),
            ]
        )


@dataclass(frozen=True)
class TensorCheck:
    """One tensor against the oracle; ``bit_exact`` and members of ``nmse`` are None where they were not asked for.

    ``nmse`` is by activations, and for each of them the worst over all numbers of columns.
    """

    tensor: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    supported: bool
    bit_exact: bool | None
    nmse: Mapping[str, float | None]
    ok: bool


@dataclass(frozen=True)
class GuardCheck:
    """One tensor between guards (:mod:`qmm.verify.paranoid`): the checks that ran, and the failure, None if there is
    none."""

    tensor: str
    products: int
    dequantizations: int
    failure: str | None


@dataclass(frozen=True)
class VerifyReport(Report):
    """``qmm verify``: every tensor against ``gguf.quants.dequantize``. Unsupported ones do not fail."""

    command: ClassVar[str] = "verify"
    file: str
    device: str
    placement: str
    explanation: str
    n: tuple[int, ...]
    tolerances: Mapping[str, float]
    seconds: float
    checks: tuple[TensorCheck, ...]
    guards: tuple[GuardCheck, ...] | None = None

    @property
    def ok(self) -> bool:
        """Whether no tensor failed."""
        return all(check.ok for check in self.checks) and not any(guard.failure for guard in self.guards or ())

    def blocks(self) -> Iterator[Block]:
        """The report for people."""
        yield Facts([("file", self.file), ("engine", self.explanation), ("n", ", ".join(map(str, self.n)))])
        yield Table(
            "tensors against gguf: weights exact to the bit, NMSE of products by activations",
            ("~tensor", "type", ">shape", "exact", *(f">{mode}" for mode in self.tolerances), "ok"),
            [
                (
                    check.tensor,
                    check.type,
                    dimensions(check.shape),
                    mark(check.bit_exact),
                    *(scientific(check.nmse[mode]) for mode in self.tolerances),
                    mark(check.ok) if check.supported else "no kernel",
                )
                for check in self.checks
            ],
        )
        failed = [check.tensor for check in self.checks if not check.ok]
        without = sum(not check.supported for check in self.checks)
        limits = ", ".join(f"{limit:.0e} ({mode})" for mode, limit in self.tolerances.items())
        yield (
            f"{len(self.checks) - without} tensors checked in {self.seconds:.1f} s, {without} without a kernel, "
            f"{len(failed)} failed{': ' + ', '.join(failed) if failed else ''}. NMSE may be at most {limits}."
        )
        if self.guards is not None:
            yield from self._proof(self.guards)

    def _proof(self, guards: Sequence[GuardCheck]) -> Iterator[Block]:
        """The conclusion of the checks between guards, or the tensors that failed."""
        failed = [(guard.tensor, guard.failure) for guard in guards if guard.failure]
        if failed:
            yield Table("between guards", ("~tensor", "~failed"), failed)
        held = [guard for guard in guards if not guard.failure and guard.products + guard.dequantizations]
        products = sum(guard.products for guard in held)
        dequantizations = sum(guard.dequantizations for guard in held)
        yield (
            f"Between guards: {products:,} products and {dequantizations:,} dequantizations with {len(held)} tensors; "
            "tensor, x and y each lay at the first and at the last byte of memory that faults beyond, and nothing "
            "beyond was touched. Beside bytes of 0x00 and beside bytes of 0xFF, which are NaN, the results were the "
            f"same to the bit, and no byte beside y was written. {len(failed)} tensors failed."
        )


# qmm smoke, qmm demo --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of ``qmm smoke``; ``ok`` is None if it was not reached."""

    number: int
    name: str
    ok: bool | None
    result: str
    ms: float | None


@dataclass(frozen=True)
class SmokeReport(Report):
    """``qmm smoke``: the way of a file's bytes to a kernel, in eight steps."""

    command: ClassVar[str] = "smoke"
    file: str
    steps: tuple[Step, ...]
    advice: str | None

    @property
    def ok(self) -> bool:
        """Whether every step was reached and passed."""
        return all(step.ok for step in self.steps)

    def blocks(self) -> Iterator[Block]:
        """The report for people."""
        rows = [(step.number, step.name, mark(step.ok), significant(step.ms), step.result) for step in self.steps]
        yield Table(f"smoke: {self.file}", (">#", "~step", "ok", ">ms", "~result"), rows)
        if self.advice:
            yield self.advice


@dataclass(frozen=True)
class DemoRow:
    """All tensors of one type and shape: ``ms`` is the median over them, the NMSE the worst."""

    type: str
    shape: tuple[int, ...]
    tensors: int
    nbytes: int
    ms: float
    gb_per_s: float
    bit_exact: bool
    nmse: Mapping[str, float | None]
    ok: bool


@dataclass(frozen=True)
class DemoReport(Report):
    """``qmm demo``: a whole model multiplied, timed and checked."""

    command: ClassVar[str] = "demo"
    file: str
    tensors: int
    nbytes: int
    open_ms: float
    device: str
    placement: str
    explanation: str
    smoke: SmokeReport | None
    tolerances: Mapping[str, float]
    rows: tuple[DemoRow, ...]
    compile_seconds: float
    seconds: float
    conclusion: str

    @property
    def ok(self) -> bool:
        """Whether every tensor and, where it ran, the smoke test passed."""
        return all(row.ok for row in self.rows) and (self.smoke is None or self.smoke.ok)

    def blocks(self) -> Iterator[Block]:
        """The report for people."""
        yield Facts(
            [
                ("file", self.file),
                ("opened", f"{self.tensors} tensors, {self.nbytes:,} bytes, in {significant(self.open_ms)} ms"),
                ("engine", self.explanation),
            ]
        )
        if self.smoke is not None:
            yield from self.smoke.blocks()
        rows: list[Sequence[object]] = [
            (
                row.type,
                dimensions(row.shape),
                row.tensors,
                significant(row.nbytes / 1e6),
                significant(row.ms),
                significant(row.gb_per_s),
                mark(row.bit_exact),
                *(scientific(row.nmse[mode]) for mode in self.tolerances),
                mark(row.ok),
            )
            for row in self.rows
        ]
        totals = [worst(row.nmse[mode] for row in self.rows) for mode in self.tolerances]
        rows.append(
            [
                "all",
                "-",
                self.tensors,
                significant(self.nbytes / 1e6),
                "-",
                "-",
                mark(all(row.bit_exact for row in self.rows)),
                *map(scientific, totals),
                mark(self.ok),
            ]
        )
        headers = (
            "type",
            ">shape",
            ">count",
            ">MB",
            ">ms",
            ">GB/s",
            "exact",
            *(f">{mode}" for mode in self.tolerances),
        )
        title = "every tensor multiplied, n = 1: time a product, weights exact to the bit, NMSE by activations"
        yield Table(title, (*headers, "ok"), rows, last_is_total=True)
        yield (f"{self.conclusion} It took {self.seconds:.0f} s, {self.compile_seconds:.0f} s of them compiling.")
