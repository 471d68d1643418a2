"""Whether something else on the machine disturbed a timing: how long this process's threads waited for a CPU meanwhile.

On an idle machine a thread that can run does. Where others keep the CPUs busy it waits in the kernel's queue, and a
product that two threads share waits for the later of them: beside spinning threads (ggml's poll for work) that made one
side a hundred times as slow as the other. The kernel counts the wait of each thread (``/proc/self/task/*/schedstat``),
and what the hypervisor took from the CPUs (steal, in ``/proc/stat``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

__all__ = ["ADVICE", "LIMIT", "Load"]

LIMIT = 0.1
"""Of the time of the threads that are timed: a median of rounds tolerates single interruptions, but not much more."""
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
        self._seconds = self._waited = 0.0
        self._known = True

    @property
    def waited(self) -> float | None:
        """Seconds of waiting in parts of the threads' time; None where the system does not say."""
        return self._waited / (self._seconds * self.threads) if self._known and self._seconds else None

    def __enter__(self) -> Load:
        self._began, self._waits, self._stolen = time.perf_counter(), waits(), stolen_seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pause()

    def _pause(self) -> None:
        now, self._seconds = waits(), self._seconds + time.perf_counter() - self._began
        if now is None or self._waits is None:
            self._known = False
            return
        waited = sum(after - self._waits.get(thread, 0) for thread, after in now.items()) / 1e9
        stolen = stolen_seconds() - self._stolen  # from all CPUs, of which these threads used a part
        self._waited += waited + stolen * min(1.0, self.threads / len(os.sched_getaffinity(0)))

    def without(self, setup: Callable[[], None]) -> Callable[[], None]:
        """A function that does not count: what runs, untimed, between the rounds."""

        def uncounted() -> None:
            self._pause()
            setup()
            self.__enter__()

        return uncounted

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
