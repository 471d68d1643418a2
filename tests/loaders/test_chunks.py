"""What is registered of a file, by a driver that only takes notes: shared, counted, given back, whatever comes between.

The driver itself is in tests/gpu/test_registered.py.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from small_model import is_mapped

from qmm.cuda import CudaCallError
from qmm.loaders.access import chunks
from qmm.loaders.access.chunks import acquire, release
from qmm.loaders.access.pages import Span
from qmm.loaders.mapping import FileMapping

PAGE = 4096
FAR = 1 << 40
"""From the host's address of a byte to the device's."""


class Driver:
    """Registers ranges that do not overlap.

    Attributes:
        ranges: what is registered: bytes by host address.
        calls: the names of the calls.
        hooks: what happens after a call of a name; each once.
        refuses: the error that unregistering ends with.
    """

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.calls: list[str] = []
        self.hooks: dict[str, Callable[[], object]] = {}
        self.refuses = ""

    def call(self, function: str, *arguments: int) -> object:
        self.calls.append(function)
        if function == "cudaHostRegister":
            start, nbytes, _ = arguments
            if any(start < other + size and other < start + nbytes for other, size in self.ranges.items()):
                raise CudaCallError("already registered", "cudaErrorHostMemoryAlreadyRegistered", 712)
            self.ranges[start] = nbytes
        if function == "cudaHostUnregister":
            if self.refuses:
                raise CudaCallError(self.refuses, self.refuses)
            if self.ranges.pop(arguments[0], None) is None:
                raise CudaCallError("not registered", "cudaErrorHostMemoryNotRegistered", 713)
        hook = self.hooks.pop(function, None)
        if hook is not None:
            hook()
        return arguments[0] + FAR if function == "cudaHostGetDevicePointer" else None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(chunks, "call", driver.call)
    monkeypatch.setattr(chunks, "on_device", lambda device: driver.call("on_device") or nullcontext())
    monkeypatch.setattr(chunks, "register_flags", lambda: 11)
    yield driver
    assert chunks.registered.now == []
    assert driver.ranges == {}


@pytest.fixture
def mapping(tmp_path: Path) -> Iterator[FileMapping]:
    path = tmp_path / "weights.gguf"
    path.write_bytes(bytes(64 * PAGE))
    with FileMapping.open(path) as opened:
        yield opened


def pages(first: int, end: int) -> Span:
    return Span(first * PAGE, end * PAGE)


def spans_of(acquired: list[chunks.Chunk]) -> list[Span]:
    return [chunk.span for chunk in acquired]


def test_each_page_is_registered_once_and_by_its_last_user_unregistered(mapping: FileMapping, driver: Driver) -> None:
    first = acquire(mapping, [pages(2, 4), pages(8, 10)], 64 * PAGE)
    second = acquire(mapping, [pages(0, 9)], 64 * PAGE)
    assert spans_of(first) == [pages(2, 4), pages(8, 10)]
    assert spans_of(second) == [pages(0, 2), pages(2, 4), pages(4, 8), pages(8, 10)]
    assert all(chunk.device_address == mapping.address + chunk.span.start + FAR for chunk in second)
    assert sum(driver.ranges.values()) == 10 * PAGE
    assert release(first, 0) is None
    assert sum(driver.ranges.values()) == 10 * PAGE
    assert release(second, 0) is None
    assert "cudaDeviceSynchronize" not in driver.calls  # it would spoil a capture, and wait for others' work
    assert (first, second) == ([], [])


def test_calls_are_cut_where_one_may_not_take_all(mapping: FileMapping, driver: Driver) -> None:
    acquired = acquire(mapping, [pages(0, 10)], 4 * PAGE)
    assert spans_of(acquired) == [pages(0, 4), pages(4, 8), pages(8, 10)]
    release(acquired, 0)


def test_registered_pages_stay_mapped_though_the_file_is_closed(tmp_path: Path, driver: Driver) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(bytes(PAGE))
    with FileMapping.open(path) as mapping:
        acquired = acquire(mapping, [pages(0, 1)], PAGE)
    assert is_mapped(path)
    release(acquired, 0)
    assert not is_mapped(path)


def test_a_refused_call_leaves_what_was_there_before(mapping: FileMapping, driver: Driver) -> None:
    earlier = acquire(mapping, [pages(0, 2)], 64 * PAGE)
    driver.ranges[mapping.address + 6 * PAGE] = PAGE  # by somebody else
    with pytest.raises(CudaCallError, match="already registered"):
        acquire(mapping, [pages(0, 10)], 2 * PAGE)
    assert driver.ranges == {mapping.address: 2 * PAGE, mapping.address + 6 * PAGE: PAGE}
    assert [chunk.users for chunk in earlier] == [1]
    del driver.ranges[mapping.address + 6 * PAGE]
    release(earlier, 0)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_registering_leaves_nothing_registered(mapping: FileMapping, driver: Driver) -> None:
    driver.hooks["cudaHostGetDevicePointer"] = lambda: driver.hooks.update(
        cudaHostRegister=lambda: signal.raise_signal(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):
        acquire(mapping, [pages(0, 4)], PAGE)
    assert driver.calls.count("cudaHostRegister") == 2
    assert driver.ranges == {}


@pytest.mark.usefixtures("interruptible")
def test_releasing_goes_on_after_an_interrupt(mapping: FileMapping, driver: Driver) -> None:
    acquired = acquire(mapping, [pages(0, 4)], PAGE)
    driver.hooks["on_device"] = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        release(acquired, 0)
    assert len(driver.ranges) == 4
    assert release(acquired, 0) is None


def test_what_is_released_while_another_registers_does_not_take_its_pages(mapping: FileMapping, driver: Driver) -> None:
    """As when the garbage collector closes a dropped registration of the same file in the middle of it."""
    dropped = acquire(mapping, [pages(0, 2), pages(4, 6)], 64 * PAGE)
    driver.hooks["cudaHostRegister"] = lambda: release(dropped, 0)
    acquired = acquire(mapping, [pages(0, 4)], 64 * PAGE)
    assert spans_of(acquired) == [pages(0, 2), pages(2, 4)]
    assert driver.ranges == {mapping.address: 2 * PAGE, mapping.address + 2 * PAGE: 2 * PAGE}
    release(acquired, 0)


def test_what_cannot_be_unregistered_stays_mapped_and_is_used_again(mapping: FileMapping, driver: Driver) -> None:
    acquired = acquire(mapping, [pages(0, 2)], 64 * PAGE)
    driver.refuses = "cudaErrorIllegalAddress"
    failure = release(acquired, 0)
    assert failure is not None
    assert failure.name == "cudaErrorIllegalAddress"
    assert acquired == []
    (left,) = chunks.registered.now
    assert not left.mapping.closed
    driver.refuses = ""
    again = acquire(mapping, [pages(0, 1)], 64 * PAGE)
    assert again == [left]
    assert driver.calls.count("cudaHostRegister") == 1
    release(again, 0)


def test_when_cuda_has_shut_down_everything_counts_as_unregistered(mapping: FileMapping, driver: Driver) -> None:
    acquired = acquire(mapping, [pages(0, 2)], 64 * PAGE)
    driver.refuses = "cudaErrorCudartUnloading"
    assert release(acquired, 0) is None
    driver.ranges.clear()
