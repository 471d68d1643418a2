"""Which CUDA kernels ``test_ptx.py`` compiles, and for which targets.

The kernels of products are those that :func:`qmm.kernels.ops.matvec.choose.choose` takes for four GPUs. Each is
assembled for the targets whose GPU would get it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.dequantize import dequantization_tiling, dequantize_kernel
from qmm.kernels.ops.matvec.choose import choose
from qmm.kernels.ops.matvec.config import Case
from qmm.kernels.ops.matvec.constants import matvec_kernel
from qmm.kernels.ops.matvec.naive import naive_kernel
from qmm.kernels.ops.op import DTYPES, Architecture
from qmm.kernels.ops.quantize.plan import cast_kernel, quantize_kernel
from qmm.kernels.ops.read import checksum_kernel, read_kernel
from qmm.kernels.runtime.kernel import Kernel

__all__ = [
    "AMPERE",
    "FAMILIES",
    "HOPPER",
    "MACHINES",
    "MAKERS",
    "TARGETS",
    "Group",
    "Spec",
    "groups",
    "of_dequantization",
    "of_product",
]

FAMILIES = (("sm_80", "sm_86", "sm_89", "sm_90"), ("sm_100", "sm_120", "sm_121"))
"""Targets for which NVVM makes the same PTX, but for its ``.target`` line."""
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
GEFORCE_50 = Architecture(170, 101376, True)
GEFORCE_30 = Architecture(82, 101376, False)
MACHINES = {
    HOPPER: ("sm_90", "sm_100"),  # a B200 differs in the number of SMs
    GEFORCE_50: ("sm_120", "sm_121"),
    AMPERE: ("sm_80",),
    GEFORCE_30: ("sm_86", "sm_89"),
}
"""A GPU of each kind and the targets that it stands for."""
NAMES = {HOPPER: "H100", GEFORCE_50: "RTX 5090", AMPERE: "A100", GEFORCE_30: "RTX 3090"}
TELLING = ("Q2_K", "Q4_K")
"""Formats that are compiled for every machine in the usual run: ptxas is likeliest to spill with them."""
LOADED = ("Q4_K", "F32", "Q6_K")
"""A format of each way to load: 16 bytes at a time, 4, and 1."""
VARIED = ("F16", "Q4_0", "Q4_K", "Q6_K")
"""Formats that other shapes are compiled for too: they differ in how many lanes share a block, and in its size."""

MAKERS: dict[str, Callable[..., Kernel]] = {
    maker.__name__: maker
    for maker in (
        *(matvec_kernel, naive_kernel, dequantize_kernel, quantize_kernel, cast_kernel, read_kernel, checksum_kernel),
    )
}


@dataclass(frozen=True)
class Spec:
    """A kernel, so that another process can be told of it.

    Attributes:
        use: what it is for, in words: the first of its uses that this module comes upon.
        maker: the function of an op that describes it.
        arguments: that function's; formats by name.
    """

    use: str = field(compare=False)
    maker: str
    arguments: tuple[Any, ...] = ()

    def kernel(self) -> Kernel:
        named = [FORMATS.get(value, value) if isinstance(value, str) else value for value in self.arguments]
        return MAKERS[self.maker](*named)


Group = dict[Spec, tuple[str, ...]]
"""Kernels, each with the targets that it is assembled for."""


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
    """The kernel of a product on a machine; ``k`` is filled up to whole blocks."""
    block_format = FORMATS[name]
    k = block_format.blocks(k) * block_format.block_weights
    case = Case(block_format, m, k, n, int8, alignment, fusible, mapped)
    words = [f"{name} {m}x{k}", f"n={n}", "int8" if int8 else "f16"]
    words += [f"alignment {alignment}"] if alignment != 16 else []
    words += ["quantized before"] if not fusible else []
    words += ["mapped"] if mapped else []
    return Spec(", ".join([*words, NAMES[machine]]), "matvec_kernel", (name, choose(case, machine)))


def of_dequantization(name: str, machine: Architecture, alignment: int = 16) -> Spec:
    """The kernel that dequantizes on a machine."""
    tiling = dequantization_tiling(FORMATS[name], alignment, machine)
    words = [f"dequantize {name}", *([f"alignment {alignment}"] if alignment != 16 else []), NAMES[machine]]
    return Spec(", ".join(words), "dequantize_kernel", (name, tiling, machine.bulk))


def products_of(name: str, machine: Architecture) -> Iterator[Spec]:
    """Products of a format, those whose kernels take longest to compile first."""
    best = not FORMATS[name].plain
    for n in (8, 4, 2, 1) if machine is HOPPER else (8, 1):
        yield of_product(name, machine, n, int8=best)
    if machine in (HOPPER, AMPERE):
        yield of_product(name, machine, 8, int8=False)
    if machine is HOPPER:
        yield of_product(name, machine, 2, int8=False)
    if machine is HOPPER and name in VARIED:
        yield from places_of_activations(name)
        yield of_product(name, machine, 8, int8=best, m=512)  # fewer rows a lane
        yield of_product(name, machine, 8, int8=best, m=262144, k=640)  # several tiles a CTA
        yield of_product(name, machine, 1, int8=best, m=262144, k=640)
        for n in (1, 8):
            yield of_product(name, machine, n, int8=best, mapped=True)


def places_of_activations(name: str) -> Iterator[Spec]:
    """Products that have their activations elsewhere than the others."""
    best = not FORMATS[name].plain
    yield of_product(name, HOPPER, 8, int8=best, k=65536)  # in global memory
    yield of_product(name, HOPPER, 8, int8=best, m=4096, k=14336)  # by one bulk copy
    yield of_product(name, HOPPER, 8, int8=best, m=512, k=640)  # quantized by each CTA for itself
    yield of_product(name, HOPPER, 1, int8=best, fusible=False)  # quantized before


def telling_products_of(name: str, machine: Architecture) -> Iterator[Spec]:
    """Those of the usual run: the most columns, which need the most registers, and one format's other main loops."""
    best = not FORMATS[name].plain
    yield of_product(name, machine, 8, int8=best)
    if name in TELLING and machine in (HOPPER, AMPERE):
        yield of_product(name, machine, 1, int8=best)
    if name == TELLING[-1] and machine is HOPPER:
        yield of_product(name, machine, 8, int8=False)
        yield from places_of_activations(name)


def kernels_of(name: str, every: bool) -> Group:
    """The kernels of a format."""
    machines = MACHINES if every or name in TELLING else (HOPPER,)
    products = products_of if every else telling_products_of
    specs = {machine: list(products(name, machine)) for machine in machines}
    for machine in (HOPPER, AMPERE):
        if machine in specs:
            specs[machine].append(of_dequantization(name, machine))
    return group(specs)


def unaligned(machine: Architecture, every: bool) -> Iterator[Spec]:
    """A tensor that starts at an odd address, for LOADED, whatever the alignment would have let them do. What differs
    between formats otherwise is in their own kernels."""
    for name in LOADED:
        yield of_product(name, machine, 8, int8=not FORMATS[name].plain, alignment=1)
        if every:
            yield of_product(name, machine, 1, int8=False, alignment=1)
        yield of_dequantization(name, machine, alignment=1)


def quantizations(machine: Architecture, every: bool) -> Iterator[Spec]:
    """The makers of activations."""
    for dtype in DTYPES:
        for int8 in (True, False):
            if every or dtype == "float32" or int8 == machine.bulk:
                use = f"quantize {dtype} to {'int8' if int8 else 'f16'}, {NAMES[machine]}"
                yield Spec(use, "quantize_kernel", (dtype, int8, machine.bulk))


def group(specs: Mapping[Architecture, Iterable[Spec]]) -> Group:
    """Kernels and the targets of all machines that use them."""
    found: dict[Spec, tuple[str, ...]] = {}
    for machine, of_machine in specs.items():
        for spec in dict.fromkeys(of_machine):
            found[spec] = (*found.get(spec, ()), *MACHINES[machine])
    return found


@functools.cache
def groups(every: bool) -> dict[str, Group]:
    """The kernels of each format and those that serve all of them: in the usual run, those likeliest to go wrong.

    Args:
        every: whether to have all kernels, for every machine.
    """
    activations = group({machine: quantizations(machine, every) for machine in MACHINES})
    casts = {Spec(f"cast {dtype}", "cast_kernel", (dtype,)): tuple(TARGETS) for dtype in DTYPES}
    checksums = {Spec(f"checksum, {count} loads", "checksum_kernel", (count,)): tuple(TARGETS) for count in (1, 8)}
    naive = {
        Spec(f"naive {name}", "naive_kernel", (name, FORMATS[name].alignment)): tuple(TARGETS)
        for name in (FORMATS if every else LOADED)
    }
    return {
        **{name: kernels_of(name, every) for name in FORMATS},
        "unaligned": group({machine: unaligned(machine, every) for machine in (HOPPER, AMPERE)[: 1 + every]}),
        "naive": naive,
        "activations": {**activations, **casts},
        "probes": {**checksums, Spec("read", "read_kernel"): tuple(TARGETS)},
    }
