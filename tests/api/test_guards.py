"""Host memory between pages that fault; that of GPUs is in tests/gpu/test_guards.py."""

from __future__ import annotations

import mmap
import signal
from pathlib import Path

import numpy as np
import pytest
from children import run_python

from qmm.errors import MappingError
from qmm.verify.guards import HostGuard


@pytest.mark.parametrize(("nbytes", "pages"), [(0, 1), (1, 1), (mmap.PAGESIZE, 1), (mmap.PAGESIZE + 1, 2)])
def test_whole_pages_are_had(nbytes: int, pages: int) -> None:
    with HostGuard(nbytes) as guard:
        assert guard.nbytes == pages * mmap.PAGESIZE
        assert guard.address % mmap.PAGESIZE == 0


def test_bytes_come_back() -> None:
    with HostGuard(100) as guard:
        guard.fill(0, guard.nbytes, 7)
        guard.put(guard.nbytes - 8, np.array([1.5, -2.0], np.float32))
        assert guard.get(guard.nbytes - 8, 8).view(np.float32).tolist() == [1.5, -2.0]
        assert set(guard.get(0, guard.nbytes - 8)) == {7}


def test_closing_gives_the_addresses_back() -> None:
    guard = HostGuard(100)
    line = f"{guard.address:x}-"
    assert line in Path("/proc/self/maps").read_text()
    guard.close()
    guard.close()
    assert line not in Path("/proc/self/maps").read_text()


def test_more_memory_than_there_are_addresses_is_refused() -> None:
    with pytest.raises(MappingError, match="addresses cannot be had"):
        HostGuard(1 << 60)


TOUCH = """
import ctypes
from qmm.verify.guards import HostGuard

guard = HostGuard(5000)
at = {"below": -1, "first": 0, "last": guard.nbytes - 1, "behind": guard.nbytes}[sys.argv[1]]
print(ctypes.string_at(guard.address + at, 1), flush=True)
"""


@pytest.mark.parametrize(("where", "status"), [("below", -signal.SIGSEGV), ("first", 0), ("last", 0), ("behind", -11)])
def test_one_byte_on_either_side_faults(where: str, status: int) -> None:
    done = run_python(TOUCH, where)
    assert done.returncode == status
    assert done.stdout == ("" if status else "b'\\x00'\n")
