"""Ctrl-C in children: at a chosen time, and at every place where Python would notice one."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import qmm.engine
import qmm.kernels
import qmm.loaders

__all__ = ["interrupted", "what_is_left"]

OURS = tuple(str(Path(str(module.__file__)).parent) for module in (qmm.engine, qmm.kernels, qmm.loaders))
"""The folders of the three rooms, whose code is interrupted; and so is contextlib's, which enters and leaves for it."""


def interrupted(work: Callable[[], object], seconds: float, times: int) -> bool:
    """Whether an alarm after so many seconds, which raises what Ctrl-C would, ends ``times`` calls of ``work``.

    It does not if it comes too late, or where Python calls something because an object dies: what is raised there is
    printed and forgotten.
    """
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # may be over before it returns
        for _ in range(times):
            work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


def what_is_left(work: Callable[[], object], held: Callable[[], object]) -> tuple[int, list[str]]:
    """Call ``work`` again and again, with a Ctrl-C at the first place where Python looks for signals, the second, ...

    CPython does so where a function begins or goes on, where one of C returns (and where a loop goes round, which is
    left out here): where it calls a profiler too. A signal that comes in between waits for the next such place.

    Args:
        work: should end by each, unless Python called something there because an object died.
        held: what the process holds; it should not change.

    Returns:
        How many places there are, and at which of them one of the two was not so.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = held()
    wrong = []
    number = 0
    while True:
        place, heard = _interrupted_at(work, number)
        if place is None:
            return number, wrong
        if not heard and "__del__" not in place:
            wrong.append(f"{place}: not heard")
        if held() != before:
            gc.collect()
            now = held()
            if now != before:
                wrong.append(f"{place}: held {before}, now {now}")
            before = now
        number += 1


def _interrupted_at(work: Callable[[], object], number: int) -> tuple[str | None, bool]:
    """The place of that number, None if there are not so many, and whether ``work`` ended by a Ctrl-C there."""
    passed = 0
    place = None

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal passed, place
        file = frame.f_code.co_filename
        if event not in ("call", "c_return") or not (file.startswith(OURS) or file == contextlib.__file__):
            return
        passed += 1
        if passed == number + 1:
            place = f"{event}: {_functions(frame)}"
            signal.raise_signal(signal.SIGINT)

    try:
        sys.setprofile(look)
        try:
            work()
        finally:
            sys.setprofile(None)
    except KeyboardInterrupt:
        return place, True
    return place, False


def _functions(frame: FrameType | None) -> str:
    """Where a frame is, and where it was called from, and so on up to this file."""
    names = []
    while frame is not None and frame.f_code.co_filename != __file__:
        names.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(names)
