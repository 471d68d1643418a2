"""The end of a ``with`` block: what is closed, and which error is shown."""

from __future__ import annotations

import gc
import threading

import pytest

from qmm.errors import DeviceError, QmmError
from qmm.loaders.closing import Closing, undisturbed

CLOSED: list[int] = []
"""The threads in which things were closed, one after the other."""


@pytest.fixture(autouse=True)
def _none_closed() -> None:
    gc.collect()
    CLOSED.clear()


class Thing(Closing):
    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.closed = False

    def close(self) -> None:
        self.closed = True
        CLOSED.append(threading.get_ident())
        if self.failure is not None:
            raise self.failure


def test_the_block_gets_the_thing_and_closes_it() -> None:
    thing = Thing()
    with thing as entered:
        assert entered is thing
        assert not thing.closed
    assert thing.closed


def test_the_blocks_error_passes_on_and_the_thing_is_closed() -> None:
    thing = Thing()
    with pytest.raises(KeyError, match="mine"), thing:
        raise KeyError("mine")
    assert thing.closed


def test_a_failure_to_close_is_raised() -> None:
    with pytest.raises(DeviceError, match="a kernel failed"), Thing(DeviceError("a kernel failed")):
        pass


def test_the_blocks_error_comes_before_the_failure_to_close() -> None:
    with pytest.raises(KeyError, match="mine"), Thing(QmmError("closing")):
        raise KeyError("mine")


def test_a_bug_in_closing_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), Thing(ZeroDivisionError()):
        raise KeyError("mine")


def test_what_is_dropped_is_closed() -> None:
    Thing()
    assert len(CLOSED) == 1


def test_what_is_dropped_in_a_cycle_is_closed_with_it() -> None:
    first, second = Thing(), Thing()
    first.other, second.other = second, first  # type: ignore[attr-defined]
    del first, second
    assert CLOSED == []
    gc.collect()
    assert len(CLOSED) == 2


def test_a_dropped_thing_that_fails_to_close_stops_nobody() -> None:
    Thing(ZeroDivisionError())
    Thing()
    assert len(CLOSED) == 2


def test_nothing_that_is_dropped_is_closed_in_an_undisturbed_block() -> None:
    with undisturbed():
        with undisturbed():
            Thing()
        assert CLOSED == []
        Thing()
        assert CLOSED == []
    assert len(CLOSED) == 2


def test_an_undisturbed_block_that_fails_closes_them_all_the_same() -> None:
    def fail() -> None:
        with undisturbed():
            Thing()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert len(CLOSED) == 1


def test_a_lock_that_closing_takes_is_not_waited_for_by_the_thread_that_holds_it() -> None:
    lock = threading.Lock()

    class Locked(Thing):
        def close(self) -> None:
            with lock:
                super().close()

    with undisturbed(), lock:
        Locked()
        assert CLOSED == []
    assert len(CLOSED) == 1


def test_threads_do_not_keep_each_other_from_closing() -> None:
    with undisturbed():
        thread = threading.Thread(target=Thing)
        thread.start()
        thread.join()
        assert len(CLOSED) == 1
    assert [threading.get_ident()] != CLOSED
