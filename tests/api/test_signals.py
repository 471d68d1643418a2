"""Handlers of signals are called at the end of a block, and once."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from qmm.signals import RAISING, handlers_held


@pytest.fixture(autouse=True)
def _handlers_that_raise() -> Iterator[None]:
    """A job in the background ignores Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in RAISING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in RAISING]


def raised_by(step: Callable[[], object]) -> None:
    with handlers_held():
        step()


def raised(*steps: Callable[[], object]) -> int:
    """How many steps are taken in a block that a handler's exception ends."""
    taken = 0
    try:
        with handlers_held():
            for step in steps:
                step()
                taken += 1
    except KeyboardInterrupt:
        return taken
    pytest.fail("no handler was called")


@pytest.mark.parametrize("number", RAISING)
def test_a_handler_is_called_at_the_end(number: signal.Signals) -> None:
    before = handlers()
    reached = raised(lambda: signal.raise_signal(number), lambda: signal.raise_signal(number))
    assert reached == 2
    assert handlers() == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_without_a_signal_nothing_happens() -> None:
    before = handlers()
    with handlers_held():
        assert all(held != usual for held, usual in zip(handlers(), before, strict=True))
    assert handlers() == before


def test_an_error_of_the_block_is_the_context_of_what_a_handler_raises() -> None:
    def fail() -> None:
        signal.raise_signal(signal.SIGINT)
        raise ValueError("its own")

    with pytest.raises(KeyboardInterrupt) as caught:
        raised_by(fail)
    assert isinstance(caught.value.__context__, ValueError)


def test_a_block_within_another_waits_for_the_outer_one() -> None:
    def inner() -> None:
        with handlers_held():
            signal.raise_signal(signal.SIGINT)

    assert raised(inner, lambda: None) == 2


def test_of_several_signals_one_is_heard_and_all_handlers_are_back() -> None:
    before = handlers()
    assert raised(*(functools.partial(signal.raise_signal, number) for number in RAISING)) == len(RAISING)
    assert handlers() == before


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_has_no_handler_in_python_stays_as_it_is(action: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, action)
    with handlers_held():
        assert signal.getsignal(signal.SIGINT) == action
    assert signal.getsignal(signal.SIGINT) == action


def test_other_threads_change_nothing() -> None:
    before = handlers()
    inside: list[object] = []

    def work() -> None:
        with handlers_held():
            inside.extend(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == before
