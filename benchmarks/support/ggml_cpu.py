"""ggml's own CPU backend, from the PyPI package libggml-python, as one product: ``y[n, m] = x[n, k] @ W[m, k]^T``.

The graph is planned once and computed by a thread pool that stays, as llama.cpp does it. ggml does not repack the
weights here, as llama.cpp may at load time for some formats and CPUs: both sides read the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from ctypes import POINTER, c_bool, c_int, c_int64, c_size_t, c_uint8, c_uint32, c_void_p
from pathlib import Path
from types import SimpleNamespace

import numpy as np

__all__ = ["Product", "features", "version"]


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class ThreadpoolParams(ctypes.Structure):
    _fields_ = [
        ("cpumask", c_bool * 512),  # GGML_MAX_N_THREADS
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    ]


class Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", c_size_t),
        ("work_data", POINTER(c_uint8)),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    ]


SIGNATURES = {
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_version": (ctypes.c_char_p,),
    "ggml_threadpool_params_default": (ThreadpoolParams, c_int),
    "ggml_threadpool_new": (c_void_p, POINTER(ThreadpoolParams)),
    "ggml_threadpool_free": (None, c_void_p),
    "ggml_threadpool_pause": (None, c_void_p),
    "ggml_graph_plan": (Plan, c_void_p, c_int, c_void_p),
    "ggml_graph_compute": (c_int, c_void_p, POINTER(Plan)),
}
FEATURES = ("avx", "avx2", "avx512", "avx512_vnni", "avx_vnni", "fma", "f16c", "neon", "dotprod", "matmul_int8", "sve")
F32 = 0


@functools.cache
def ggml() -> SimpleNamespace:
    """The functions of SIGNATURES and ``ggml_cpu_has_*``, whichever library holds them."""
    import libggml

    folder = Path(libggml.__file__).parent / "lib64"
    libraries = [
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in ("libggml-base.so.0", "libggml-cpu.so.0")
    ]
    functions = SimpleNamespace()
    for name, (result, *arguments) in {**SIGNATURES, **{f"ggml_cpu_has_{name}": (c_int,) for name in FEATURES}}.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions


def features() -> list[str]:
    """The instruction sets that the library was built for and uses here."""
    return [name for name in FEATURES if getattr(ggml(), f"ggml_cpu_has_{name}")()]


def version() -> str:
    return ggml().ggml_version().decode()


class Product:
    """A planned product over several copies of the weights; ``run()`` computes it with the next copy, into ``y``.

    Args:
        number: ggml's number of the weights' type.
        weights: Their bytes, ``m`` rows of ``k`` values; copied.
        x: ``(n, k)`` float32, row-major; copied.
        threads: How many compute, the caller's among them.
        copies: Of the weights, so that a run finds its own in no cache.
    """

    def __init__(self, number: int, weights: np.ndarray, m: int, x: np.ndarray, threads: int, copies: int = 1) -> None:
        self.ggml = ggml()
        n, k = x.shape
        nbytes = copies * (weights.nbytes + n * m * 4 + (1 << 14)) + x.nbytes + (1 << 20)
        self.context = self.ggml.ggml_init(InitParams(nbytes, None, False))
        column = self.ggml.ggml_new_tensor_2d(self.context, F32, k, n)
        ctypes.memmove(self.ggml.ggml_get_data(column), x.ctypes.data, x.nbytes)
        self.pool = self.ggml.ggml_threadpool_new(ctypes.byref(self.ggml.ggml_threadpool_params_default(threads)))
        planned = []
        for _ in range(copies):
            tensor = self.ggml.ggml_new_tensor_2d(self.context, number, k, m)
            ctypes.memmove(self.ggml.ggml_get_data(tensor), weights.ctypes.data, weights.nbytes)
            result = self.ggml.ggml_mul_mat(self.context, tensor, column)
            graph = self.ggml.ggml_new_graph_custom(self.context, 8, False)
            self.ggml.ggml_build_forward_expand(graph, result)
            planned.append((graph, self.ggml.ggml_graph_plan(graph, threads, self.pool)))
        self.work = np.zeros(planned[0][1].work_size + 64, np.uint8)
        for _, plan in planned:
            plan.work_data = self.work.ctypes.data_as(POINTER(c_uint8))
        self.planned = itertools.cycle(planned)
        address = ctypes.cast(self.ggml.ggml_get_data(result), POINTER(ctypes.c_float))
        self.y = np.ctypeslib.as_array(address, (n, m))  # the last copy's

    def run(self) -> None:
        graph, plan = next(self.planned)
        status = self.ggml.ggml_graph_compute(graph, ctypes.byref(plan))
        assert status == 0, f"ggml_graph_compute returned {status}"

    def rest(self) -> None:
        """Puts the pool's threads to sleep until the next ``run``: they would poll for work, on someone else's time."""
        self.ggml.ggml_threadpool_pause(self.pool)

    def close(self) -> None:
        """Frees the pool and everything that ``y`` shows."""
        self.ggml.ggml_threadpool_free(self.pool)
        self.ggml.ggml_free(self.context)
