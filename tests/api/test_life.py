"""Engines on the CPU: threads, forks, and every way to the end of their life."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from children import command, run_python
from small_model import K, is_mapped, write_small_model

import qmm
from qmm.errors import ClosedError


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


def drop(held: list[qmm.Engine]) -> None:
    held.clear()
    gc.collect()


@pytest.mark.parametrize("cycle", [False, True], ids=["dropped", "in a cycle"])
def test_an_engine_that_is_dropped_open_warns_and_gives_up_its_file(path: Path, x: np.ndarray, cycle: bool) -> None:
    engine = qmm.Engine(path, "cpu")
    engine.matmul("a", x)
    if cycle:
        engine.itself = engine  # type: ignore[attr-defined]
    held = [engine]
    del engine
    assert is_mapped(path)
    with pytest.warns(ResourceWarning, match=r"<Engine on the CPU.*> was dropped before it was closed"):
        drop(held)
    assert not is_mapped(path)


def test_an_engine_that_is_open_at_the_interpreters_exit_prints_nothing(path: Path) -> None:
    code = """
import numpy as np, qmm
engine = qmm.Engine(sys.argv[1], "cpu")
engine.matmul("a", np.ones(256, np.float32))
sys.modules["kept"] = engine
"""
    done = run_python(code, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_error_in_the_block_passes_and_the_engine_is_closed(path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        raise KeyError("mine")
    assert engine.closed
    assert model.closed
    assert not is_mapped(path)


def test_an_engine_that_could_not_be_made_leaves_nothing_behind(path: Path) -> None:
    with qmm.open(path) as model:
        for wrong in ({"device": "tpu"}, {"tensors": ["c"]}, {"activations": "int4"}):
            with pytest.raises(qmm.QmmError):
                qmm.Engine(model, **{"device": "cpu", **wrong})  # type: ignore[arg-type]
    assert not is_mapped(path)


def test_closing_waits_for_the_products_of_other_threads(path: Path, x: np.ndarray) -> None:
    """Otherwise the pages would go from under a product, and the process with them."""
    expected = None
    for _ in range(20):
        model = qmm.open(path)
        engine = qmm.Engine(model, "cpu")
        model.close()
        expected = engine.matmul("a", x)
        results: list[np.ndarray] = []
        ends: list[str] = []

        def work(engine: qmm.Engine = engine, results: list = results, ends: list = ends) -> None:
            try:
                while True:
                    results.append(engine.matmul("a", x))
            except ClosedError as error:
                ends.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        closers = [threading.Thread(target=engine.close) for _ in range(2)]
        for thread in closers:
            thread.start()
        for thread in threads + closers:
            thread.join()
        assert not is_mapped(path)
        assert len(ends) == 4
        assert all("Create another one" in end for end in ends)
        assert all(np.array_equal(result, expected) for result in results)


def test_a_forked_child_multiplies_and_closes_while_the_parents_threads_multiply(path: Path) -> None:
    """They are not in the child, where no call of theirs would ever end; nor does its exit change anything here."""
    code = """
import os, signal, threading, warnings
import numpy as np, qmm

warnings.simplefilter("ignore", DeprecationWarning)
engine = qmm.Engine(qmm.open(sys.argv[1]), "cpu")
x = np.ones((512, 256), np.float32)
engine.matmul("a", x)
stop = threading.Event()

def work():
    while not stop.is_set():
        engine.matmul("a", x)

threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
expected = engine.matmul("a", x)
for number in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        assert engine.forked
        assert np.array_equal(engine.matmul("a", x), expected)
        if number % 2:
            engine.close()
            os._exit(7)
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
stop.set()
[thread.join() for thread in threads]
print(np.array_equal(engine.matmul("a", x), expected))
engine.close()
"""
    done = run_python(code, path)
    assert (done.returncode, done.stdout) == (0, "7 " * 10 + "True\n"), done.stderr


def test_two_processes_multiply_by_one_file(path: Path, x: np.ndarray) -> None:
    code = """
import numpy as np, qmm

with qmm.open(sys.argv[1]) as model, qmm.Engine(model, "cpu") as engine:
    x = np.load(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.read()
    for _ in range(100):
        y = engine.matmul("a", x)
    np.save(sys.argv[3], y)
"""
    np.save(path.with_name("x.npy"), x)
    outputs = [path.with_name(f"y{number}.npy") for number in range(2)]
    children = [
        subprocess.Popen(
            command(code, path, path.with_name("x.npy"), out), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for out in outputs
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"  # both have it mapped before either multiplies
    for child in children:
        child.communicate(timeout=120)
        assert child.returncode == 0
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        expected = engine.matmul("a", x)
    for out in outputs:
        np.testing.assert_array_equal(np.load(out), expected)


def test_a_thousand_engines_leave_nothing_behind(path: Path, x: np.ndarray) -> None:
    def cycle() -> None:
        with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
            engine.matmul("a", x)

    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())

    def anonymous_nbytes() -> int:
        found = qmm.cli.smoke.anonymous_nbytes()
        assert found is not None
        return found

    import qmm.cli.smoke

    for _ in range(100):
        cycle()
    descriptors, mappings = held()
    before = anonymous_nbytes()
    for _ in range(1000):
        cycle()
    assert held()[0] == descriptors
    assert held()[1] <= mappings + 2  # the allocator's own may come and go
    assert anonymous_nbytes() - before < 1 << 20  # less than a page for each
    assert not is_mapped(path)
