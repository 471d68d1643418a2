"""Engines on a GPU: threads, forks, interrupts, and every way to the end of their life, and of CUDA's."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from children import command, run_python
from numba import cuda
from small_model import K, M, is_mapped, write_small_model

import qmm
import qmm.cli.smoke
from qmm import device as gpu_module
from qmm.cuda import call
from qmm.errors import ClosedError, DeviceError
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


def test_an_engine_that_is_dropped_in_a_cycle_is_not_collected_in_a_capture(path: Path, x: np.ndarray) -> None:
    """Its closing would wait for the device, which ends the capture."""
    dropped = qmm.Engine(path, "cuda", "mapped")
    dropped.itself = dropped  # type: ignore[attr-defined]
    x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
    with qmm.Engine(path, "cuda", "device") as engine:
        expected = engine.matmul("a", x)
        held: list[object] = [dropped]
        del dropped
        before = gc.get_threshold()
        gc.set_threshold(1)
        held.clear()
        try:
            plan = engine.plan([("a", x_there, y_there)])
        finally:
            gc.set_threshold(*before)
        plan()
        plan.close()
        np.testing.assert_array_equal(y_there.copy_to_host(), expected)


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
    ("cudaMalloc", "cudaFree"),
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
    for module in (gpu_module, registration):
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


BROKEN = """
import numpy as np, qmm
from numba import cuda
from qmm.errors import DeviceError, RegistrationError
from qmm.device import Device
from qmm.direct import read_bytes

path, placement = sys.argv[1:]
x = np.ones((3, 256), np.float32)
model = qmm.open(path)
engine = qmm.Engine(model, "cuda", placement)
x_there, y_there = cuda.to_device(x), cuda.device_array((3, 64), np.float32)
engine.matmul("a", x)
plan = engine.plan([("a", x_there, y_there)])
other = Device(0)
try:
    read_bytes(other, 64, 16, other.stream)  # nothing lies there: somebody's kernel fails
except DeviceError as error:
    print(error)
for use in (
    lambda: engine.matmul("a", x),
    lambda: engine.matmul("b", x),
    lambda: engine.matmul("a", x_there, y_there),
    lambda: engine.dequantize("a"),
    plan,
    lambda: qmm.Engine(model, "cuda", placement),
    plan.close,
    engine.close,
):
    try:
        use()
        print("NO ERROR")
    except (DeviceError, RegistrationError) as error:
        print(error)
engine.close()
with qmm.Engine(model, "cpu") as cpu:
    print(cpu.matmul("a", x).shape)
print(qmm.Engine(model).explanation)
"""


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_kernel_that_failed_elsewhere_is_said_at_each_use_and_the_cpu_still_works(path: Path, placement: str) -> None:
    done = run_python(BROKEN, path, placement)
    assert done.returncode == 0, done.stderr
    *errors, cpu, auto = done.stdout.splitlines()
    assert len(errors) == 9, done.stdout
    for error in errors:
        assert "700" in error, error
        assert "start a new one" in error, error
    assert cpu == "(3, 64)"
    assert auto.startswith("on the CPU"), auto
    assert "700" in auto


FORKED = """
import gc, os, signal, warnings
import numpy as np, qmm
from numba import cuda as numba_cuda
from qmm import device as gpu
from qmm.errors import ClosedError, DeviceError, RegistrationError
from qmm.loaders import FileMapping, HostRegistration
from qmm import cuda
from qmm.loaders.access import registered as registration

warnings.simplefilter("ignore", DeprecationWarning)
path, placement = sys.argv[1:]
x = np.ones((3, 256), np.float32)
model = qmm.open(path)
engine = qmm.Engine(model, "cuda", placement)
mapping = FileMapping.open(path)
registered = HostRegistration.of(mapping, [(0, 100)])
expected = engine.matmul("a", x)
plan = engine.plan([("a", numba_cuda.to_device(x), numba_cuda.device_array((3, 64), np.float32))])
child = os.fork()
if child == 0:
    signal.alarm(60)
    for use in (
        lambda: engine.matmul("a", x),
        lambda: registered.address(0, 1),
        lambda: HostRegistration.of(mapping, [(0, 100)]),
        lambda: qmm.Engine(model, "cuda", placement),
    ):
        try:
            use()
            print("NO ERROR", flush=True)
        except (ClosedError, DeviceError, RegistrationError) as error:
            print(type(error).__name__, error, flush=True)
    calls = []
    cuda.call = gpu.call = registration.call = lambda function, *arguments: calls.append(function)
    registered.close()
    del plan
    engine.close()
    del engine, registered
    gc.collect()
    print("calls", calls)
    with qmm.Engine(model) as cpu:
        print(cpu.explanation, cpu.matmul("a", x).shape, flush=True)
    os._exit(0)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(np.array_equal(engine.matmul("a", x), expected))
registered.close()
engine.close()
"""


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_forked_child_is_told_so_and_the_parent_goes_on(path: Path, placement: str) -> None:
    done = run_python(FORKED, path, placement)
    assert done.returncode == 0, done.stderr
    used, address, again, engine, calls, cpu, child, parent = done.stdout.splitlines()
    assert used.startswith("ClosedError")
    assert "fork" in used
    assert address.startswith("ClosedError")
    assert "forked from" in address
    for refused in (again, engine):
        assert "CUDA was in use when this process was forked" in refused
        assert "spawn" in refused
    assert calls == "calls []"  # what is dropped is the parent's
    assert cpu.startswith("on the CPU")
    assert cpu.endswith("(3, 64)")
    assert (child, parent) == ("child 0", "True")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_processes_use_one_file(path: Path, x: np.ndarray, placement: str) -> None:
    code = """
import numpy as np, qmm

path, placement, source, target = sys.argv[1:]
with qmm.open(path) as model, qmm.Engine(model, "cuda", placement) as engine:
    x = np.load(source)
    engine.matmul("a", x)
    print("ready", flush=True)
    sys.stdin.read()
    for _ in range(100):
        y = engine.matmul("a", x)
    np.save(target, y)
"""
    np.save(path.with_name("x.npy"), x)
    outputs = [path.with_name(f"y{number}.npy") for number in range(2)]
    children = [
        subprocess.Popen(
            command(code, path, placement, path.with_name("x.npy"), out),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for out in outputs
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"  # both have it registered before either goes on
    for child in children:
        child.communicate(timeout=120)
        assert child.returncode == 0
    with qmm.open(path) as model, qmm.Engine(model, "cuda", placement) as engine:
        expected = engine.matmul("a", x)
    for out in outputs:
        np.testing.assert_array_equal(np.load(out), expected)


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
        with pytest.raises(DeviceError, match=r"for too much on CUDA device 0: cudaMalloc.*cudaErrorMemoryAllocation"):
            gpu.allocate(1 << 50, "too much")
        assert engine.matmul("a", x).shape == (3, M)
