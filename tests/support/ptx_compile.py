"""Compiles CUDA kernels without a GPU: Numba, NVVM and ptxas, for every target that qmm promises.

The expensive steps are done once where their result is the same:

* Numba's part (types and LLVM IR, 1 to 5 s a kernel) does not look at the target;
* NVVM's part (0.1 to 0.5 s) gives the same PTX but for its ``.target`` line within each of two families;
* ptxas (0.1 to 0.5 s), which allots the registers, runs for every target of a kernel, unless ``ptx_budgets.py`` knows
  what the same ptxas made of the same PTX.

``test_ptx.py`` compares what comes out with :func:`qmm.kernels.runtime.launch.ptx`, target by target.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from cuda.pathfinder import find_nvidia_binary_utility
from numba.cuda import compiler, dispatcher
from ptx_budgets import Assembled, budget_of, budgets, digest_of
from ptx_kernels import FAMILIES, TARGETS, Spec

from qmm.kernels.ops.cpu.parallel import available_cpus
from qmm.kernels.runtime import build, launch

__all__ = [
    "Compiled",
    "assemble",
    "compile_kernel",
    "compile_spec",
    "pool",
    "problems",
    "ptx_of_target",
    "ptxas_path",
    "retarget",
    "without_gpu",
]

INSTRUCTION_NBYTES = 16
"""Of a machine instruction, from compute capability 7.0 on."""
SECTION = struct.Struct("<I20xQQ24x")
"""A section of a 64-bit ELF file: where its name is among the names, where it lies, and its bytes."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, one of each family that has a target of it, and what each target makes of that."""

    name: str
    ptx: dict[tuple[str, ...], str]
    assembled: dict[str, Assembled]


def without_gpu(compute_capability: tuple[int, int] = (9, 0)) -> Any:
    """A context in which Numba compiles device functions though there is no device to ask for its capability."""
    device = SimpleNamespace(compute_capability=compute_capability)
    return mock.patch.object(dispatcher, "get_current_device", return_value=device)


def compile_kernel(
    function: Any,
    signature: Any,
    name: str,
    threads: int,
    targets: Iterable[str] = tuple(TARGETS),
    use: str = "",
) -> Compiled:
    """Compiles a kernel whose CTAs have so many threads; given its use, ptxas runs where no budget tells its answer."""
    with without_gpu():
        # What cuda.compile does, before it asks for the PTX of one target.
        library, _ = compiler._compile_pyfunc_with_fixup(
            function, signature, device=False, abi="numba", cc=TARGETS["sm_80"]
        )
    ptx: dict[tuple[str, ...], str] = {}
    assembled: dict[str, Assembled] = {}
    for family in FAMILIES:
        chosen = [target for target in family if target in targets]
        if chosen:
            (text,) = library.get_asm_strs(cc=TARGETS[chosen[0]])
            ptx[family] = build.bounded(text, threads)
            for target in chosen:
                assembled[target] = known(use, ptx[family], target) or assemble(retarget(ptx[family], target), target)
    return Compiled(name, ptx, assembled)


def compile_spec(spec: Spec, targets: Iterable[str], believing: bool = False) -> Compiled:
    """Compiles a kernel; ``believing`` its budgets, where they are of the same PTX and ptxas."""
    kernel = spec.kernel()
    function, signature = build.function_of(kernel), build.signature_of(kernel)
    use = spec.use if believing else ""
    return compile_kernel(function, signature, kernel.name, kernel.threads, targets, use)


def known(use: str, text: str, target: str) -> Assembled | None:
    """What ptxas made of the same PTX when the budgets were written, if it was the same ptxas."""
    budget = budget_of(use, target)
    if budget is None or budget.ptx != digest_of(text) or budgets().versions["ptxas"] != ptxas_version():
        return None
    return Assembled(budget.registers, budget.instructions)


def ptx_of_target(spec: Spec, target: str) -> str:
    """The PTX that qmm makes for one target alone."""
    with without_gpu(TARGETS[target]):
        text = launch.ptx(spec.kernel(), TARGETS[target])
    assert re.search(r"(?m)^\.target (\S+)$", text)[1] == target
    return text


def retarget(ptx: str, target: str) -> str:
    """The same PTX for another target."""
    return re.sub(r"(?m)^\.target \S+$", f".target {target}", ptx, count=1)


@functools.cache
def ptxas_path() -> str:
    path = find_nvidia_binary_utility("ptxas")
    assert path is not None, "no ptxas: pip install 'cuda-toolkit[nvcc]' (the `test` extra has it)"
    return str(path)


@functools.cache
def ptxas_version() -> str:
    said = subprocess.run([ptxas_path(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r", V(\S+)", said)[1]


def assemble(ptx: str, target: str, *options: str) -> Assembled:
    """Runs ptxas on a PTX file of one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        path.write_text(ptx)
        command = [ptxas_path(), "-v", f"-arch={target}", *options, str(path), "-o", str(made)]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
        assert ran.returncode == 0, f"ptxas for {target} failed:\n{ran.stderr}"
        code_nbytes = code_nbytes_of(made.read_bytes())
    used = re.findall(r"Used (\d+) registers", ran.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ran.stderr)
    assert len(used) == len(frames) == 1, f"ptxas says nothing of registers and spills, or twice:\n{ran.stderr}"
    return Assembled(int(used[0]), code_nbytes // INSTRUCTION_NBYTES, *map(int, frames[0]))


def code_nbytes_of(cubin: bytes) -> int:
    """Bytes of machine code in an ELF file: its sections ``.text.<kernel>``."""
    start, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    sections = [SECTION.unpack_from(cubin, start + size * i) for i in range(count)]
    texts = sections[names][1]
    return sum(nbytes for name, _, nbytes in sections if cubin.startswith(b".text.", texts + name))


def problems(compiled: Compiled, target: str) -> list[str]:
    """Whatever makes a kernel keep values in memory that belong in registers, in words."""
    found = []
    result = compiled.assembled[target]
    if result.spill_store_nbytes or result.spill_load_nbytes:
        found.append(f"spills {result.spill_store_nbytes} bytes and reloads {result.spill_load_nbytes}")
    if result.stack_nbytes:
        found.append(f"has a stack frame of {result.stack_nbytes} bytes")
    (text,) = (text for family, text in compiled.ptx.items() if target in family)
    local = sorted(set(re.findall(r"\b(?:ld|st)\.local\b|(?<=\s)\.local\b", text)))
    if local:
        found.append(f"uses local memory ({', '.join(local)})")
    return [f"{compiled.name} on {target} {what} ({result.registers} registers)" for what in found]


def pool() -> ProcessPoolExecutor:
    """As many compilers as there are CPUs; ``submit(compile_spec, spec, targets)``."""
    # Spawned: threads and the compiled code of tests stay behind.
    return ProcessPoolExecutor(available_cpus(), multiprocessing.get_context("spawn"), initializer=begin)


def begin() -> None:
    """Step back behind the tests, some of which go by the time. Numba leaves no garbage that is worth collecting."""
    os.nice(10)
    gc.disable()
