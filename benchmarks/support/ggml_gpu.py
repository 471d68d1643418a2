"""ggml's own backends, through ctypes on its shared libraries: products beside qmm's, in the same process.

Which libraries: those in the folder of the environment variable ``GGML_LIBRARY_DIR``, else those of an installed
``llama-cpp-python``; without a ``libggml-cuda`` among them there are none. The CPU backend goes through the same code,
so that a machine without a GPU can check it (``tests/bench/test_ggml_gpu.py``).

How ggml replays: its CUDA backend computes a graph directly once, captures it into a CUDA graph when it comes a second
time unchanged, and launches that from then on. It says so to its log, as it does of every step back;
:meth:`Product.replayed` reads that. Before each launch it compares all nodes with those that it captured, which takes
the host some 0.1 us a node: several computations are queued before a wait, so that the GPU has work meanwhile.

A graph here holds nothing but products, each with a result of its own: ggml then fuses none of them, and quantizes the
activations anew for each, as it does for a product alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import SimpleNamespace

import numpy as np

__all__ = ["Backend", "Product", "Weights", "find", "load", "missing"]

VARIABLE = "GGML_LIBRARY_DIR"
F32 = 0
USAGE_WEIGHTS = 1
LEVEL_WARNING, LEVEL_CONTINUED = 3, 5
CAPTURED = "CUDA graph warmup complete"
GRAPH_EVENTS = (CAPTURED, "CUDA graph warmup reset", "disabling CUDA graphs", "CUDA graph update failed")


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Feature(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("value", c_char_p)]


LogCallback = CFUNCTYPE(None, c_int, c_char_p, c_void_p)

BASE = {
    "ggml_version": (c_char_p,),
    "ggml_commit": (c_char_p,),
    "ggml_log_set": (None, LogCallback, c_void_p),
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_graph_n_nodes": (c_int, c_void_p),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_set_usage": (None, c_void_p, c_int),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_graph_compute_async": (c_int, c_void_p, c_void_p),
    "ggml_backend_synchronize": (None, c_void_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
}
OF_KIND = {
    "cuda": {"ggml_backend_cuda_init": (c_void_p, c_int), "ggml_backend_cuda_reg": (c_void_p,)},
    "cpu": {"ggml_backend_cpu_init": (c_void_p,), "ggml_backend_cpu_reg": (c_void_p,)},
}


def find() -> Path | None:
    """The folder with ggml's CUDA libraries, or None."""
    named = os.environ.get(VARIABLE)
    if named:
        folders = [Path(named)]
    else:
        package = importlib.util.find_spec("llama_cpp")
        places = package.submodule_search_locations if package else None
        folders = [Path(place) / "lib" for place in places or ()]
    return next((folder for folder in folders if library_file(folder, "cuda")), None)


def missing() -> str | None:
    """Why there is no ggml to compare with on a GPU, or None."""
    folder = find()
    if folder is None:
        named = os.environ.get(VARIABLE)
        where = f"{VARIABLE} is {named}, which has no libggml-cuda" if named else f"{VARIABLE} is not set"
        return f"no CUDA build of ggml: {where}" + ("" if named else ", and no llama-cpp-python has libggml-cuda")
    try:
        load(folder, "cuda")
    except (OSError, AttributeError) as reason:
        return f"ggml in {folder} cannot be used: {reason}"
    return None


def library_file(folder: Path, part: str) -> Path | None:
    """``libggml-<part>`` in a folder, by the name that the other libraries ask for if it is there."""
    found = sorted(
        folder.glob(f"libggml-{part}.so*"), key=lambda path: (path.name != f"libggml-{part}.so.0", path.name)
    )
    return next((path for path in found if not path.name.endswith(".xz")), None)


def preload_cuda() -> None:
    """Makes the CUDA libraries of Python packages known to the loader; without them it looks where it always does."""
    from cuda import pathfinder

    for name in ("cudart", "cublas"):
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except Exception:  # whatever is missing: loading ggml will say so
            continue


def loaded_elsewhere(folder: Path) -> str | None:
    """A ggml of another folder in this process: the loader would take its libraries for this folder's."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "libggml-base" in line}
    return next((path for path in sorted(paths) if Path(path).parent != folder.resolve()), None)


@functools.cache
def load(folder: Path, kind: str) -> SimpleNamespace:
    """The functions of one of ggml's backends, ``"cuda"`` or ``"cpu"``.

    Raises:
        OSError: a library is not there, or cannot be loaded.
        AttributeError: one of the functions is in none of the libraries.
    """
    other = loaded_elsewhere(folder)
    if other:
        raise OSError(f"{other} is loaded already, and two ggmls in a process mix: give this one a process of its own")
    if kind == "cuda":
        preload_cuda()
    libraries = []
    for part in ("base", kind):
        path = library_file(folder, part)
        if path is None:
            raise OSError(f"{folder} has no libggml-{part}.so")
        libraries.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    functions = SimpleNamespace(folder=folder, kind=kind)
    for name, (result, *arguments) in {**BASE, **OF_KIND[kind]}.items():
        holder = next((library for library in libraries if hasattr(library, name)), None)
        if holder is None:
            raise AttributeError(f"{folder} has no function {name}")
        function = getattr(holder, name)
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions


class Backend:
    """One of ggml's backends, made and ready. Its log is kept, and what it warns of is printed."""

    def __init__(self, folder: Path, kind: str = "cuda", device: int = 0) -> None:
        self.ggml = load(folder, kind)
        self.log: list[str] = []
        self._callback = LogCallback(self._logged)  # ggml keeps the pointer, so this must keep the object
        self.ggml.ggml_log_set(self._callback, None)
        make = getattr(self.ggml, f"ggml_backend_{kind}_init")
        self.pointer = make(device) if kind == "cuda" else make()
        if not self.pointer:
            raise RuntimeError(f"ggml_backend_{kind}_init failed:\n{''.join(self.log)}")

    def _logged(self, level: int, text: bytes, _: object) -> None:
        line = text.decode(errors="replace")
        self.log.append(line)
        if LEVEL_WARNING <= level < LEVEL_CONTINUED:
            print(f"ggml: {line}", end="")

    @property
    def version(self) -> str:
        """ggml's version."""
        return str(self.ggml.ggml_version().decode())

    @property
    def commit(self) -> str:
        """What its build took for the commit."""
        return str(self.ggml.ggml_commit().decode())

    @property
    def features(self) -> dict[str, str]:
        """What the backend says it was built with, such as ``{"ARCHS": "900", "USE_GRAPHS": "1"}``."""
        register = getattr(self.ggml, f"ggml_backend_{self.ggml.kind}_reg")()
        address = self.ggml.ggml_backend_reg_get_proc_address(register, b"ggml_backend_get_features")
        if not address:
            return {}
        listed = CFUNCTYPE(ctypes.POINTER(Feature), c_void_p)(address)(register)
        found: dict[str, str] = {}
        while (feature := listed[len(found)]).name:
            found[feature.name.decode()] = feature.value.decode()
        return found

    def close(self) -> None:
        self.ggml.ggml_backend_synchronize(self.pointer)
        self.ggml.ggml_backend_free(self.pointer)


class Context:
    """Tensors, and graphs of them, whose data the backend holds."""

    def __init__(self, backend: Backend, tensors: int, graphs: int = 0, graph_size: int = 0) -> None:
        self.backend, self.ggml, self.graph_size = backend, backend.ggml, graph_size
        nbytes = (tensors + 1) * self.ggml.ggml_tensor_overhead()
        nbytes += graphs * self.ggml.ggml_graph_overhead_custom(graph_size, False) if graphs else 0
        self.pointer = self.ggml.ggml_init(InitParams(nbytes, None, True))
        self.buffer: int | None = None

    def tensor(self, number: int, rows: int, columns: int) -> int:
        return int(self.ggml.ggml_new_tensor_2d(self.pointer, number, columns, rows))

    def graph(self, results: Sequence[int]) -> int:
        """A graph that computes the results, in this order."""
        made = int(self.ggml.ggml_new_graph_custom(self.pointer, self.graph_size, False))
        for result in results:
            self.ggml.ggml_build_forward_expand(made, result)
        nodes = self.ggml.ggml_graph_n_nodes(made)
        assert nodes == len(results), f"ggml's graph has {nodes} nodes for {len(results)} products"
        return made

    def allocate(self) -> None:
        """Memory for the tensors made so far."""
        self.buffer = self.ggml.ggml_backend_alloc_ctx_tensors(self.pointer, self.backend.pointer)
        if not self.buffer:
            self.close()
            raise MemoryError(f"ggml could not allocate its tensors:\n{''.join(self.backend.log[-5:])}")

    def close(self) -> None:
        self.ggml.ggml_backend_synchronize(self.backend.pointer)
        if self.buffer:
            self.ggml.ggml_backend_buffer_free(self.buffer)
        self.ggml.ggml_free(self.pointer)


class Weights:
    """Copies of one weight, in ggml's memory.

    Args:
        backend: where.
        number: ggml's number of the type.
        m: rows.
        k: weights a row.
        copies: how many.
        fill: writes the weight's bytes to an address, which is the device's; called once a copy.
    """

    def __init__(
        self, backend: Backend, number: int, m: int, k: int, copies: int, fill: Callable[[int], object]
    ) -> None:
        self.backend, self.m, self.k = backend, m, k
        self._context = Context(backend, copies)
        self.tensors = [self._context.tensor(number, m, k) for _ in range(copies)]
        self._context.allocate()
        backend.ggml.ggml_backend_buffer_set_usage(self._context.buffer, USAGE_WEIGHTS)
        self.nbytes = int(backend.ggml.ggml_nbytes(self.tensors[0]))
        for tensor in self.tensors:
            fill(int(backend.ggml.ggml_get_data(tensor)))

    def close(self) -> None:
        self._context.close()


class Product:
    """``count`` products ``y[n, m] = x[n, k] @ W[m, k]^T``, over the copies of the weight in turn.

    Args:
        weights: the copies.
        x: ``(n, k)`` float32, row-major.
        count: products that :meth:`queue` starts.
        graph_products: how many of them make one graph.
    """

    def __init__(self, weights: Weights, x: np.ndarray, count: int, graph_products: int = 128) -> None:
        self.backend, self.ggml = weights.backend, weights.backend.ggml
        self.shape = (len(x), weights.m)
        assert x.shape == (len(x), weights.k) and x.dtype == np.float32 and x.flags.c_contiguous
        starts = range(0, count, graph_products)
        self._context = Context(self.backend, count + 1, len(starts), graph_products + 8)
        column = self._context.tensor(F32, *x.shape)
        tensors = itertools.islice(itertools.cycle(weights.tensors), count)
        self.results = [int(self.ggml.ggml_mul_mat(self._context.pointer, tensor, column)) for tensor in tensors]
        self._graphs = [self._context.graph(self.results[start : start + graph_products]) for start in starts]
        assert self.ggml.ggml_backend_supports_op(self.backend.pointer, self.results[0]), "ggml has no such product"
        self._context.allocate()
        self.ggml.ggml_backend_tensor_set(column, x.ctypes.data, 0, x.nbytes)
        self._log_start = self._log_warm = len(self.backend.log)

    def queue(self) -> None:
        """Starts all products once."""
        for graph in self._graphs:
            status = self.ggml.ggml_backend_graph_compute_async(self.backend.pointer, graph)
            assert status == 0, f"ggml_backend_graph_compute_async returned {status}"

    def wait(self) -> None:
        self.ggml.ggml_backend_synchronize(self.backend.pointer)

    def warm_up(self) -> None:
        """Computes until CUDA graphs are captured and were launched."""
        for _ in range(4):
            self.queue()
            self.wait()
        self._log_warm = len(self.backend.log)

    def replayed(self) -> bool:
        """Whether ggml captured each graph in the warm-up, and launched nothing but the captures since."""
        before = self.backend.log[self._log_start : self._log_warm]
        after = self.backend.log[self._log_warm :]
        captured = sum(CAPTURED in line for line in before)
        return captured == len(self._graphs) and not any(told in line for line in after for told in GRAPH_EVENTS)

    def result(self, i: int) -> np.ndarray:
        """What product ``i`` gave, ``(n, m)``."""
        y = np.empty(self.shape, np.float32)
        self.ggml.ggml_backend_tensor_get(self.results[i], y.ctypes.data, 0, y.nbytes)
        return y

    def close(self) -> None:
        self._context.close()
