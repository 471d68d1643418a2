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
from unittest import mock

from qmm.arrays import View
from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.cpu.products import available_cpus

if TYPE_CHECKING:
    from benchmarks.support.placed import Weight
    from qmm.device import GPU

__all__ = ["compile_all"]

ADDRESS = 4096
"""Stands for every array: only what it divides by counts."""


def compile_all(cases: Iterable[tuple[Weight, int]]) -> None:
    """Fills the kernel cache with what these weights need for these numbers of columns."""
    # Spawned: a process with a CUDA context cannot be forked.
    with ProcessPoolExecutor(available_cpus(), multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(_compile, *zip(*cases, strict=True)):
            pass


def _compile(weight: Weight, n: int) -> None:
    gpu = _gpu()
    x = View((n, weight.k), (4 * weight.k, 4), "float32", ADDRESS, gpu.device)
    y = View((n, weight.m), (4 * weight.m, 4), "float32", ADDRESS, gpu.device)
    form = FORMATS[weight.type]
    with mock.patch.object(gpu, "_in_host_memory", return_value=weight.placement == "mapped"):
        gpu.prepare(form, ADDRESS, weight.m, weight.k, x, y, not form.plain)


@functools.cache
def _gpu() -> GPU:
    from qmm.device import GPU

    return GPU(0)
