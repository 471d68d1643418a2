"""Everything that the command line prints goes through here, so that no text of a file can control the terminal.

A name, a key, a value or a path may hold any character, escape sequences among them; :func:`printable` escapes
unprintable ones as Python does. Python's own stdout and stderr are replaced (:func:`take_streams`), for three reasons:
text outside the encoding is no error, a failing stderr is never an error, and a failing stdout is one error of our own
type, which no library in between handles.
"""

from __future__ import annotations

import io
import json
import os
import select
import shutil
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

__all__ = ["OutputError", "json_text", "line_width", "printable", "say", "show", "take_streams"]


def printable(text: str) -> str:
    r"""``text`` on one line, with unprintable characters escaped: ``\x1b``, ``\n``, ``\u202e``.

    Unprintable by ``str.isprintable`` are control characters, line and paragraph separators, the marks that turn the
    direction of writing, lone surrogates. A byte that was no UTF-8, which Python keeps as U+DC80 to U+DCFF, is ``\x80``
    to ``\xff``.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number - 0xDC00:x}" if 0xDC80 <= number <= 0xDCFF else character.encode("unicode_escape").decode()


def json_text(value: Any, indent: int | None = None) -> str:
    """A JSON document in printable ASCII, which every encoding has; lone surrogates are kept, as escapes."""
    return json.dumps(value, indent=indent, allow_nan=False).replace("\x7f", "\\u007f")  # json leaves DEL as it is


def show(lines: Iterable[str]) -> None:
    """Print lines on stdout, each at once."""
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")


def say(text: str) -> None:
    """Print one line on stderr."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


def line_width() -> int | None:
    """Columns of a line on stdout; None if it is not a terminal and COLUMNS is not set."""
    asked = os.environ.get("COLUMNS", "")
    if not sys.stdout.isatty() and not (asked.isdecimal() and int(asked)):
        return None
    return shutil.get_terminal_size().columns


# Streams --------------------------------------------------------------------------------------------------------------


class OutputError(Exception):
    """stdout cannot be written to. It is no OSError, which click and Rich would take for their own and end with 1."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(f"standard output cannot be written to: {reason.strerror}")
        self.pipe_closed = isinstance(reason, BrokenPipeError)


class _Stream(io.FileIO):
    """stdout or stderr. Only the first failing write is an error; later writes are discarded, also at exit."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._failed = False

    def write(self, data: Any) -> int:
        """Write to the file; discard everything once a write has failed."""
        while not self._failed:
            try:
                written: int | None = super().write(data)
                if written is not None:
                    return written
                # The pipe or terminal is full, and non-blocking, as another program that shares it may set it.
                if self.fileno() != 1:
                    break
                select.select([], [self], [])
            except OSError as reason:
                self._failed = True
                if self.fileno() == 1:
                    raise OutputError(reason) from reason
        return len(data)


def take_streams() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` for the rest of this process, and print warnings on one line.

    Raises:
        OutputError: stdout is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(
                os.devnull, os.O_RDWR
            )  # takes the descriptor's number; else a file would get it, and a library's message be written to it
    closed = sys.stdout is None
    sys.stdout, sys.stderr = _text_stream(1, sys.stdout), _text_stream(2, sys.stderr)
    warnings.showwarning = lambda message, *rest, **more: say(f"warning: {message}")
    if closed:
        raise OutputError(OSError(0, "it is closed; send it to a file, or to /dev/null"))


def _text_stream(number: int, former: TextIO | None) -> TextIO:
    if former is not None:
        with suppress(OSError):
            former.flush()
    stream = _Stream(number)
    encoding = getattr(former, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=number == 2 or stream.isatty(),
    )
