"""Everything that the command line prints goes through here, so that no text of a file can steer the terminal.

A name, a key, a value or a path may hold any character, escape sequences among them; :func:`printable` writes those
that do not show as Python would. Python's own stdout and stderr are replaced (:func:`take_streams`), for three reasons:
a text that the encoding lacks is no error, stderr is never one, and a stdout that cannot be written to is one error
of one kind, which no library on the way takes for its own.
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
    r"""``text`` on one line, with what does not show written visibly: ``\x1b``, ``\n``, ``\u202e``.

    That is what ``str.isprintable`` says: control characters, line and paragraph separators, the marks that turn the
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
    """Print lines on stdout, each as soon as it is there."""
    for line in lines:
        sys.stdout.write(f"{printable(line)}\n")


def say(text: str) -> None:
    """Print one line on stderr."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


def line_width() -> int | None:
    """Columns of a line on stdout; None where it is no terminal, and COLUMNS does not say either."""
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
    """stdout or stderr. Only the first write that fails is an error; what follows is thrown away, at exit too."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self._failed = False

    def write(self, data: Any) -> int:
        """Write to the file, or nowhere once that has failed."""
        while not self._failed:
            try:
                written: int | None = super().write(data)
                if written is not None:
                    return written
                # Full, and set not to block, as another program may do to a pipe or a terminal that it shares with us.
                if self.fileno() != 1:
                    break
                select.select([], [self], [])
            except OSError as reason:
                self._failed = True
                if self.fileno() == 1:
                    raise OutputError(reason) from reason
        return len(data)


def take_streams() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` for the rest of this process, and say warnings in one line.

    Raises:
        OutputError: stdout is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets that number; else a file would, and a library's message would hit it
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
