"""The end of a ``with`` block: what is closed, and which error is shown."""

from __future__ import annotations

import pytest

from qmm.errors import DeviceError, QmmError
from qmm.loaders.closing import Closing


class Thing(Closing):
    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.closed = False

    def close(self) -> None:
        self.closed = True
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
