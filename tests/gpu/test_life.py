"""Engines on a GPU: threads, interrupts, and every way to the end of their life."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numba import cuda
from small_model import K, M, is_mapped, write_small_model

import qmm
import qmm.cli.smoke
from qmm import device, graph, pool
from qmm.cuda import call
from qmm.errors import ClosedError, OutOfMemoryError
from qmm.loaders import FileMapping, HostRegistration
from qmm.loaders.access import chunks

PLACEMENTS = ("mapped", "device")


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


def drop(held: list[object]) -> None:
    held.clear()
    gc.collect()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("cycle", [False, True], ids=["dropped", "in a cycle"])
def test_an_engine_that_is_dropped_open_warns_and_frees_all_in_order(
    path: Path, x: np.ndarray, placement: str, cycle: bool
) -> None:
    engine = qmm.Engine(path, "cuda", placement)
    expected = engine.matmul("a", x)
    x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
    plan = engine.plan([("a", x_there, y_there)])
    plan()  # queued work reads the weights while they are given up
    if cycle:
        engine.plan_of_mine = plan  # type: ignore[attr-defined]
    held: list[object] = [plan, engine]
    del plan, engine
    with pytest.warns(ResourceWarning, match="was dropped before it was closed"):
        drop(held)
    assert not is_mapped(path)
    assert not chunks.registered.now
    np.testing.assert_array_equal(y_there.copy_to_host(), expected)


def test_a_registration_that_is_dropped_open_warns_and_unregisters(path: Path) -> None:
    with FileMapping.open(path) as mapping:
        with pytest.warns(ResourceWarning, match=r"HostRegistration of .*model\.gguf"):
            HostRegistration.of(mapping, [(0, 4096)])
        assert int(call("cudaPointerGetAttributes", mapping.address).type) == 0  # cudaMemoryTypeUnregistered
    assert not chunks.registered.now
    assert not is_mapped(path)


def test_an_engine_that_is_collected_while_a_graph_is_captured_does_not_spoil_it(path: Path, x: np.ndarray) -> None:
    with qmm.Engine(path, "cuda") as engine:
        assert engine.gpu is not None
        dropped = [qmm.Engine(path, "cuda")]
        dropped[0].matmul("a", x)

        def work() -> None:
            with pytest.warns(ResourceWarning, match="was dropped before it was closed"):
                drop(dropped)

        graph.capture(engine.gpu, work, engine.gpu.stream).close()
        assert engine.matmul("a", x).shape == (3, M)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_threads_share_an_engine_and_closing_waits_for_them(path: Path, x: np.ndarray, placement: str) -> None:
    for _ in range(10):
        model = qmm.open(path)
        engine = qmm.Engine(model, "cuda", placement)
        model.close()
        expected = {name: engine.matmul(name, x) for name in ("a", "b")}
        x_there = cuda.to_device(x)
        wrong: list[object] = []
        ends: list[ClosedError] = []
        started = threading.Barrier(9)

        def work(
            name: str,
            there: bool,
            *shared: object,
            engine: qmm.Engine = engine,
            expected: dict = expected,
            x_there: object = x_there,
            wrong: list = wrong,
            ends: list = ends,
            started: threading.Barrier = started,
        ) -> None:
            stream = cuda.stream()
            started.wait()
            for number in range(100_000):
                try:
                    y = engine.matmul(name, x_there, stream=stream) if there else engine.matmul(name, x)
                except ClosedError as error:
                    ends.append(error)
                    return
                if there and number % 16 == 0:
                    stream.synchronize()
                    y = y.copy_to_host(stream=stream)
                    stream.synchronize()
                if isinstance(y, np.ndarray) and not np.array_equal(y, expected[name]):
                    wrong.append((name, there, number))

        threads = [threading.Thread(target=work, args=(name, there)) for name in "ab" for there in (True, False) * 2]
        for thread in threads:
            thread.start()
        started.wait()
        engine.close()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(ends) == 8
        assert not is_mapped(path)
        assert call("cudaDeviceSynchronize") is None


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_plan_takes_in_nothing_of_what_other_threads_do(path: Path, x: np.ndarray, placement: str) -> None:
    """Its products are captured while theirs run, and none of theirs is."""
    with qmm.open(path) as model, qmm.Engine(model, "cuda", placement) as engine:
        expected = {name: engine.matmul(name, x) for name in ("a", "b")}
        x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
        stop = threading.Event()
        failures: list[object] = []

        def work(name: str) -> None:
            try:
                while not stop.is_set():
                    if not np.array_equal(engine.matmul(name, x), expected[name]):
                        failures.append(name)
            except Exception as error:  # reported below, in the thread that pytest watches
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abab"]
        for thread in threads:
            thread.start()
        try:
            for _ in range(200):
                with engine.plan([("a", x_there, y_there)] * 4) as plan:
                    plan()
                np.testing.assert_array_equal(y_there.copy_to_host(), expected["a"])
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert failures == []


PAIRS = (
    ("cudaMallocFromPoolAsync", "cudaFreeAsync"),
    ("cudaMemPoolCreate", "cudaMemPoolDestroy"),
    ("cudaHostRegister", "cudaHostUnregister"),
    ("cudaStreamCreateWithFlags", "cudaStreamDestroy"),
    ("cudaGraphInstantiate", "cudaGraphExecDestroy"),
    ("cudaStreamEndCapture", "cudaGraphDestroy"),
)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_thousand_engines_leave_nothing_behind(
    path: Path, x: np.ndarray, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
    calls: Counter[str] = Counter()
    for module in (device, graph, chunks, pool):
        monkeypatch.setattr(module, "call", lambda function, *rest: calls.update([function]) or call(function, *rest))

    def cycle() -> None:
        with qmm.open(path) as model, qmm.Engine(model, "cuda", placement) as engine:
            engine.matmul("a", x_there, y_there)
            with engine.plan([("a", x_there, y_there)]) as plan:
                plan()

    def held() -> tuple[int, int, int]:
        gc.collect()
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len(os.listdir("/proc/self/fd")), len(lines), call("cudaMemGetInfo")[0]

    for _ in range(100):
        cycle()
    descriptors, mappings, free_nbytes = held()
    anonymous = qmm.cli.smoke.anonymous_nbytes()
    assert anonymous is not None
    for _ in range(1000):
        cycle()
    after = held()
    grown = (qmm.cli.smoke.anonymous_nbytes() or 0) - anonymous
    print(f"descriptors {descriptors} -> {after[0]}, mappings {mappings} -> {after[1]}, free bytes on the device")
    print(f"{free_nbytes} -> {after[2]}, anonymous memory grew by {grown} bytes")
    assert after[0] == descriptors
    assert after[1] <= mappings + 4  # the allocator's own may come and go
    if "PYTEST_XDIST_WORKER" not in os.environ:  # otherwise other processes take and give memory too
        assert after[2] >= free_nbytes - (2 << 20)  # the driver's own pools grow by 2 MiB at a time
    for made, undone in PAIRS:
        assert calls[made] == calls[undone] > 0, (made, calls)
    assert grown < 4 << 20  # a page for each
    assert not is_mapped(path)
    assert not chunks.registered.now


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_closing_that_is_interrupted_can_be_done_again(
    path: Path, x: np.ndarray, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    interrupts: set[str] = set()

    def interrupting(function: str, *arguments: object) -> object:
        if function in interrupts:
            interrupts.remove(function)
            signal.raise_signal(signal.SIGINT)
        calls[function] += 1
        return call(function, *arguments)

    x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
    engine = qmm.Engine(path, "cuda", placement)
    expected = engine.matmul("a", x)
    engine.close()
    for module in (device, graph, chunks, pool):
        monkeypatch.setattr(module, "call", interrupting)
    engine = qmm.Engine(path, "cuda", placement)
    plan = engine.plan([("a", x_there, y_there)])
    plan()
    interrupts.add("cudaStreamSynchronize")
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    engine.close()
    for allocated, freed in PAIRS:
        assert calls[allocated] == calls[freed], (allocated, calls)
    assert plan.closed
    assert not is_mapped(path)
    assert not chunks.registered.now
    np.testing.assert_array_equal(y_there.copy_to_host(), expected)


def test_an_error_in_the_block_passes_and_the_engine_is_closed(path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), qmm.open(path) as model, qmm.Engine(model, "cuda") as engine:
        raise KeyError("mine")
    assert engine.closed
    assert not is_mapped(path)
    assert not chunks.registered.now


def test_a_device_without_memory_for_a_copy_says_so_and_goes_on(path: Path, x: np.ndarray) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cuda", "device") as engine:
        gpu = engine.gpu
        assert gpu is not None
        with pytest.raises(OutOfMemoryError, match=r"for too much on CUDA device 0 cannot be had: \d+ bytes are free"):
            gpu.allocate(1 << 50, "too much")
        assert engine.matmul("a", x).shape == (3, M)
