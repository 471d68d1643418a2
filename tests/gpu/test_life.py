"""Engines on a GPU: files that change, and every way to the end of their life, and of CUDA's."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from children import command, run_python
from numba import cuda
from small_model import CHANGES, LOSSES, K, M, is_mapped, write_small_model

import qmm
import qmm.cli.smoke
from qmm import cuda as cuda_module
from qmm import device as gpu_module
from qmm.cuda import call
from qmm.errors import ClosedError, DeviceError, MappingError, RegistrationError
from qmm.loaders import FileMapping, HostRegistration
from qmm.loaders.access import registered as registration
from qmm.memory import placement as placement_module

PLACEMENTS = ("mapped", "device")


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


# Files that change while they are registered --------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_while_registered_is_an_error_before_its_next_use(
    path: Path, x: np.ndarray, change: Callable[[Path], object], says: str
) -> None:
    x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
    with qmm.open(path) as model, qmm.Engine(model, "cuda", "mapped") as engine:
        engine.matmul("a", x_there, y_there)
        plan = engine.plan([("a", x_there, y_there)])
        plan()
        change(path)
        for use in (
            lambda: engine.matmul("a", x),
            lambda: engine.matmul("a", x_there, y_there),
            lambda: engine.dequantize("b"),
            lambda: engine.plan([("b", x_there, y_there)]),
            plan,
        ):
            with pytest.raises(MappingError, match=f"model.gguf: .*{says}"):
                use()
    assert not is_mapped(path)
    assert not registration._tables
    assert call("cudaDeviceSynchronize") is None


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_registered_file_is_used_when_its_name_is_gone(
    path: Path, x: np.ndarray, lose: Callable[[Path], object]
) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as cpu:
        exact = {name: cpu.dequantize(name) for name in model}
        with qmm.Engine(model, "cuda", "mapped") as engine:
            expected = engine.matmul("a", x)
            lose(path)
            np.testing.assert_array_equal(engine.matmul("a", x), expected)
            np.testing.assert_array_equal(engine.dequantize("b"), exact["b"])
        with qmm.Engine(model, "cuda", "mapped") as engine:  # registered when the name is gone
            np.testing.assert_array_equal(engine.matmul("a", x), expected)
    assert not is_mapped(path)
    assert not registration._tables


def test_a_copy_is_used_whatever_becomes_of_the_file(path: Path, x: np.ndarray) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cuda", "device") as engine:
        expected = engine.matmul("a", x)
        os.truncate(path, 100)
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
        with pytest.raises(MappingError, match="nbytes was"):
            engine.matmul("b", x)  # was not copied yet


def test_a_copy_takes_in_what_others_have_registered_of_a_tensor(path: Path, x: np.ndarray) -> None:
    """CUDA copies from no two registrations at once, nor from registered and other pages."""
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as cpu, FileMapping.open(path) as mapping:
        expected = {name: cpu.matmul(name, x) for name in ("a", "b")}
        start, nbytes = model["a"].info.offset, model["a"].nbytes
        with (
            HostRegistration.of(mapping, [(start + 100, 1), (start + 9000, 1)]),
            qmm.Engine(model, "cuda", "device") as engine,
        ):
            with HostRegistration.of(mapping, [(start, nbytes)]) as registered:
                pieces = registered.pieces(start, nbytes)
            assert len(pieces) > 2
            assert (pieces[0].start, pieces[-1].end) == (start, start + nbytes)
            assert all(one.end == other.start for one, other in pairwise(pieces))
            np.testing.assert_allclose(engine.matmul("a", x), expected["a"], rtol=1e-4, atol=1e-4)
        page = mapping.address + (model["b"].info.offset // 4096 + 1) * 4096
        call("cudaHostRegister", page, 4096, 0x0B)  # not by qmm
        try:
            with qmm.Engine(model, "cuda", "device") as engine:
                np.testing.assert_allclose(engine.matmul("b", x), expected["b"], rtol=1e-4, atol=1e-4)
        finally:
            call("cudaHostUnregister", page)


def test_a_file_that_was_cut_off_is_refused_by_the_driver_too(tmp_path: Path) -> None:
    """Between the check and the call nothing can be done: the driver finds no pages there."""
    path = tmp_path / "cut"
    path.write_bytes(bytes(1 << 20))
    with FileMapping.open(path) as mapping:
        os.truncate(path, 4096)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileMapping, "check", lambda self: None)
            with pytest.raises(RegistrationError, match="cudaErrorInvalidValue"):
                HostRegistration.of(mapping, [(0, 1 << 20)])
    assert not registration._tables


# The end of an engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("cycle", [False, True], ids=["dropped", "in a cycle"])
def test_an_engine_that_is_dropped_frees_all_in_order(path: Path, x: np.ndarray, placement: str, cycle: bool) -> None:
    engine = qmm.Engine(qmm.open(path), "cuda", placement)
    expected = engine.matmul("a", x)
    x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
    plan = engine.plan([("a", x_there, y_there)])
    plan()  # queued work reads the weights while they are given up
    if cycle:
        engine.plan_of_mine = plan  # type: ignore[attr-defined]
    del plan, engine
    gc.collect()
    assert not is_mapped(path)
    assert not registration._tables
    np.testing.assert_array_equal(y_there.copy_to_host(), expected)


def test_a_registration_that_is_dropped_unregisters(path: Path) -> None:
    address = 0
    with FileMapping.open(path) as mapping:
        address = mapping.address
        HostRegistration.of(mapping, [(0, 4096)])
        assert int(call("cudaPointerGetAttributes", address).type) == 0  # cudaMemoryTypeUnregistered
    assert not registration._tables
    assert not is_mapped(path)


def test_an_engine_that_is_dropped_while_another_registers_or_captures_waits_its_turn(
    path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run anywhere: here it does where closing would wait for itself, and end the capture."""
    dropped = [qmm.Engine(qmm.open(path), "cuda", "mapped") for _ in range(2)]
    for engine in dropped:
        engine.matmul("a", x)
    before = registration._register

    def collecting(*arguments: object) -> None:
        if len(dropped) == 2:
            dropped.pop()
        before(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(registration, "_register", collecting)
    other = path.with_name("other.gguf")
    other.write_bytes(path.read_bytes())
    with qmm.open(other) as model, qmm.Engine(model, "cuda", "mapped") as engine:
        assert len(dropped) == 1
        x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
        gpu = engine.gpu
        assert gpu is not None

        def work() -> None:
            dropped.clear()
            engine.matmul("a", x_there, y_there, gpu.stream)

        engine.matmul("a", x_there, y_there, gpu.stream)
        with gpu.replay(work, gpu.stream) as replay:
            assert not is_mapped(path)
            replay()
            gpu.synchronize(gpu.stream)
        np.testing.assert_array_equal(y_there.copy_to_host(), engine.matmul("a", x))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_exception_while_registering_leaves_nothing_registered(
    path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = registration.call
    calls: list[str] = []

    def failing(function: str, *arguments: object) -> object:
        result = usual(function, *arguments)
        calls.append(function)
        if function == "cudaHostRegister" and calls.count(function) == 2:
            raise error
        return result

    with FileMapping.open(path) as mapping:
        with monkeypatch.context() as patch:
            patch.setattr(registration, "call", failing)
            with pytest.raises(error):
                HostRegistration.of(mapping, [(0, 12288)], chunk_nbytes=4096)
        assert not registration._tables
        for page in range(3):
            assert int(call("cudaPointerGetAttributes", mapping.address + 4096 * page).type) == 0
        with HostRegistration.of(mapping, [(0, 12288)], chunk_nbytes=4096) as again:
            assert again.nbytes_registered == 12288


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
    assert not registration._tables


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ctrl_c_while_closing_comes_when_all_is_closed(
    path: Path, x: np.ndarray, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    closing = False

    def interrupting(function: str, *arguments: object) -> object:
        calls[function] += 1
        if closing:
            signal.raise_signal(signal.SIGINT)
        return call(function, *arguments)

    for module in (gpu_module, registration):
        monkeypatch.setattr(module, "call", interrupting)
    x_there, y_there = cuda.to_device(x), cuda.device_array((3, M), np.float32)
    model = qmm.open(path)
    engine = qmm.Engine(model, "cuda", placement)
    model.close()
    plan = engine.plan([("a", x_there, y_there)])
    plan()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        closing = True
        with pytest.raises(KeyboardInterrupt):
            engine.close()
    finally:
        signal.signal(signal.SIGINT, before)
    for made, undone in PAIRS:
        assert calls[made] == calls[undone], (made, calls)
    assert plan.closed
    assert not is_mapped(path)
    assert not registration._tables


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ctrl_c_anywhere_from_opening_to_closing_leaves_nothing_registered(path: Path, placement: str) -> None:
    code = """
import gc, os
import numpy as np, qmm
from interrupts import interrupted
from numba import cuda
from qmm.loaders.access import registered as registration
from qmm.cuda import call

x = np.ones((3, 256), np.float32)
x_there, y_there = cuda.to_device(x), cuda.device_array((3, 64), np.float32)

def cycle():
    with qmm.open(sys.argv[1]) as model, qmm.Engine(model, "cuda", sys.argv[2]) as engine:
        y = engine.matmul("a", x)
        engine.dequantize("b")
        with engine.plan([("a", x_there, y_there)]) as plan:
            plan()
        return y

expected = cycle()
descriptors = len(os.listdir("/proc/self/fd"))
count = sum(interrupted(cycle, 1e-4 + 1e-5 * round_, 20) for round_ in range(500))
gc.collect()
print(count, len(os.listdir("/proc/self/fd")) == descriptors, np.array_equal(cycle(), expected), end=" ")
print(registration._tables, sys.argv[1] + "\\n" in open("/proc/self/maps").read(), call("cudaDeviceSynchronize"))
"""
    done = run_python(code, path, placement)
    assert done.returncode == 0, done.stderr
    count, after = done.stdout.split(" ", 1)
    assert int(count) > 400
    assert after == "True True {} False None\n"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ctrl_c_at_every_place_from_opening_to_closing_leaves_nothing_behind(path: Path, placement: str) -> None:
    code = """
import collections, json, os
import numpy as np, qmm
from interrupts import what_is_left
from numba import cuda
from qmm import device as gpu
from qmm.loaders.access import registered as registration
from qmm.cuda import call

PAIRS = json.loads(sys.argv[3])
made, undone = collections.Counter(), collections.Counter()
x = np.ones((3, 256), np.float32)
x_there, y_there = cuda.to_device(x), cuda.device_array((3, 64), np.float32)

def counting(function, *arguments):
    made[function] += 1  # before, and what undoes it after: a Ctrl-C in between leaves a difference
    result = call(function, *arguments)
    undone[function] += 1
    return result

gpu.call = registration.call = counting

def cycle():
    with qmm.open(sys.argv[1]) as model, qmm.Engine(model, "cuda", sys.argv[2]) as engine:
        y = engine.matmul("a", x)
        engine.matmul("a", x_there, y_there)
        engine.dequantize("b")
        with engine.plan([("a", x_there, y_there)]) as plan:
            plan()
        engine.gpu.time(lambda: engine.matmul("a", x_there, y_there, engine.gpu.stream), engine.gpu.stream, 1, 2)
        return y

def held():
    open_files = len(os.listdir("/proc/self/fd"))
    mapped = sys.argv[1] + "\\n" in open("/proc/self/maps").read()
    return open_files, mapped, len(registration._tables), [made[one] - undone[other] for one, other in PAIRS]

expected = cycle()
places, wrong = what_is_left(cycle, held)
same = np.array_equal(cycle(), expected)
print(json.dumps([places, wrong, held()[2:], same, call("cudaDeviceSynchronize")]))
"""
    done = run_python(code, path, placement, json.dumps([*PAIRS, ("cudaEventCreate", "cudaEventDestroy")]), timeout=300)
    assert done.returncode == 0, done.stderr
    places, wrong, *after = json.loads(done.stdout)
    assert places > 2000
    assert wrong == []
    assert after == [[0, [0] * 6], True, None]


# Refusals -------------------------------------------------------------------------------------------------------------


def test_without_read_only_support_mapped_is_refused_and_copies_are_made(
    path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = registration.attribute
    monkeypatch.setattr(
        registration,
        "attribute",
        lambda name, device: 0 if name == "HostRegisterReadOnlySupported" else usual(name, device),
    )
    with qmm.open(path) as model:
        with pytest.raises(RegistrationError, match=r"HostRegisterReadOnlySupported is 0.*placement=\"device\""):
            qmm.Engine(model, "cuda", "mapped")
        with qmm.Engine(model, "cuda", "device") as engine, qmm.Engine(model, "cpu") as cpu:
            np.testing.assert_allclose(engine.matmul("a", x), cpu.matmul("a", x), rtol=1e-4, atol=1e-4)
    assert not registration._tables


def test_too_little_lockable_memory_is_said_with_the_way_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of this machine locks what it likes, whatever ulimit says: its refusal is made up."""
    usual = registration.call

    def refuses(function: str, *arguments: object) -> object:
        if function == "cudaHostRegister":
            raise cuda_module.CudaCallError(f"{function} returned cudaErrorMemoryAllocation (2)", *NO_MEMORY)
        return usual(function, *arguments)

    monkeypatch.setattr(registration, "call", refuses)
    with qmm.open(path) as model, pytest.raises(RegistrationError, match=r"ulimit -l.*placement=\"device\""):
        qmm.Engine(model, "cuda", "mapped")
    assert not registration._tables


NO_MEMORY = ("cudaErrorMemoryAllocation", 2)


def test_the_first_contact_is_made_in_a_child_and_remembered(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmm import contact

    made: list[Path] = []
    usual = contact.probe

    def probe(mapping: FileMapping, device: int) -> bool:
        made.append(mapping.path)
        return usual(mapping, device)

    monkeypatch.setattr(contact, "probe", probe)
    monkeypatch.setattr(contact, "_known", set())
    monkeypatch.setenv("QMM_CACHE_DIR", str(tmp_path / "cache"))
    with qmm.open(path) as model:
        for _ in range(2):
            with qmm.Engine(model, "cuda", "mapped", probe=True) as engine:
                assert engine.placement == "mapped"
        assert made == [path]
        contact._known.clear()  # as in another process
        qmm.Engine(model, "cuda", "device", probe=True).close()
        assert made == [path]
        monkeypatch.setenv("QMM_CACHE_DIR", "")
        contact._known.clear()
        qmm.Engine(model, "cuda", "device", probe=True).close()
        assert made == [path] * 2


def test_a_registration_that_hangs_in_the_child_is_an_error_and_copies_are_made_without(
    path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file here makes a registration hang: the child only sleeps."""
    from qmm import contact
    from qmm.loaders.access import preflight as probe

    monkeypatch.setattr(contact, "_known", set())
    monkeypatch.setenv("QMM_CACHE_DIR", "")
    monkeypatch.setattr(contact, "probe", lambda mapping, device: probe.probe(mapping, device, seconds=0.5))
    monkeypatch.setattr(probe, "_child_source", lambda file, device: "import time; time.sleep(600)")
    registered: list[object] = []
    monkeypatch.setattr(placement_module.HostRegistration, "of", lambda *arguments: registered.append(arguments))
    with qmm.open(path) as model:
        with pytest.raises(RegistrationError, match=r"had not ended after 0.5 s"):
            qmm.Engine(model, "cuda", "mapped", probe=True)
        with qmm.Engine(model, "cuda", "device", probe=True) as engine:
            engine.matmul("a", x)
    assert registered == []


# What ends a process's use of CUDA ------------------------------------------------------------------------------------

BROKEN = """
import numpy as np, qmm
from numba import cuda
from qmm.errors import DeviceError, RegistrationError
from qmm.device import GPU

path, placement = sys.argv[1:]
x = np.ones((3, 256), np.float32)
model = qmm.open(path)
engine = qmm.Engine(model, "cuda", placement)
x_there, y_there = cuda.to_device(x), cuda.device_array((3, 64), np.float32)
engine.matmul("a", x)
plan = engine.plan([("a", x_there, y_there)])
other = GPU(0)
try:
    other.read_bytes(64, 16, other.stream)  # nothing lies there: somebody's kernel fails
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
    assert not registration._tables


def test_a_device_without_memory_for_a_copy_says_so_and_goes_on(path: Path, x: np.ndarray) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cuda", "device") as engine:
        gpu = engine.gpu
        assert gpu is not None
        with pytest.raises(DeviceError, match=r"for too much on CUDA device 0: cudaMalloc.*cudaErrorMemoryAllocation"):
            gpu.allocate(1 << 50, "too much")
        assert engine.matmul("a", x).shape == (3, M)
