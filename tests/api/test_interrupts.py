"""Ctrl-C: an engine can be used and closed after it, and a command ends with the exit code 130."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from children import command, run_python
from gguf_files import random_blocks, write_gguf
from small_model import K, is_mapped, write_small_model

import qmm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


def interrupt() -> None:
    """What Ctrl-C does, from any thread."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def multiply_for_ever(engine: qmm.Engine, x: np.ndarray, start: Callable[[], object]) -> None:
    start()
    while True:
        engine.matmul("a", x)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_engine_multiplies_and_closes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper that still multiplied then would read an unmapped file, and write into memory that was given back."""
    from qmm.kernels.ops.cpu import parallel

    monkeypatch.setattr(parallel, "HELPER_NBYTES", 1)
    x = np.ones((256, K), np.float32)
    for number in range(20):
        engine = qmm.Engine(path, "cpu")
        expected = engine.matmul("a", x)
        timer = threading.Timer(0.01 + 1e-4 * number, interrupt)
        with pytest.raises(KeyboardInterrupt):
            multiply_for_ever(engine, x, timer.start)
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
        engine.close()
        assert not is_mapped(path)


@pytest.mark.usefixtures("interruptible")
def test_closing_that_is_interrupted_while_it_waits_can_be_done_again(path: Path) -> None:
    engine = qmm.Engine(path, "cpu")
    under_way, done = threading.Event(), threading.Event()

    def call() -> None:
        with engine._in_flight.now:
            under_way.set()
            done.wait()

    thread = threading.Thread(target=call)
    thread.start()
    under_way.wait()
    threading.Timer(0.05, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert engine.closed
    assert is_mapped(path)
    done.set()
    engine.close()
    thread.join()
    assert not is_mapped(path)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("options", [(), ("--paranoid",)], ids=["verify", "paranoid"])
def test_ctrl_c_ends_a_long_job_at_once_and_its_children(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "long.gguf"
    shape = (4096, 4096)
    data = random_blocks("Q8_0", shape, np.random.default_rng(0))
    write_gguf(path, {f"w{number}": ("Q8_0", shape, data) for number in range(6)})
    # Not by `python -m qmm`: that ends by SIGINT, if it comes in the middle of text that eval() runs.
    arguments = command("from qmm.cli.app import main; main()", "verify", path, "--device", "cpu", "--n", "1", *options)
    child = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert child.stderr is not None
    awaited = "between guards" if options else "on the CPU"
    while awaited not in child.stderr.readline():
        assert child.poll() is None
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    started = time.monotonic()
    out, err = child.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert child.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


@pytest.mark.parametrize("becomes", ["another error", "nothing"])
def test_ctrl_c_that_c_code_makes_something_else_of_ends_a_command(path: Path, becomes: str) -> None:
    """As where Numba is imported, which says ImportError of any exception, and in callbacks, which drop it."""
    code = """
import ctypes, signal
import qmm.cli.info
from qmm.cli.app import main

def interrupt():
    signal.raise_signal(signal.SIGINT)

def describe(*arguments):
    if becomes == "nothing":
        ctypes.CFUNCTYPE(None)(interrupt)()
        return
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ImportError("numba could not be imported")

becomes = sys.argv.pop()
qmm.cli.info.describe = describe
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    done = run_python(code, "info", path, becomes)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
