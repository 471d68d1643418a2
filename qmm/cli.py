"""The command line: options, progress, and what becomes of errors. The work is in info, verify, smoke and demo."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

import qmm
from qmm.errors import QmmError, TensorNotFoundError, UnsupportedTypeError
from qmm.report import Report

if TYPE_CHECKING:
    from qmm.engine import Engine
    from qmm.model import Model

__all__ = ["app", "main"]

CHECK_FAILED = 1
ERROR = 3
PLAIN_WIDTH = 200
"""Columns of a table that is not shown on a terminal, where nothing should be cut off."""

EPILOG = (
    "Exit codes: 0, all is well; 1, a check failed (a product outside its tolerance, a step of smoke); 2, the command "
    "line is wrong; 3, an error, whose message is on stderr, and with --json on stdout too, as "
    '{"error": {"type": ..., "message": ...}}; 130, interrupted by Ctrl-C.'
)

app = typer.Typer(
    name="qmm",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an error that is not a QmmError is a bug, and its traceback is for copying
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Activations(StrEnum):
    """How ``x`` is stored for a product."""

    int8 = "int8"
    f16 = "f16"


class CheckedActivations(StrEnum):
    """The same, for commands that check both."""

    int8 = "int8"
    f16 = "f16"
    both = "both"


class Placement(StrEnum):
    """Where the weights are read from."""

    auto = "auto"
    mapped = "mapped"
    device = "device"
    host = "host"


# Options that several commands have.
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file; of a split model, any of its files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
DeviceOption = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or N.")]
PlacementOption = Annotated[
    Placement,
    typer.Option(help="mapped: the GPU reads the file's mapping. device: a copy on the GPU. host: the CPU."),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of the random activations.")]
TensorsOption = Annotated[str, typer.Option(metavar="PATTERN", help="Only tensors of such names, as in 'blk.0.*'.")]


def main() -> None:
    """The ``qmm`` command.

    Raises:
        SystemExit: always; with the exit code.
    """
    app(prog_name="qmm")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"qmm {qmm.__version__}")
        raise typer.Exit


@app.callback()
def tour(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Multiply by the quantized weights of a GGUF file where they lie.

    Begin with `qmm demo` (a real model from end to end) or `qmm info FILE`.
    """


@app.command(epilog=EPILOG)
def demo(
    device: DeviceOption = "auto",
    placement: PlacementOption = Placement.auto,
    folder: Annotated[
        Path | None, typer.Option(help="Where the model (253 MB) is kept; else the user's cache.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Everything on a real model: opened, multiplied, timed and checked, tensor by tensor.

    The model is Gemma 3 270M, which the extra `demo` brings as a package. It takes about a minute.
    """

    def work(bar: Bar) -> Report:
        from qmm.demo import demo as walk
        from qmm.demo import model_file
        from qmm.kernels.cache import cache_folder

        bar.stage("putting the model together")
        path = model_file(folder or cache_folder())
        return walk(path, _device(device), placement.value, bar.stage, bar.start, lambda tensor: bar.step(tensor.name))

    _present(work, as_json)


@app.command(epilog=EPILOG)
def info(
    file: FileArgument,
    tensors: TensorsOption = "*",
    arrays: Annotated[bool, typer.Option("--arrays", help="Read the metadata's arrays and long texts too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What a file holds: metadata, tensors, types, and which tensors ggml would have to pad on a GPU."""

    def work(bar: Bar) -> Report:
        from qmm.info import describe

        with qmm.open(file) as model:
            return describe(model, tensors, arrays)

    _present(work, as_json)


@app.command(epilog=EPILOG)
def run(
    file: FileArgument,
    tensor: Annotated[
        str | None, typer.Argument(metavar="[TENSOR]", help="Its name; else the largest matrix.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Columns: rows of x.")] = 1,
    seed: SeedOption = 0,
    activations: Annotated[Activations, typer.Option(help="How x is stored.")] = Activations.int8,
    repeats: Annotated[int, typer.Option(min=1, help="Products that the time is the median of.")] = 20,
    device: DeviceOption = "auto",
    placement: PlacementOption = Placement.auto,
    as_json: JsonOption = False,
) -> None:
    """Multiply random activations by one tensor: the result, the time, and the error against float64."""

    def work(bar: Bar) -> Report:
        from qmm.verify import largest
        from qmm.verify import run as product

        with qmm.open(file) as model:
            chosen = largest(model) if tensor is None else model[tensor]
            if chosen is None:
                raise UnsupportedTypeError(
                    f"{file}: has no matrix that qmm has a kernel for. `qmm info` lists the types."
                )
            with _engine(model, device, placement, [chosen.name]) as engine:
                bar.stage(f"compiling and multiplying by {chosen.name}")
                return product(engine, chosen, n, activations.value, seed, repeats)

    _present(work, as_json)


@app.command(epilog=EPILOG)
def verify(
    file: FileArgument,
    tensors: TensorsOption = "*",
    n: Annotated[str, typer.Option("--n", metavar="N,...", help="Numbers of columns to multiply by.")] = "1,2,8",
    seed: SeedOption = 0,
    activations: Annotated[
        CheckedActivations, typer.Option(help="How x is stored: one way, or both in turn.")
    ] = CheckedActivations.both,
    device: DeviceOption = "auto",
    placement: PlacementOption = Placement.auto,
    paranoid: Annotated[
        bool, typer.Option("--paranoid", help="Then again between memory that faults, and among poison.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every tensor: dequantized bit for bit against gguf, multiplied against float64.

    Tensors of a type without a kernel are listed and do not fail. With --paranoid all is done again, in a child
    process, with tensor, x and y at the very beginning and the very end of memory, and beside bytes that are NaN.
    """
    columns = _columns(n)

    def work(bar: Bar) -> Report:
        from qmm.verify import verify as check_all

        modes = ["int8", "f16"] if activations.value == "both" else [activations.value]
        with qmm.open(file) as model:
            chosen = [tensor for tensor in model.values() if fnmatchcase(tensor.name, tensors)]
            if not chosen:
                raise TensorNotFoundError(f"{file}: none of its {len(model)} tensors is called like {tensors!r}.")
            with _engine(model, device, placement, [tensor.name for tensor in chosen]) as engine:
                bar.stage(engine.explanation)
                bar.start(len(chosen))
                report = check_all(engine, model, chosen, columns, modes, seed, lambda tensor: bar.step(tensor.name))
                used = engine.device, engine.placement
        if not paranoid:
            return report
        from qmm.paranoid import Job, check_guarded

        names = tuple(tensor.name for tensor in chosen)
        bar.stage(f"between guards, {used[1]}")
        bar.start(len(names))
        job = Job(str(file), *used, names, columns, tuple(modes), seed)
        return replace(report, guards=tuple(check_guarded(job, bar.step)))

    _present(work, as_json)


@app.command(epilog=EPILOG)
def smoke(
    file: FileArgument,
    device: Annotated[int, typer.Option(min=0, help="CUDA's number of the GPU.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Eight steps from a file to a GPU kernel that reads it, each with its result and time."""

    def work(bar: Bar) -> Report:
        from qmm.smoke import smoke as walk

        bar.stage("eight steps")
        return walk(file, device)

    _present(work, as_json)


class Bar:
    """Progress on stderr: a bar on a terminal, else one line for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def stage(self, text: str) -> None:
        """Say what happens next."""
        self._progress.update(self._task, description=text)
        if self._progress.disable:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, total: int) -> None:
        """From here on ``total`` steps follow."""
        self._progress.reset(self._task, total=total, description="")

    def step(self, text: str) -> None:
        """One of them is done."""
        self._progress.update(self._task, advance=1, description=text)


@contextmanager
def _bar() -> Iterator[Bar]:
    console = Console(stderr=True)
    columns = [SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    text = TextColumn("{task.description}", markup=False)
    progress = Progress(*columns, text, console=console, transient=True, disable=not console.is_terminal)
    try:
        progress.start()
    except RuntimeError:  # a thread draws the bar, and the system may refuse it
        progress.stop()
        progress.disable = True
    try:
        yield Bar(progress)
    finally:
        progress.stop()


def _present(work: Callable[[Bar], Report], as_json: bool) -> None:
    """Do the work, print its report or its error, and leave with the exit code that belongs to it."""
    try:
        with _bar() as bar:
            report = work(bar)
    except QmmError as error:
        if as_json:
            typer.echo(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}, ensure_ascii=False))
        console = Console(stderr=True)
        console.print("error: ", style="bold red", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(ERROR) from error
    if as_json:
        typer.echo(report.document())
    else:
        narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
        console = Console(width=None if narrow else PLAIN_WIDTH, highlight=False)
        for renderable in report.renderables():
            console.print(renderable, soft_wrap=isinstance(renderable, Text))  # sentences stay on one line
    if not report.ok:
        raise typer.Exit(CHECK_FAILED)


def _device(device: str) -> str | int:
    return int(device) if device.isdecimal() else device


def _columns(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of whole numbers above 0, such as 1,2,8", param_hint="'--n'")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _engine(model: Model, device: str, placement: Placement, tensors: list[str]) -> Engine:
    from qmm.engine import Engine

    return Engine(model, _device(device), placement.value, tensors=tensors, probe=True)
