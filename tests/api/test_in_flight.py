"""Calls under way: counted, waited for, and refused after the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from qmm.errors import ClosedError
from qmm.in_flight import InFlight

SECONDS = 60


@pytest.fixture
def calls() -> InFlight:
    return InFlight("it was closed")


@pytest.fixture
def other(calls: InFlight) -> Iterator[threading.Event]:
    """A call in another thread, two blocks deep, which ends when the event is set."""
    begun, ends = threading.Event(), threading.Event()

    def call() -> None:
        with calls, calls:
            begun.set()
            ends.wait(SECONDS)

    thread = threading.Thread(target=call)
    thread.start()
    begun.wait(SECONDS)
    yield ends
    ends.set()
    thread.join()


def test_the_end_waits_for_a_call_of_another_thread(calls: InFlight, other: threading.Event) -> None:
    closing = threading.Thread(target=calls.end)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    with pytest.raises(ClosedError, match="it was closed"), calls:
        pass
    other.set()
    closing.join(SECONDS)
    assert not closing.is_alive()


def test_the_end_may_be_asked_for_twice(calls: InFlight) -> None:
    with calls:
        pass
    calls.end()
    calls.end()


def test_an_error_in_a_call_ends_it(calls: InFlight) -> None:
    with pytest.raises(KeyError), calls, calls:
        raise KeyError
    threads = [threading.Thread(target=calls.end) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_what_an_interrupt_left_counted_of_this_thread_is_not_waited_for(calls: InFlight) -> None:
    calls.__enter__()  # and never left: as if KeyboardInterrupt had come right behind it
    calls.end()
