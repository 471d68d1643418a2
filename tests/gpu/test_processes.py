"""Processes and a GPU: forks, a file that two use, and a kernel whose failure ends a process's use of CUDA."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from children import command, run_python
from small_model import K, write_small_model

import qmm

PLACEMENTS = ("mapped", "device")


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


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
    lambda: engine.matmul("a", x[:1]),  # whose kernel is not loaded yet
    lambda: engine.matmul_each(["a", "b"], x_there),
    lambda: engine.dequantize("a"),
    lambda: engine.plan([("a", x_there, y_there)]),
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
    assert len(errors) == 12, done.stdout
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
from qmm import cuda, device, graph
from qmm.errors import ClosedError, DeviceError, RegistrationError
from qmm.loaders import FileMapping, HostRegistration
from qmm.loaders.access import chunks

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
    cuda.call = device.call = graph.call = chunks.call = lambda function, *arguments: calls.append(function)
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
