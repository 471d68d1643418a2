"""Compiles CUDA kernels without a GPU: Numba, NVVM and ptxas, for every target that qmm promises.

Which kernels, :func:`qmm.kernels.ops.matvec.choose.choose` says for four GPUs; each is assembled for the targets
whose machine would get it. The expensive steps are done once where their result is the same:

* Numba's part (types and LLVM IR, 1 to 5 s a kernel) does not look at the target;
* NVVM's part (0.1 to 0.5 s) gives the same PTX but for its ``.target`` line within each of two families.

The usual run compiles the kernels of TELLING for every machine, and of other formats what a Hopper GPU takes for one
column and for eight; ``QMM_KERNELS=all`` compiles all (five minutes more on two CPUs): when a kernel has changed.

``test_ptx.py`` compares what comes out with :func:`qmm.kernels.runtime.launch.ptx`, target by target. ptxas
(0.1 to 0.5 s), which allots the registers, runs for every target of a kernel.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from cuda.pathfinder import find_nvidia_binary_utility
from numba.cuda import compiler, dispatcher

from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.cpu.parallel import available_cpus
from qmm.kernels.ops.dequantize import dequantize_kernel
from qmm.kernels.ops.matvec.choose import choose, dequantization_tiling
from qmm.kernels.ops.matvec.config import Case
from qmm.kernels.ops.matvec.constants import matvec_kernel
from qmm.kernels.ops.op import DTYPES, Architecture
from qmm.kernels.ops.quantize.plan import cast_kernel, quantize_kernel
from qmm.kernels.ops.read import checksum_kernel, read_kernel
from qmm.kernels.runtime import build, launch
from qmm.kernels.runtime.kernel import Kernel

__all__ = [
    "FAMILIES",
    "GROUPS",
    "MACHINES",
    "TARGETS",
    "Assembled",
    "Compiled",
    "Spec",
    "assemble",
    "compile_kernel",
    "compile_spec",
    "of_dequantization",
    "of_product",
    "pool",
    "problems",
    "ptx_of_target",
    "whole_blocks",
    "without_gpu",
]

FAMILIES = (("sm_80", "sm_86", "sm_89", "sm_90"), ("sm_100", "sm_120", "sm_121"))
TARGETS = {
    "sm_80": (8, 0),
    "sm_86": (8, 6),
    "sm_89": (8, 9),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "sm_120": (12, 0),
    "sm_121": (12, 1),
}
"""Compute capabilities by what ptxas calls them."""
HOPPER = Architecture(132, 232448, True)
AMPERE = Architecture(108, 166912, False)
MACHINES = {
    HOPPER: ("sm_90", "sm_100"),  # H100; a B200 differs in the number of multiprocessors
    Architecture(170, 101376, True): ("sm_120", "sm_121"),  # RTX 5090
    AMPERE: ("sm_80",),  # A100
    Architecture(82, 101376, False): ("sm_86", "sm_89"),  # RTX 3090
}
"""A GPU of each kind and the targets that it stands for."""
EVERY = os.environ.get("QMM_KERNELS") == "all"
TELLING = ("Q2_K", "Q4_K")
"""Formats that are compiled for every machine in the usual run: ptxas is likeliest to spill with them."""


MAKERS: dict[str, Callable[..., Kernel]] = {
    maker.__name__: maker
    for maker in (matvec_kernel, dequantize_kernel, quantize_kernel, cast_kernel, read_kernel, checksum_kernel)
}


class Spec(NamedTuple):
    """A kernel by the function of an op that describes it; formats are arguments by name."""

    maker: str
    arguments: tuple[Any, ...]

    def kernel(self) -> Kernel:
        named = [FORMATS.get(value, value) if isinstance(value, str) else value for value in self.arguments]
        return MAKERS[self.maker](*named)


Group = dict[Spec, tuple[str, ...]]
"""Kernels, each with the targets that it is assembled for."""


@dataclass(frozen=True)
class Assembled:
    """What ptxas says of one kernel on one target."""

    registers: int
    stack_nbytes: int
    spill_store_nbytes: int
    spill_load_nbytes: int


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, one of each family that has a target of it, and what each target makes of that."""

    name: str
    ptx: dict[tuple[str, ...], str]
    assembled: dict[str, Assembled]


def whole_blocks(name: str, k: int) -> int:
    """``k`` filled up to whole blocks of a format."""
    return FORMATS[name].blocks(k) * FORMATS[name].block_weights


def of_product(
    name: str,
    machine: Architecture,
    n: int,
    int8: bool,
    m: int = 14336,
    k: int = 4096,
    alignment: int = 16,
    fusible: bool = True,
    mapped: bool = False,
) -> Spec:
    """The kernel of a product on a machine."""
    case = Case(FORMATS[name], m, whole_blocks(name, k), n, int8, alignment, fusible, mapped)
    return Spec("matvec_kernel", (name, choose(case, machine)))


def of_dequantization(name: str, machine: Architecture, alignment: int = 16) -> Spec:
    """The kernel that dequantizes on a machine."""
    return Spec("dequantize_kernel", (name, dequantization_tiling(FORMATS[name], alignment, machine), machine.bulk))


def products_of(name: str, machine: Architecture) -> Iterator[Spec]:
    """Products of a format, those whose kernels take longest to compile first."""
    best = not FORMATS[name].plain
    every = EVERY or name in TELLING
    for n in (8, 4, 2, 1) if machine is HOPPER and every else (8, 1):
        yield of_product(name, machine, n, int8=best)
    if machine in (HOPPER, AMPERE) and every:
        yield of_product(name, machine, 8, int8=False)
    if machine is HOPPER and every:
        yield of_product(name, machine, 2, int8=False)
    if machine is HOPPER and name in VARIED and every:
        yield of_product(name, machine, 8, int8=best, k=65536)  # activations in global memory
        yield of_product(name, machine, 8, int8=best, m=4096, k=14336)  # activations by one bulk copy
        yield of_product(name, machine, 8, int8=best, m=512)  # fewer rows a lane
        yield of_product(name, machine, 8, int8=best, m=512, k=640)  # quantized by each block for itself
        yield of_product(name, machine, 8, int8=best, m=262144, k=640)  # several tiles a block
        yield of_product(name, machine, 1, int8=best, m=262144, k=640)
        yield of_product(name, machine, 1, int8=best, fusible=False)
        for n in (1, 8):
            yield of_product(name, machine, n, int8=best, mapped=True)


def kernels_of(name: str) -> Group:
    """The kernels of a format."""
    machines = MACHINES if EVERY or name in TELLING else (HOPPER,)
    specs = {machine: list(products_of(name, machine)) for machine in machines}
    for machine in (HOPPER, AMPERE):
        if machine in specs:
            specs[machine].append(of_dequantization(name, machine))
    return group(specs)


def unaligned(machine: Architecture) -> Iterator[Spec]:
    """A tensor that starts at an odd address: for one format of each way to load (16 bytes at a time, 4, 1), whatever
    the alignment would have let it do. What differs between formats otherwise is in their own kernels."""
    for name in ("Q4_K", "F32", "Q6_K"):
        yield of_product(name, machine, 8, int8=not FORMATS[name].plain, alignment=1)
        yield of_product(name, machine, 1, int8=False, alignment=1)
        yield of_dequantization(name, machine, alignment=1)


def quantizations(machine: Architecture) -> Iterator[Spec]:
    """The makers of activations."""
    for dtype in DTYPES:
        for int8 in (True, False):
            yield Spec("quantize_kernel", (dtype, int8, machine.bulk))


def group(specs: Mapping[Architecture, Iterable[Spec]]) -> Group:
    """Kernels and the targets of all machines that use them."""
    found: dict[Spec, tuple[str, ...]] = {}
    for machine, of_machine in specs.items():
        for spec in dict.fromkeys(of_machine):
            found[spec] = (*found.get(spec, ()), *MACHINES[machine])
    return found


VARIED = ("F16", "Q4_0", "Q4_K", "Q6_K")
"""Formats that other shapes are compiled for too: they differ in how many lanes share a block, and in its size."""
CASTS = {Spec("cast_kernel", (dtype,)): tuple(TARGETS) for dtype in DTYPES}
PROBES = {Spec("checksum_kernel", (in_flight,)): tuple(TARGETS) for in_flight in (1, 8)}
READ = {Spec("read_kernel", ()): tuple(TARGETS)}
GROUPS = {
    **{name: kernels_of(name) for name in FORMATS},
    "unaligned": group({machine: unaligned(machine) for machine in ((HOPPER, AMPERE) if EVERY else (HOPPER,))}),
    "activations": {**group({machine: quantizations(machine) for machine in MACHINES}), **CASTS},
    "probes": {**PROBES, **READ},
}


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
) -> Compiled:
    """Compiles a kernel whose CTAs have so many threads."""
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
            assembled |= {target: assemble(retarget(ptx[family], target), target) for target in chosen}
    return Compiled(name, ptx, assembled)


def compile_spec(spec: Spec, targets: Iterable[str]) -> Compiled:
    kernel = spec.kernel()
    function, signature = build.function_of(kernel), build.signature_of(kernel)
    return compile_kernel(function, signature, kernel.name, kernel.threads, targets)


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
    (text,) = (text for family, text in compiled.ptx.items() if target in family)
    local = sorted(set(re.findall(r"\b(?:ld|st)\.local\b|(?<=\s)\.local\b", text)))
    if local:
        found.append(f"uses local memory ({', '.join(local)})")
    return [f"{compiled.name} on {target} {what} ({result.registers} registers)" for what in found]


def pool() -> ProcessPoolExecutor:
    """As many compilers as there are CPUs; ``submit(compile_spec, spec, targets)``."""
    # Spawned: threads and the CPU tests' compiled code stay behind. Numba leaves no garbage worth collecting.
    return ProcessPoolExecutor(available_cpus(), multiprocessing.get_context("spawn"), initializer=gc.disable)
