"""Compiles the kernels of a benchmark's cases side by side, before the first of them is timed.

One after the other the 150 kernels of ``bench_matvec`` take a quarter of an hour, on 16 CPUs a minute. Where the kernel
cache (``QMM_CACHE_DIR``) has them already it takes seconds.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.cpu.parallel import available_cpus
from qmm.kernels.ops.matvec.plan import plan
from qmm.kernels.ops.op import Operand, WeightLayout

if TYPE_CHECKING:
    from benchmarks.support.placed import Weight
    from qmm.device import Device

__all__ = ["compile_all"]


def compile_all(cases: Iterable[tuple[Weight, int]]) -> None:
    """Fills the kernel cache with what these weights need for these numbers of columns."""
    # Spawned: a process with a CUDA context cannot be forked.
    with ProcessPoolExecutor(available_cpus(), multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_compile, *zip(*cases, strict=True)):
            pass


def _compile(weight: Weight, n: int) -> None:
    gpu = _gpu()
    form = FORMATS[weight.type]
    layout = WeightLayout(16, weight.placement == "mapped")
    x, y = Operand.contiguous(n, weight.k), Operand.contiguous(n, weight.m)
    gpu.prepare(plan(form, weight.m, weight.k, layout, x, y, not form.plain, gpu.architecture), "compiling")


@functools.cache
def _gpu() -> Device:
    from qmm.device import Device

    return Device(0)
