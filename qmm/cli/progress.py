"""Progress of a command on stderr: a bar on a terminal, else lines, at each stage and every few seconds."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from qmm.cli import interrupts
from qmm.output import printable, say

__all__ = ["Bar"]

SILENCE = 10.0
"""Seconds without a line, where there is no bar."""


class _Count(ProgressColumn):
    """``12/236``, and nothing as long as the total is unknown."""

    def render(self, task: Task) -> Text:
        """The count as it is now."""
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}", no_wrap=True)


class Bar:
    """Progress of one command. A context manager; nothing is left on a terminal when it ends.

    Its methods raise KeyboardInterrupt if there was a Ctrl-C whose exception was lost.
    """

    def __init__(self) -> None:
        self._text = ""
        self._done, self._total = 0, 0
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._ticking = threading.Thread(target=self._tick, daemon=True)
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="crop"))
            columns = [BarColumn(20), _Count(), TimeElapsedColumn(), text]
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Bar:
        # One thread draws the bar, another prints lines; the system may refuse either, and the work goes on.
        if self._progress:
            try:
                self._progress.start()
            except RuntimeError:
                self._progress.stop()
                self._progress = None
        else:
            with suppress(RuntimeError):
                self._ticking.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress:
            self._progress.stop()
        else:
            self._ended.set()
            if self._ticking.ident is not None:
                self._ticking.join()

    def stage(self, text: str) -> None:
        """Begin a stage with this text."""
        interrupts.check()
        self._text = printable(text)
        if self._progress:
            self._progress.update(self._task, description=self._text)
        else:
            say(self._text)

    def start(self, total: int) -> None:
        """From here on ``total`` steps follow."""
        self._done, self._total = 0, total
        if self._progress:
            self._progress.reset(self._task, total=total)

    def step(self, text: str) -> None:
        """One of them is done."""
        interrupts.check()
        self._done += 1
        self._text = printable(text)
        if self._progress:
            self._progress.update(self._task, advance=1, description=self._text)

    def _tick(self) -> None:
        while not self._ended.wait(SILENCE):
            count = f"{self._done} of {self._total} done, now after " if self._done else ""
            say(f"{time.monotonic() - self._began:.0f} s: {count}{self._text}")
