"""Whether something else on the machine disturbed a timing: how long this process's threads waited for a CPU meanwhile.

On an idle machine a thread that can run does. Where others keep the CPUs busy it waits in the kernel's queue, and a
product that two threads share waits for the later of them: beside spinning threads (ggml's poll for work) that made one
side a hundred times as slow as the other. The kernel counts the wait of each thread (``/proc/self/task/*/schedstat``),
and what the hypervisor took from the CPUs (steal, in ``/proc/stat``).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

__all__ = ["ADVICE", "LIMIT", "Load"]

LIMIT = 0.1
"""Of the time of the threads that are timed: medians of rounds stand single interruptions, but not much more."""
ADVICE = (
    f"A row is disturbed where the process's threads waited for a CPU for more than {LIMIT:.0%} of the time: something "
    "else kept the machine busy, so no ratio is given. Measure such rows again when the machine is idle: -k selects "
    "them, and --save-results puts them in the place of the old ones."
)


class Load:
    """A ``with`` block around a timing; ``disturbed`` tells afterwards.

    Args:
        threads: that work at a time.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.waited: float | None = None
        """Seconds of waiting in parts of the threads' time; None where the system does not say."""

    def __enter__(self) -> Load:
        self._began, self._waits, self._stolen = time.perf_counter(), waits(), stolen_seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        seconds, now = time.perf_counter() - self._began, waits()
        if now is not None and self._waits is not None:
            waited = sum(after - self._waits.get(thread, 0) for thread, after in now.items()) / 1e9
            self.waited = (waited + stolen_seconds() - self._stolen) / (seconds * self.threads)

    @property
    def disturbed(self) -> str | None:
        """How, in a few words; None where it was not, or nobody knows."""
        if self.waited is None or self.waited <= LIMIT:
            return None
        return f"waited for a CPU {self.waited:.0%} of the time"


def waits(tasks: Path = Path("/proc/self/task")) -> dict[str, int] | None:
    """Nanoseconds that each thread could have run and did not; None where the kernel does not count them."""
    found = {}
    for file in tasks.glob("*/schedstat"):
        with suppress(OSError):  # a thread that has ended
            found[file.parent.name] = int(file.read_text().split()[1])
    return found or None


def stolen_seconds(stat: Path = Path("/proc/stat")) -> float:
    """What the hypervisor took from the CPUs that this process may use, since the start of the machine."""
    if not stat.exists():
        return 0.0
    cpus = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in stat.read_text().splitlines())
    return sum(int(fields[8]) for fields in lines if fields[0] in cpus and len(fields) > 8) / os.sysconf("SC_CLK_TCK")
