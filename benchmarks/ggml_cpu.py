"""ggml's own CPU backend, from the PyPI package libggml-python, as one product: ``y[n, m] = x[n, k] @ W[m, k]^T``.

The graph is planned once and computed by a thread pool that stays, as llama.cpp does it. ggml does not repack the
weights here, as llama.cpp may at load time for some formats and CPUs: both sides read the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
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
    "ggml_new_graph": (c_void_p, c_void_p),
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
    """A planned product; ``run()`` computes it into ``y``.

    Args:
        number: ggml's number of the weights' type.
        weights: Their bytes, ``m`` rows of ``k`` values; copied.
        x: ``(n, k)`` float32, row-major; copied.
        threads: How many compute, the caller's among them.
    """

    def __init__(self, number: int, weights: np.ndarray, m: int, x: np.ndarray, threads: int) -> None:
        self.ggml = ggml()
        n, k = x.shape
        self.context = self.ggml.ggml_init(InitParams(weights.nbytes + x.nbytes + n * m * 4 + (1 << 20), None, False))
        tensor = self.ggml.ggml_new_tensor_2d(self.context, number, k, m)
        column = self.ggml.ggml_new_tensor_2d(self.context, F32, k, n)
        result = self.ggml.ggml_mul_mat(self.context, tensor, column)
        ctypes.memmove(self.ggml.ggml_get_data(tensor), weights.ctypes.data, weights.nbytes)
        ctypes.memmove(self.ggml.ggml_get_data(column), x.ctypes.data, x.nbytes)
        self.graph = self.ggml.ggml_new_graph(self.context)
        self.ggml.ggml_build_forward_expand(self.graph, result)
        self.pool = self.ggml.ggml_threadpool_new(ctypes.byref(self.ggml.ggml_threadpool_params_default(threads)))
        self.plan = self.ggml.ggml_graph_plan(self.graph, threads, self.pool)
        self.work = np.zeros(self.plan.work_size + 64, np.uint8)
        self.plan.work_data = self.work.ctypes.data_as(POINTER(c_uint8))
        address = ctypes.cast(self.ggml.ggml_get_data(result), POINTER(ctypes.c_float))
        self.y = np.ctypeslib.as_array(address, (n, m))

    def run(self) -> None:
        status = self.ggml.ggml_graph_compute(self.graph, ctypes.byref(self.plan))
        assert status == 0, f"ggml_graph_compute returned {status}"

    def rest(self) -> None:
        """Puts the pool's threads to sleep until the next ``run``: they would poll for work, on someone else's time."""
        self.ggml.ggml_threadpool_pause(self.pool)

    def close(self) -> None:
        """Frees the pool and everything that ``y`` shows."""
        self.ggml.ggml_threadpool_free(self.pool)
        self.ggml.ggml_free(self.context)
