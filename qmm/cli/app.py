"""The command line: options, progress, and how errors are reported. The work is in info, verify, smoke and demo."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import qmm
from qmm.cli import interrupts
from qmm.cli.options import (
    ActivationsOption,
    ArraysOption,
    CheckedActivationsOption,
    CheckedColumnsOption,
    ColumnsOption,
    DeviceOption,
    FileArgument,
    FolderOption,
    GPUOption,
    JsonOption,
    ParanoidOption,
    PlacementOption,
    RepeatsOption,
    SeedOption,
    TensorArgument,
    TensorsOption,
)
from qmm.cli.progress import Bar
from qmm.cli.report import Report
from qmm.cli.tables import lines_of
from qmm.errors import PatternError, QmmError, UnsupportedTypeError
from qmm.output import OutputError, json_text, line_width, say, show, take_streams

if TYPE_CHECKING:
    from qmm.engine import Engine
    from qmm.model import Model

__all__ = ["app", "main"]

CHECK_FAILED = 1
USAGE = 2
ERROR = 3
PIPE_CLOSED = 141  # as a shell shows SIGPIPE

OUT_OF_MEMORY = "there is not enough memory. Fewer columns (--n) or fewer tensors need less."
EPILOG = (
    "Exit codes: 0, all is well; 1, a check failed (a product outside its tolerance, a step of smoke); 2, the command "
    "line is wrong, or a pattern matches no tensor; 3, an error, whose message is on stderr, and with --json on stdout "
    'too, as {"error": {"type": ..., "message": ...}}; 130, interrupted by Ctrl-C; 141, stdout is a closed pipe.'
)
# The base of all errors in the command line, which typer does not export.
UsageError: Any = typer.BadParameter.__mro__[1]


class _Command(TyperCommand):
    """A command whose help shows the meaning of its arguments, not their types."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What follows the command's name in its usage."""
        return ["[OPTIONS]", *(str(param.metavar) for param in self.params if param.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the lists of arguments and options."""
        params: list[Any] = self.get_params(ctx)
        arguments = [(param.metavar, param.help) for param in params if param.param_type_name == "argument"]
        options = [param.get_help_record(ctx) for param in params if param.param_type_name == "option"]
        for title, records in (("Arguments", arguments), ("Options", options)):
            if records:
                with formatter.section(title):
                    formatter.write_dl([(name, text.replace("\\[", "[")) for name, text in records])


class _Group(TyperGroup):
    """The commands; errors in the command line are printed as all others are."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        """Run the command that the arguments name, and exit."""
        try:
            status = super().main(*arguments, **{**settings, "standalone_mode": False})
        except UsageError as error:
            asked = f"{error.ctx.command_path if error.ctx else 'qmm'} --help"
            if type(error).__name__ == "NoArgsIsHelpError":
                show(error.ctx.get_help().split("\n"))
            else:
                say(f"error: {error.format_message().rstrip('.')}. Try `{asked}`.")
            status = USAGE
        sys.exit(status)


app = typer.Typer(
    name="qmm",
    cls=_Group,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help and errors as plain text: no boxes, and nothing of theirs is markup
    pretty_exceptions_enable=False,  # main() prints what is left
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The ``qmm`` command.

    Raises:
        SystemExit: always; with the exit code.
    """
    try:
        interrupts.watch()
        take_streams()
        try:
            app(prog_name="qmm")
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(interrupts.INTERRUPTED)
    except OutputError as error:
        if error.pipe_closed:
            sys.exit(PIPE_CLOSED)
        say(f"error: {error}")
        sys.exit(ERROR)
    except Exception:
        if interrupts.was_interrupted():
            sys.exit(interrupts.INTERRUPTED)
        for line in traceback.format_exc().splitlines():
            say(line)
        say("error: this is a fault in qmm. Please report it with the lines above.")
        sys.exit(ERROR)  # and not Python's 1, which would be a failed check


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


@app.command(cls=_Command, short_help="Multiply by a whole real model, and check it.", epilog=EPILOG)
def demo(
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Everything on a real model: opened, multiplied, timed and checked, tensor by tensor.

    The model is Gemma 3 270M, a package that the extra `demo` installs. It takes about a minute.
    """

    def work(bar: Bar) -> Report:
        from qmm.cli.demo import demo as walk
        from qmm.cli.demo import model_file
        from qmm.folders import cache_folder

        bar.stage("putting the model together")
        path = model_file(folder or cache_folder())
        return walk(path, device, placement, bar.stage, bar.start, lambda tensor: bar.step(tensor.name))

    _present(work, as_json)


@app.command(cls=_Command, short_help="What a file holds: metadata, tensors, types.", epilog=EPILOG)
def info(
    file: FileArgument,
    tensors: TensorsOption = "*",
    arrays: ArraysOption = False,
    as_json: JsonOption = False,
) -> None:
    """What a file holds: metadata, tensors, types, and which tensors ggml would have to pad on a GPU."""

    def work(bar: Bar) -> Report:
        from qmm.cli.info import describe

        with qmm.open(file) as model:
            return describe(model, tensors, arrays)

    _present(work, as_json)


@app.command(cls=_Command, short_help="Multiply by one tensor: result, time, error.", epilog=EPILOG)
def run(
    file: FileArgument,
    tensor: TensorArgument = None,
    n: ColumnsOption = 1,
    seed: SeedOption = 0,
    activations: ActivationsOption = "int8",
    repeats: RepeatsOption = 20,
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Multiply random activations by one tensor: the result, the time, and the error against float64."""

    def work(bar: Bar) -> Report:
        from qmm.verify.check import largest
        from qmm.verify.check import run as product

        with qmm.open(file) as model:
            chosen = largest(model) if tensor is None else model[tensor]
            if chosen is None:
                types = ", ".join(dict.fromkeys(tensor.type for tensor in model.values()))
                raise UnsupportedTypeError(
                    f"{model.path}: has no tensor to multiply by: "
                    + (f"qmm has no kernel for {types}, or they are empty." if types else "it holds none at all.")
                    + f" See `qmm info {model.path}`."
                )
            with _engine(model, device, placement, [chosen.name]) as engine:
                bar.stage(f"compiling and multiplying by {chosen.name}")
                return product(engine, chosen, n, activations, seed, repeats)

    _present(work, as_json)


@app.command(cls=_Command, short_help="Check the products of every tensor.", epilog=EPILOG)
def verify(
    file: FileArgument,
    tensors: TensorsOption = "*",
    n: CheckedColumnsOption = "1,2,8",
    seed: SeedOption = 0,
    activations: CheckedActivationsOption = "both",
    device: DeviceOption = "auto",
    placement: PlacementOption = "auto",
    paranoid: ParanoidOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check every tensor: dequantized bit for bit against gguf, multiplied against float64.

    Tensors of a type without a kernel are listed and do not fail. With --paranoid all is done again, in a child
    process, with tensor, x and y at the first and the last byte of memory, and surrounded by NaN bytes.
    """
    columns: tuple[int, ...] = n

    def work(bar: Bar) -> Report:
        from qmm.verify.check import checkable
        from qmm.verify.check import verify as check_all

        modes = ["int8", "f16"] if activations == "both" else [activations]
        with qmm.open(file) as model:
            chosen = checkable(model, tensors)
            with _engine(model, device, placement, [tensor.name for tensor in chosen]) as engine:
                bar.stage(engine.explanation)
                bar.stage(f"checking {len(chosen)} tensors, n = {', '.join(map(str, columns))}")
                bar.start(len(chosen))
                report = check_all(engine, model, chosen, columns, modes, seed, lambda tensor: bar.step(tensor.name))
                used = engine.device, engine.placement
                identities = tuple(known.identity for known in model.known)
        if not paranoid:
            return report
        from qmm.verify.paranoid import Job, check_guarded

        names = tuple(tensor.name for tensor in chosen)
        bar.stage(f"checking {len(names)} tensors between guards, {used[1]}")
        bar.start(len(names))
        job = Job(str(file), *used, names, columns, tuple(modes), seed, identities)
        return replace(report, guards=tuple(check_guarded(job, bar.step)))

    _present(work, as_json)


@app.command(cls=_Command, short_help="Try, step by step, whether a GPU can read a file.", epilog=EPILOG)
def smoke(
    file: FileArgument,
    device: GPUOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Eight steps from a file to a GPU kernel that reads it, each with its result and time."""

    def work(bar: Bar) -> Report:
        from qmm.cli.smoke import smoke as walk

        bar.stage("eight steps from the file to a GPU kernel")
        return walk(file, device)

    _present(work, as_json)


def _present(work: Callable[[Bar], Report], as_json: bool) -> None:
    """Do the work, print its report or its error, and leave with the exit code that belongs to it."""
    try:
        try:
            with Bar() as bar:
                report = work(bar)
        finally:
            interrupts.check()  # which may have become another error, or been lost
        show(report.document().split("\n") if as_json else lines_of(report.blocks(), line_width()))
    except (QmmError, MemoryError) as error:
        text = str(error) if isinstance(error, QmmError) else f"{OUT_OF_MEMORY} {error}".strip()
        say(f"error: {text}")
        if as_json:
            show([json_text({"error": {"type": type(error).__name__, "message": text}})])
        raise typer.Exit(USAGE if isinstance(error, PatternError) else ERROR) from error
    if not report.ok:
        raise typer.Exit(CHECK_FAILED)


def _engine(model: Model, device: str, placement: str, tensors: list[str]) -> Engine:
    from qmm.engine import Engine

    return Engine(model, device, placement, tensors=tensors, probe=True)
