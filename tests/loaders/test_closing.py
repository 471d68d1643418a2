"""The end of a ``with`` block, and of what is dropped without one: what is closed, and which error is shown."""

from __future__ import annotations

import gc

import pytest
from children import run_python

from qmm.errors import DeviceError, QmmError
from qmm.loaders.closing import Resource

closed: list[Thing] = []


class Thing(Resource):
    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.is_closed = False

    @property
    def closed(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True
        closed.append(self)
        if self.failure is not None:
            raise self.failure


@pytest.fixture(autouse=True)
def _none_closed() -> None:
    closed.clear()


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


def test_what_is_dropped_open_is_closed_with_a_warning() -> None:
    with pytest.warns(ResourceWarning, match=r"<.*Thing object at .*> was dropped before it was closed"):
        Thing()
    assert len(closed) == 1


def test_what_was_closed_is_dropped_without_a_warning() -> None:
    Thing().close()
    assert len(closed) == 1


def test_what_is_dropped_in_a_cycle_is_closed_when_it_is_collected() -> None:
    first, second = Thing(), Thing()
    first.other, second.other = second, first  # type: ignore[attr-defined]
    del first, second
    assert closed == []
    with pytest.warns(ResourceWarning):
        gc.collect()
    assert len(closed) == 2


def test_a_dropped_thing_that_fails_to_close_stops_nobody() -> None:
    with pytest.warns(ResourceWarning):
        Thing(ZeroDivisionError())
    with pytest.warns(ResourceWarning):
        Thing()
    assert len(closed) == 2


def test_what_is_open_when_the_interpreter_exits_warns_and_prints_no_traceback() -> None:
    code = """
import qmm.loaders.closing

class Thing(qmm.loaders.closing.Resource):
    closed = False
    def close(self):
        import numpy.no_such_module

thing = Thing()
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_python(f"import warnings; warnings.simplefilter('always'){code}")
    assert done.returncode == 0
    assert "ResourceWarning: <__main__.Thing object" in done.stderr
    assert "Traceback" not in done.stderr
