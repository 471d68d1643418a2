"""Python in a process of its own, for what may hang, or end a process."""

from __future__ import annotations

import errno
import signal
import sys

__all__ = ["ending", "no_start", "python"]


def python(code: str) -> list[str]:
    """The command of a child that runs ``code`` with the modules that this process would import, ``sys`` among them."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]


def ending(status: int) -> str:
    """How a child ended, in words, by its return code."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def no_start(reason: OSError) -> str:
    """That a child could not be started, in words, by the error."""
    hint = " Allow more processes (`ulimit -u`, a container's limit on pids)." if reason.errno == errno.EAGAIN else ""
    return f"could not be started ({reason}).{hint}"
