"""Streams: of every kind and any life, several at once, and what their workspaces cost."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from busy import checked, keep_busy, new_stream, pool_nbytes, stream_of_its_own, synchronize
from children import run_python
from cuda.bindings import driver, runtime
from numba import cuda

import qmm
from qmm.cli.smoke import anonymous_nbytes

N, K, M = 256, 4096, 8192
THREADS = 4


def half(rng: np.random.Generator, n: int) -> Any:
    """Activations of "w" on the device, for which each product needs workspace."""
    return cuda.to_device(rng.standard_normal((n, K), np.float32).astype(np.float16))


def results(n: int) -> Any:
    return cuda.device_array((n, M), np.float16)


def product(engine: qmm.Engine, x: Any) -> np.ndarray:
    """What it is when nothing else runs."""
    synchronize()
    y = engine.matmul("w", x)
    synchronize()
    return y.copy_to_host()


def in_threads(work: Callable[[int], None]) -> None:
    """Call it with each thread's number, in all of them at once; an error of one is raised here."""
    start = threading.Barrier(THREADS, timeout=60)

    def started(number: int) -> None:
        start.wait()
        work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(started, range(THREADS)))
    synchronize()


def cupys() -> Any:
    return pytest.importorskip("cupy").cuda


def torches() -> Any:
    return pytest.importorskip("torch").cuda


DEFAULTS: dict[str, Callable[[], Any]] = {
    "legacy": lambda: 1,
    "handle": lambda: 2,
    "CuPy": lambda: cupys().Stream.ptds,
    "Numba": cuda.per_thread_default_stream,
}


@pytest.mark.parametrize("default", DEFAULTS)
def test_threads_on_their_default_streams_do_not_spoil_each_other(
    engine: qmm.Engine, default: str, rng: np.random.Generator
) -> None:
    """One handle is another stream in each thread, except for the legacy one."""
    stream = DEFAULTS[default]()
    xs = [half(rng, N) for _ in range(THREADS)]
    outs = [[results(N) for _ in range(8)] for _ in xs]
    expected = [product(engine, x) for x in xs]

    def work(number: int) -> None:
        for out in outs[number]:
            engine.matmul("w", xs[number], out, stream)

    in_threads(work)
    for number, right in enumerate(expected):
        for out in outs[number]:
            np.testing.assert_array_equal(out.copy_to_host(), right)


@pytest.mark.parametrize("each", [False, True], ids=["matmul", "matmul_each"])
def test_threads_whose_current_cupy_stream_is_the_per_thread_one(
    engine: qmm.Engine, cupy: Any, rng: np.random.Generator, each: bool
) -> None:
    xs = [cupy.asarray(rng.standard_normal((N, K), np.float32).astype(np.float16)) for _ in range(THREADS)]
    synchronize()
    expected = [engine.matmul("w", x).get() for x in xs]
    found: list[list[Any]] = [[] for _ in xs]

    def work(number: int) -> None:
        with cupy.cuda.Stream.ptds:
            for _ in range(6):
                x = xs[number]
                found[number] += engine.matmul_each(["w"], x) if each else [engine.matmul("w", x)]
            cupy.cuda.Stream.ptds.synchronize()

    in_threads(work)
    for number, right in enumerate(expected):
        for y in found[number]:
            np.testing.assert_array_equal(y.get(), right)


RECYCLED = """
import faulthandler, os, threading, time
import numpy as np, qmm
from busy import checked, is_busy, new_stream, synchronize
from cuda.bindings import runtime
from numba import cuda

faulthandler.dump_traceback_later(80, exit=True)
path, how = sys.argv[1:]
ROUNDS, ROWS = 20, 64  # so many rows that the stream is destroyed before the work is done
rng = np.random.default_rng(0)
engine = qmm.Engine(path, "cuda", "device")
xs = [cuda.to_device(rng.standard_normal((ROWS, 4096), np.float32).astype(np.float16)) for _ in range(2)]
outs = [cuda.device_array((ROWS, 8192), np.float16) for _ in xs]
expected = [engine.matmul("w", x).copy_to_host() for x in xs]
plans = [engine.plan([("w", x, out)] * 3) for x, out in zip(xs, outs)]
synchronize()

def queue(number, stream):
    if how == "a plan":
        plans[number](stream)
    else:
        for _ in range(3 if how == "products" else 1):
            engine.matmul("w", xs[number], outs[number], stream)

wrong = same = 0
for number in range(ROUNDS):
    for out in outs:
        out.copy_to_device(np.zeros(out.shape, np.float16))
    synchronize()
    first = 0
    if how == "a thread that ends":
        thread = threading.Thread(target=queue, args=(0, 2))
        thread.start()
        thread.join()
    else:
        first = new_stream()
        queue(0, first)
        checked(runtime.cudaStreamDestroy(first))  # its work goes on
    second = new_stream()
    queue(1, second)
    start = time.monotonic()
    while is_busy(second):
        if time.monotonic() - start > 12:
            print(f"the device hangs in round {number}, {wrong} products were wrong", flush=True)
            os._exit(1)
        time.sleep(1e-3)
    synchronize()
    checked(runtime.cudaStreamDestroy(second))
    same += first == second
    wrong += sum(not np.array_equal(out.copy_to_host(), right) for out, right in zip(outs, expected))
print(f"{wrong} of {2 * ROUNDS} products wrong; the same handle {same} times")
engine.close()
"""


@pytest.mark.parametrize("how", ["one product", "products", "a plan", "a thread that ends"])
def test_a_stream_may_be_destroyed_with_work_on_it_and_its_handle_come_again(model_path: Path, how: str) -> None:
    done = run_python(RECYCLED, model_path, how)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("0 of 40 products wrong"), done.stdout


TEMPORARY = """
import faulthandler
import numpy as np, qmm
from busy import synchronize

faulthandler.dump_traceback_later(80, exit=True)
path, library = sys.argv[1:]
values = np.random.default_rng(0).standard_normal((3, 256), np.float32)
if library == "cupy":
    import cupy
    there, back, filled = cupy.asarray, cupy.asnumpy, lambda out: out.fill(7)
    stream = lambda: cupy.cuda.Stream(non_blocking=True)
else:
    from numba import cuda
    there, back, stream = cuda.to_device, lambda array: array.copy_to_host(), cuda.stream
    filled = lambda out: out.copy_to_device(np.full(out.shape, 7, np.float32))
engine = qmm.Engine(path, "cuda", "device")
x, out = there(values), there(np.zeros((3, 64), np.float32))
expected = engine.matmul("s", values)
plan = engine.plan([("s", x, out)])
for name, use in {
    "matmul": lambda: engine.matmul("s", x, out=out, stream=stream()),
    "matmul_each": lambda: engine.matmul_each(["s"], x, [out], stream=stream()),
    "plan": lambda: plan(stream=stream()),
}.items():
    wrong = 0
    for _ in range(50):
        filled(out)
        synchronize()
        use()
        synchronize()
        wrong += not np.array_equal(back(out), expected)
    print(name, wrong, "wrong", flush=True)
engine.close()
"""


@pytest.mark.parametrize("library", ["cupy", "numba"])
def test_a_stream_to_which_only_the_call_refers_lives_long_enough(model_path: Path, library: str) -> None:
    if library == "cupy":
        pytest.importorskip("cupy")
    done = run_python(TEMPORARY, model_path, library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["matmul 0 wrong", "matmul_each 0 wrong", "plan 0 wrong"]


class Indexed:
    """A stream of a library that qmm does not know."""

    def __init__(self, handle: int) -> None:
        self.number = handle

    def __index__(self) -> int:
        return self.number


def core_stream(handle: int) -> Any:
    core = pytest.importorskip("cuda.core")
    if not hasattr(core, "Device"):
        core = pytest.importorskip("cuda.core.experimental")
    device = core.Device(0)
    device.set_current()
    return device.create_stream()


STREAMS: dict[str, Callable[[int], Any]] = {
    "int": int,
    "NumPy integer": np.uint64,
    "ctypes.c_void_p": ctypes.c_void_p,
    "an object with __index__": Indexed,
    "cuda.bindings runtime": runtime.cudaStream_t,
    "cuda.bindings driver": driver.CUstream,
    "cuda.core": core_stream,
    "torch": lambda handle: torches().Stream(),
    "torch, external": lambda handle: torches().ExternalStream(handle, 0),
    "torch, default": lambda handle: torches().default_stream(),
    "CuPy": lambda handle: cupys().Stream(),
    "CuPy, external": lambda handle: cupys().ExternalStream(handle, 0),
    "CuPy, null": lambda handle: cupys().Stream.null,
    "Numba": lambda handle: cuda.stream(),
    "Numba, external": cuda.external_stream,
    "Numba, default": lambda handle: cuda.default_stream(),
    "Numba, legacy": lambda handle: cuda.legacy_default_stream(),
    "0": lambda handle: 0,
    "c_void_p of the default stream": lambda handle: ctypes.c_void_p(),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_of_every_kind_are_taken(engine: qmm.Engine, kind: str, rng: np.random.Generator) -> None:
    x, outs = half(rng, 3), [results(3) for _ in range(3)]
    right = product(engine, x)
    with stream_of_its_own() as handle:
        stream = STREAMS[kind](handle)
        engine.matmul("w", x, outs[0], stream)
        engine.matmul_each(["w"], x, [outs[1]], stream)
        with engine.plan([("w", x, outs[2])]) as plan:
            plan(stream)
        synchronize()
    for out in outs:
        np.testing.assert_array_equal(out.copy_to_host(), right)


@pytest.mark.parametrize("stream", ["0", 1.5, object()], ids=["text", "float", "object"])
def test_what_is_no_stream_is_refused(engine: qmm.Engine, stream: object, rng: np.random.Generator) -> None:
    with pytest.raises(qmm.QmmError, match="stream"):
        engine.matmul("w", half(rng, 1), stream=stream)


@pytest.mark.parametrize("which", ["x", "out"])
def test_the_stream_that_the_interface_of_a_numba_array_names_is_waited_for(
    engine: qmm.Engine, which: str, rng: np.random.Generator
) -> None:
    """CUDA array interface, version 3: the array's data are ready when that stream is done."""
    values = cuda.pinned_array((64, K), np.float32)
    values[...] = rng.standard_normal(values.shape, np.float32)
    nothing = cuda.pinned_array((64, M), np.float32)
    nothing[...] = np.nan
    right = engine.matmul("w", np.array(values))
    with stream_of_its_own() as handle:
        stream = cuda.external_stream(handle)
        x = cuda.device_array(values.shape, np.float32, stream=stream if which == "x" else 0)
        out = cuda.device_array(nothing.shape, np.float32, stream=stream if which == "out" else 0)
        for array in (x, out):
            array.copy_to_device(np.zeros(array.shape, np.float32))
        if which == "out":
            x.copy_to_device(values)
        synchronize()
        keep_busy(handle, 0.3)
        if which == "x":
            x.copy_to_device(values, stream=stream)
        else:
            out.copy_to_device(nothing, stream=stream)
        y = engine.matmul("w", x, out if which == "out" else None)
        synchronize()
        np.testing.assert_array_equal(y.copy_to_host(), right)
        del x, out, y, array
        gc.collect()


def test_workspaces_of_streams_that_are_done_are_used_again(engine: qmm.Engine, rng: np.random.Generator) -> None:
    """Each of the products has 2.4 MB of workspace."""
    x = half(rng, 64)
    right = product(engine, x)
    outs = [results(64) for _ in range(60)]
    streams = [new_stream() for _ in outs]
    try:
        for stream in streams:
            keep_busy(stream, 0)  # what the driver allocates for a stream is no part of it
        synchronize()
        before = pool_nbytes(engine)
        for _ in range(2):
            for stream, out in zip(streams, outs, strict=True):
                engine.matmul("w", x, out, stream)
            synchronize()
        engine.matmul("w", x, outs[0], streams[0])  # the next call that needs workspace gives back the others'
        synchronize()
        lost = pool_nbytes(engine) - before
    finally:
        for stream in streams:
            checked(runtime.cudaStreamDestroy(stream))
    for out in outs:
        np.testing.assert_array_equal(out.copy_to_host(), right)
    assert lost < 8 << 20, f"{lost >> 20} MiB"


def test_many_numbers_of_rows_take_little_host_memory(model_path: Path, rng: np.random.Generator) -> None:
    values = rng.standard_normal((400, 256), np.float32)
    x, out = cuda.to_device(values), cuda.device_array((400, 64), np.float32)

    def use(engine: qmm.Engine) -> None:
        for n in range(1, 401):
            engine.matmul("s", x[:n], out[:n])
            y = engine.matmul("s", values[:n])
            if n % 40 == 1:
                synchronize()
                np.testing.assert_array_equal(out[:n].copy_to_host(), y)

    with qmm.open(model_path) as model:
        with qmm.Engine(model, "cuda", "device") as first:
            use(first)  # compiles and loads kernels, which stay
        gc.collect()
        before = anonymous_nbytes()
        with qmm.Engine(model, "cuda", "device") as second:
            use(second)
            grown = (anonymous_nbytes() or 0) - (before or 0)
    assert grown < 48 << 20, f"{grown >> 20} MiB"
