"""Options of the command line: their help and their parsers.

A parser's error names the valid values. typer also passes it the default, unparsed, which is why parsers of numbers
take any object.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "ActivationsOption",
    "ArraysOption",
    "CheckedActivationsOption",
    "CheckedColumnsOption",
    "ColumnsOption",
    "DeviceOption",
    "FileArgument",
    "FolderOption",
    "GPUOption",
    "JsonOption",
    "ParanoidOption",
    "PlacementOption",
    "RepeatsOption",
    "SeedOption",
    "TensorArgument",
    "TensorsOption",
]


def _one_of(*names: str) -> Callable[[str], str]:
    """A parser of a choice of names."""

    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(names)}.")
        return text

    return parse


def _device(text: str) -> str:
    """``--device``, as engines take it."""
    if re.fullmatch("[0-9]+", text):
        return f"cuda:{text}"
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise typer.BadParameter(f"{text!r} is not a device. Choose auto, cpu, cuda or cuda:N, with CUDA's number N.")
    return text


def _gpu(text: str) -> int:
    """``--device`` of a command that needs a GPU: CUDA's number of it."""
    device = _device(text)
    if device == "cpu":
        raise typer.BadParameter("smoke is about GPUs. Choose auto, cuda or cuda:N, with CUDA's number N.")
    return int(device.partition(":")[2] or 0)


def _name(text: str) -> str:
    """A name or a pattern as files have it, which is UTF-8 whatever the terminal's encoding is."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def _whole(minimum: int) -> Callable[[object], int]:
    """A parser of integers from ``minimum`` on."""

    def parse(value: object) -> int:
        if not re.fullmatch("[0-9]{1,12}", str(value)) or int(str(value)) < minimum:
            raise typer.BadParameter(f"{value!r} is not an integer from {minimum} on, of at most 12 digits.")
        return int(str(value))

    return parse


def _columns(text: str) -> tuple[int, ...]:
    """``--n`` of ``verify``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,12}", part) and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of integers above 0, of at most 12 digits, such as 1,2,8.")
    return tuple(dict.fromkeys(map(int, parts)))


# Arguments and options, in the order of the commands' help.
FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="A GGUF file; of a split model, any of its files.", show_default=False)
]
TensorArgument = Annotated[
    str | None,
    typer.Argument(
        parser=_name,
        metavar="[TENSOR]",
        help="A tensor's name; without it, the largest matrix.",
        show_default=False,
    ),
]
TensorsOption = Annotated[
    str,
    typer.Option(
        "--tensors", parser=_name, metavar="PATTERN", help="Only tensors whose names match, as 'blk.0.*' does."
    ),
]
ArraysOption = Annotated[bool, typer.Option("--arrays", help="Read the metadata's arrays and long texts too.")]
ColumnsOption = Annotated[
    int, typer.Option("--n", parser=_whole(1), metavar="N", help="Columns (rows of x), 1 or more.")
]
CheckedColumnsOption = Annotated[
    Any, typer.Option("--n", parser=_columns, metavar="N,...", help="Numbers of columns (rows of x) to multiply by.")
]
SeedOption = Annotated[
    int,
    typer.Option("--seed", parser=_whole(0), metavar="SEED", help="Of the random activations: an integer from 0 on."),
]
ActivationsOption = Annotated[
    str,
    typer.Option("--activations", parser=_one_of("int8", "f16"), metavar="TYPE", help="How x is stored: int8 or f16."),
]
CheckedActivationsOption = Annotated[
    str,
    typer.Option(
        "--activations",
        parser=_one_of("int8", "f16", "both"),
        metavar="TYPE",
        help="How x is stored: int8, f16, or both in turn.",
    ),
]
RepeatsOption = Annotated[
    int,
    typer.Option(
        "--repeats", parser=_whole(1), metavar="N", help="Products that are timed, 1 or more; the median is shown."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        parser=_device,
        metavar="DEVICE",
        help="Where to multiply: auto (a GPU if one can be used), cpu, cuda, or cuda:N with CUDA's number N.",
    ),
]
GPUOption = Annotated[
    Any,
    typer.Option(
        "--device", parser=_gpu, metavar="DEVICE", help="The GPU: auto, cuda, or cuda:N with CUDA's number N."
    ),
]
PlacementOption = Annotated[
    str,
    typer.Option(
        "--placement",
        parser=_one_of("auto", "mapped", "device", "host"),
        metavar="PLACEMENT",
        help="Where the weights are read from: mapped (a GPU reads the mapped file), device (a copy in the GPU's "
        "memory), host (the CPU reads the mapped file), or auto.",
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        metavar="FOLDER",
        help="Where the model (253 MB) is kept; else the user's cache.",
        show_default=False,
    ),
]
ParanoidOption = Annotated[
    bool, typer.Option("--paranoid", help="Also check between guard pages, and surrounded by NaN bytes.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
