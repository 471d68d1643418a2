"""Compiles CUDA kernels without a GPU: Numba, NVVM and ptxas, for every target that qmm promises.

The expensive steps are done once where their result is the same:

* Numba's part (types and LLVM IR, 1 to 5 s a kernel) does not look at the target;
* NVVM's part (0.1 to 0.5 s) gives the same PTX but for its ``.target`` line within each of two families.

``test_ptx.py`` compares what comes out with ``cuda.compile``, target by target. ptxas (0.1 to 0.5 s), which allots the
registers, runs for every kernel and every target.

From compute capability 9.0 on, numba-cuda compiles for the architecture-specific target (sm_90a), and so does this.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from cuda.pathfinder import find_nvidia_binary_utility
from numba import cuda
from numba.cuda import compiler, dispatcher

from qmm.kernels import launch
from qmm.kernels.cpu import available_cpus
from qmm.kernels.formats import FORMATS
from qmm.kernels.staging import COLUMN_TILES

__all__ = [
    "FAMILIES",
    "GROUPS",
    "TARGETS",
    "Assembled",
    "Compiled",
    "Spec",
    "assemble",
    "compile_kernel",
    "compile_spec",
    "pool",
    "problems",
    "ptx_of_target",
]

FAMILIES = (("sm_80", "sm_86", "sm_89", "sm_90a"), ("sm_100a", "sm_120a", "sm_121a"))
TARGETS = {
    "sm_80": (8, 0, ""),
    "sm_86": (8, 6, ""),
    "sm_89": (8, 9, ""),
    "sm_90a": (9, 0, "a"),
    "sm_100a": (10, 0, "a"),
    "sm_120a": (12, 0, "a"),
    "sm_121a": (12, 1, "a"),
}
"""What NVVM calls them: compute capability and suffix."""


class Spec(NamedTuple):
    """A kernel by the function of :mod:`qmm.kernels.launch` that builds it; formats are arguments by name."""

    maker: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return "-".join([self.maker, *map(str, self.arguments)])

    def kernel(self) -> launch.CUDAKernel:
        named = [FORMATS.get(value, value) if isinstance(value, str) else value for value in self.arguments]
        return getattr(launch, self.maker)(*named)


@dataclass(frozen=True)
class Assembled:
    """What ptxas says of one kernel on one target."""

    registers: int
    stack_nbytes: int
    spill_store_nbytes: int
    spill_load_nbytes: int


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX by the first target of each family, and what each target makes of it."""

    name: str
    ptx: dict[str, str]
    assembled: dict[str, Assembled]


def specs_of(name: str) -> list[Spec]:
    """The kernels of a format, those that take longest first."""
    modes = (False,) if FORMATS[name].plain else (True, False)
    columns = sorted(COLUMN_TILES, reverse=True)
    matvec = [Spec("matvec_kernel", (name, count, int8)) for count in columns for int8 in modes]
    return [*matvec, Spec("dequantize_kernel", (name,))]


# A tensor that starts at an odd address: for one format of each way to load (16 bytes at a time, 4, 1), whatever the
# alignment would have let it do. What differs between formats otherwise is in the kernels above.
UNALIGNED = [
    spec
    for name in ("Q4_K", "F32", "Q6_K")
    for spec in (
        Spec("matvec_kernel", (name, max(COLUMN_TILES), not FORMATS[name].plain, 1)),
        Spec("matvec_kernel", (name, 1, False, 1)),
        Spec("dequantize_kernel", (name, 1)),
    )
]
ACTIVATIONS = [
    *[Spec("quantize_kernel", (dtype, int8)) for dtype in launch.LOADS for int8 in (True, False)],
    *[Spec("cast_kernel", (dtype,)) for dtype in launch.STORES],
]
PROBES = [Spec("checksum_kernel", (in_flight,)) for in_flight in (1, 8)]
GROUPS = {
    **{name: specs_of(name) for name in FORMATS},
    "unaligned": UNALIGNED,
    "activations": ACTIVATIONS,
    "probes": PROBES,
}


def without_gpu(compute_capability: tuple[int, int] = (9, 0)) -> Any:
    """A context in which Numba compiles device functions though there is no device to ask for its capability."""
    device = SimpleNamespace(compute_capability=compute_capability)
    return mock.patch.object(dispatcher, "get_current_device", return_value=device)


def compile_kernel(function: Any, signature: Any, name: str) -> Compiled:
    """Compiles a kernel for all of TARGETS."""
    with without_gpu():
        # What cuda.compile does, before it asks for the PTX of one target.
        library, _ = compiler._compile_pyfunc_with_fixup(
            function, signature, device=False, abi="numba", cc=TARGETS["sm_80"][:2]
        )
    ptx: dict[str, str] = {}
    assembled: dict[str, Assembled] = {}
    for family in FAMILIES:
        (text,) = library.get_asm_strs(cc=TARGETS[family[0]])
        ptx[family[0]] = text
        for target in family:
            assembled[target] = assemble(retarget(text, target), target)
    return Compiled(name, ptx, assembled)


def compile_spec(spec: Spec) -> Compiled:
    kernel = spec.kernel()
    return compile_kernel(kernel.function, kernel.signature, kernel.name)


def ptx_of_target(spec: Spec, target: str) -> str:
    """The PTX that ``cuda.compile`` makes for one target alone."""
    kernel = spec.kernel()
    with without_gpu(TARGETS[target][:2]):
        ptx, _ = cuda.compile(
            kernel.function, kernel.signature, cc=TARGETS[target], device=False, abi="numba", output="ptx"
        )
    assert re.search(r"(?m)^\.target (\S+)$", ptx)[1] == target
    return str(ptx)


def retarget(ptx: str, target: str) -> str:
    """The same PTX for another target."""
    return re.sub(r"(?m)^\.target \S+$", f".target {target}", ptx, count=1)


@functools.cache
def ptxas_path() -> str:
    path = find_nvidia_binary_utility("ptxas")
    assert path is not None, "no ptxas: pip install 'cuda-toolkit[nvcc]' (the `test` extra has it)"
    return str(path)


def assemble(ptx: str, target: str, *options: str) -> Assembled:
    """Runs ptxas on a PTX file of one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [ptxas_path(), "-v", f"-arch={target}", *options, str(path), "-o", os.devnull]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, f"ptxas for {target} failed:\n{ran.stderr}"
    used = re.findall(r"Used (\d+) registers", ran.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ran.stderr)
    assert len(used) == len(frames) == 1, f"ptxas says nothing of registers and spills, or twice:\n{ran.stderr}"
    return Assembled(int(used[0]), *map(int, frames[0]))


def problems(compiled: Compiled, target: str) -> list[str]:
    """Whatever makes a kernel keep values in memory that belong in registers, in words."""
    found = []
    result = compiled.assembled[target]
    if result.spill_store_nbytes or result.spill_load_nbytes:
        found.append(f"spills {result.spill_store_nbytes} bytes and reloads {result.spill_load_nbytes}")
    if result.stack_nbytes:
        found.append(f"has a stack frame of {result.stack_nbytes} bytes")
    (family,) = (family for family in FAMILIES if target in family)
    local = sorted(set(re.findall(r"\b(?:ld|st)\.local\b|(?<=\s)\.local\b", compiled.ptx[family[0]])))
    if local:
        found.append(f"uses local memory ({', '.join(local)})")
    return [f"{compiled.name} on {target} {what} ({result.registers} registers)" for what in found]


def pool() -> ProcessPoolExecutor:
    """As many compilers as there are CPUs; ``submit(compile_spec, spec)``."""
    # Spawned: threads and the CPU tests' compiled code stay behind. Numba leaves no garbage worth collecting.
    return ProcessPoolExecutor(available_cpus(), multiprocessing.get_context("spawn"), initializer=gc.disable)
