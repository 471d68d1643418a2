"""Threads that help: refused ones, late ones, failing ones, and none left at work when a product ends."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from children import run_python

from qmm.kernels.ops.cpu.threads import Helpers

SECONDS = 60
"""After which a thread that does not come is a failure."""

PRODUCTS = """
import atexit, gc, os, resource, threading, time
import numpy as np
from qmm.kernels.ops.cpu import parallel, products as cpu
from qmm.kernels.formats import FORMATS

parallel.HELPER_NBYTES = 1
parallel.set_threads(3)
form, m, k = FORMATS["Q8_0"], 1000, 1024
weights = np.random.default_rng(0).integers(0, 64, m * form.row_nbytes(k), np.uint8)
address, x = weights.ctypes.data, np.ones((1, k), np.float32)

def product():
    out = np.empty((1, m), np.float32)
    cpu.matmul(form, address, m, k, x, out)
    return out

def tasks():
    return len(os.listdir("/proc/self/task"))

helpers = parallel.Threads.helpers.now
most, helpers.most = helpers.most, 0
expected = product()  # compiled, and no helper started
helpers.most = most
alone = tasks()
"""


def said_by(code: str) -> str:
    """What a child that may multiply says; it must end well and say nothing else."""
    done = run_python(PRODUCTS + code)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


LIMITED = """
import _thread, os, resource, sys
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(54321); os.setuid(54321)
usual = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (1, usual[1]))
"""
"""A limit on the user's threads; root has none, and so becomes another user."""


def test_a_refused_thread_is_done_without_leaves_nothing_and_is_tried_again() -> None:
    if "can't start new thread" not in run_python(LIMITED + "_thread.start_new_thread(print, ())").stderr:
        pytest.skip("this system does not let a process limit its threads")
    code = (
        LIMITED
        + """
print(all(np.array_equal(product(), expected) for _ in range(20)), tasks() - alone)
counters = [np.zeros(1, np.int64) for _ in range(64)]  # where those of the products lay
resource.setrlimit(resource.RLIMIT_NPROC, usual)
print(all(np.array_equal(product(), expected) for _ in range(20)), tasks() - alone)
print(any(counter[0] for counter in counters))
"""
    )
    assert said_by(code) == "True 0\nTrue 2\nFalse\n"


def test_helpers_that_are_granted_help_beside_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    helpers, usual, started = Helpers(3), threading.Thread.start, []

    def second_is_refused(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        usual(thread)

    monkeypatch.setattr(threading.Thread, "start", second_is_refused)
    for threads in (2, 4):  # the refused one is tried again
        all_there = threading.Barrier(threads)
        helpers.run(lambda there=all_there: there.wait(SECONDS) and None, 3)
    assert len(started) == 4
    helpers.dismiss()


def test_a_helper_that_has_not_begun_is_not_waited_for_and_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wakes, calls = threading.Event(), []
    helpers, usual = Helpers(1), Helpers._serve
    monkeypatch.setattr(Helpers, "_serve", lambda self: wakes.wait(SECONDS) and usual(self))
    for _ in range(3):
        helpers.run(lambda: calls.append(threading.get_ident()), 1)
    wakes.set()
    helpers.run(threading.Barrier(2).wait, 1)  # it is there, and has nothing left of those before
    assert calls == [threading.get_ident()] * 3
    helpers.dismiss()


@pytest.mark.usefixtures("interruptible")
def test_every_helper_has_ended_when_an_interrupt_is_raised() -> None:
    """KeyboardInterrupt twice: in the product's own share, and while it waits for its helper."""
    helpers, caller, both, ended = Helpers(1), threading.get_ident(), threading.Barrier(2), []

    def work() -> None:
        both.wait(SECONDS)
        if threading.get_ident() == caller:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        signal.pthread_kill(caller, signal.SIGINT)
        time.sleep(0.1)
        ended.append(threading.get_ident())

    with pytest.raises(KeyboardInterrupt):
        helpers.run(work, 1)
    assert len(ended) == 1
    assert ended != [caller]
    helpers.run(threading.Barrier(2).wait, 1)  # the thread is still there
    helpers.dismiss()


@pytest.mark.parametrize("failing", ["caller", "helper"])
def test_an_error_is_raised_when_every_thread_has_ended(failing: str) -> None:
    caller, both, ended = threading.get_ident(), threading.Barrier(2), []

    def work() -> None:
        both.wait(SECONDS)
        is_caller = threading.get_ident() == caller
        if is_caller == (failing == "caller"):
            raise ArithmeticError(failing)
        time.sleep(0.05)
        ended.append(is_caller)

    helpers = Helpers(1)
    with pytest.raises(ArithmeticError, match=failing):
        helpers.run(work, 1)
    assert ended == [failing != "caller"]
    helpers.run(threading.Barrier(2).wait, 1)  # the thread is still there
    helpers.dismiss()


@pytest.mark.parametrize("begun", [False, True])
def test_what_the_work_holds_is_given_back_at_once(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        pass

    held, wakes = Held(), threading.Event()
    gone, usual, both = weakref.ref(held), Helpers._serve, threading.Barrier(1 + begun)
    if not begun:
        monkeypatch.setattr(Helpers, "_serve", lambda self: wakes.wait(SECONDS) and usual(self))

    def work(held: Held = held) -> None:
        both.wait(SECONDS)

    helpers = Helpers(1)
    gc.disable()
    try:
        helpers.run(work, 1)
        del work, held
        end = time.monotonic() + SECONDS
        while gone() is not None and time.monotonic() < end:
            time.sleep(0.001)
        assert gone() is None
    finally:
        gc.enable()
        wakes.set()
    helpers.dismiss()


def test_many_callers_share_the_helpers_and_a_work_may_ask_for_help_itself() -> None:
    helpers, done = Helpers(2), []

    def work() -> None:
        helpers.run(lambda: done.append(1), 2)

    with ThreadPoolExecutor(6) as callers:
        for future in [callers.submit(helpers.run, work, 2) for _ in range(300)]:
            future.result(SECONDS)
    assert len(done) >= 300
    assert len(helpers._threads) <= 2
    helpers.dismiss()
    for thread in helpers._threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_set_threads_and_forks_while_others_multiply() -> None:
    """The threads of before end; a forked child has its own."""
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
right = []
def multiply():
    right.extend(np.array_equal(product(), expected) for _ in range(200))
callers = [threading.Thread(target=multiply) for _ in range(3)]
for caller in callers: caller.start()
count = 0
while any(caller.is_alive() for caller in callers) or count < 10:
    parallel.set_threads(1 + count % 5)
    count += 1
    if count % 10 == 0:
        parallel.set_threads(3)
        child = os.fork()
        if not child:
            fine = all(np.array_equal(product(), expected) for _ in range(5)) and tasks() == 3
            os._exit(0 if fine else 1)
        right.append(os.waitpid(child, 0)[1] == 0)
parallel.set_threads(1)
end = time.monotonic() + 30
while tasks() > alone and time.monotonic() < end:
    time.sleep(0.01)
print(len(right) > 600, all(right), tasks() <= alone)  # fewer if a fork ended those of NumPy's BLAS
"""
    assert said_by(code) == "True True True\n"


def test_products_while_the_interpreter_ends() -> None:
    """In a thread that it waits for, in an atexit handler, in a finalizer, when no other thread runs any more, and in
    a thread that it does not wait for."""
    code = """
class Last:
    def __del__(self, product=product, expected=expected, equal=np.array_equal, say=os.write):
        say(1, f"finalizer {equal(product(), expected)}\\n".encode())

def thread():
    threading.main_thread().join()
    os.write(1, f"thread {all(np.array_equal(product(), expected) for _ in range(20))}\\n".encode())

def daemon():
    while True: product()

sys.modules["kept"] = Last()
atexit.register(lambda: os.write(1, f"atexit {np.array_equal(product(), expected)}\\n".encode()))
threading.Thread(target=thread).start()
threading.Thread(target=daemon, daemon=True).start()
"""
    assert said_by(code) == "thread True\natexit True\nfinalizer True\n"
