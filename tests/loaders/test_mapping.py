"""One read-only shared mapping a file, gone with its last user."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from children import run_python

from qmm.errors import ClosedError, CopyError, MappingError
from qmm.loaders import FileMapping
from qmm.loaders import mapping as mapping_module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(bytes(range(256)) * 40 + b"tail")
    return path


def mapped(path: Path) -> list[str]:
    """Permissions of every mapping of ``path`` in this process; the fourth letter is s for shared."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if line.endswith(str(path))]


def test_mapping_is_read_only_and_shared(file: Path) -> None:
    with FileMapping.open(file) as mapping:
        assert mapped(file) == ["r--s"]  # never private: registering that hangs
        assert mapping.address % os.sysconf("SC_PAGESIZE") == 0
        assert mapping.nbytes == file.stat().st_size
        view = mapping.view(0, mapping.nbytes)
        assert view.ctypes.data == mapping.address
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            view.flags.writeable = True


def test_view_is_the_bytes_of_the_file(file: Path) -> None:
    with FileMapping.open(file) as mapping:
        view = mapping.view(10, 300)
        assert (view.dtype, view.shape) == (np.uint8, (300,))
        assert view.tobytes() == file.read_bytes()[10:310]
        assert mapping.view(mapping.nbytes - 1, 1).tobytes() == b"l"
        assert mapping.view(mapping.nbytes, 0).size == 0


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (10244, 1), (10243, 2), (0, 1 << 63), (1 << 63, 0)])
def test_view_past_either_end_names_both_numbers(file: Path, offset: int, nbytes: int) -> None:
    with FileMapping.open(file) as mapping, pytest.raises(MappingError, match=rf"bytes {offset} to .* has 10244"):
        mapping.view(offset, nbytes)


def test_opening_twice_maps_once_and_the_last_close_unmaps(file: Path) -> None:
    link = file.with_name("link.gguf")
    link.symlink_to(file)
    first, second, third = FileMapping.open(file), FileMapping.open(str(file)), FileMapping.open(link)
    shared = third.share()
    assert first.address == second.address == third.address == shared.address
    assert len(mapped(file)) == 1
    first.close()
    first.close()  # would unmap under the others if it counted twice
    second.close()
    third.close()
    assert len(mapped(file)) == 1
    assert shared.view(0, 2).tobytes() == b"\0\1"
    shared.close()
    assert not mapped(file)


def test_use_after_close_raises(file: Path) -> None:
    mapping = FileMapping.open(file)
    mapping.close()
    assert mapping.closed
    for use in (lambda: mapping.address, lambda: mapping.view(0, 1), mapping.check, mapping.share):
        with pytest.raises(ClosedError, match=r"weights\.gguf"):
            use()


def test_a_view_outlives_close_and_takes_the_mapping_with_it(file: Path) -> None:
    mapping = FileMapping.open(file)
    view = mapping.view(1, 3)
    mapping.close()
    assert view.tolist() == [1, 2, 3]
    assert mapped(file) == ["r--s"]
    del view
    assert not mapped(file)


def test_a_dropped_handle_is_a_closed_one(file: Path) -> None:
    FileMapping.open(file)
    gc.collect()
    assert not mapped(file)


def test_a_hundred_threads_share_one_mapping(file: Path) -> None:
    start = threading.Barrier(100)
    addresses: list[int] = []
    keep: list[FileMapping] = []

    def work() -> None:
        start.wait()
        for _ in range(50):
            with FileMapping.open(file) as mapping:
                mapping.view(0, 1)
        keep.append(FileMapping.open(file))
        addresses.append(keep[-1].address)

    threads = [threading.Thread(target=work) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(addresses), len(set(addresses)), len(mapped(file))) == (100, 1, 1)
    for mapping in keep:
        mapping.close()
    assert mapped(file) == []


def test_mapping_touches_no_page(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.touch()
    os.truncate(path, 1 << 40)
    with FileMapping.open(path) as mapping:
        mapping.view(1 << 39, 1 << 38)
        smaps = Path("/proc/self/smaps").read_text().split(str(path))[1].splitlines()
        assert next(line for line in smaps if line.startswith("Rss:")).split()[1] == "0"


def test_unchanged_file_passes_the_check(file: Path) -> None:
    with FileMapping.open(file) as mapping:
        mapping.check()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: os.truncate(path, 100), r"nbytes was 10244, is 100"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), r"nbytes was 10244, is 10248"),
        (lambda path: path.write_bytes(path.read_bytes()[::-1]), r"mtime_ns was \d+, is \d+"),
        (lambda path: os.utime(path, ns=(5, 5)), r"mtime_ns was \d+, is 5"),
    ],
    ids=["shorter", "longer", "rewritten", "touched"],
)
def test_changed_file_fails_the_check(file: Path, change: object, says: str) -> None:
    os.utime(file, ns=(1, 1))  # a clock of some milliseconds may not tell two writes apart
    with FileMapping.open(file) as mapping:
        change(file)  # type: ignore[operator]
        with pytest.raises(MappingError, match=says):
            mapping.check()


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.rename(path.with_name("other"))])
def test_a_file_without_its_name_is_still_there_for_who_has_it_open(file: Path, change: object) -> None:
    whole = file.read_bytes()
    with FileMapping.open(file) as mapping:
        change(file)  # type: ignore[operator]
        mapping.check()
        assert mapping.view(0, mapping.nbytes).tobytes() == whole
        with pytest.raises(FileNotFoundError):
            FileMapping.open(file)


def test_replaced_file_stays_mapped_and_opens_as_another_mapping(file: Path) -> None:
    with FileMapping.open(file) as old:
        other = file.with_name("new")
        other.write_bytes(b"new" + file.read_bytes()[3:])
        other.replace(file)
        old.check()
        with FileMapping.open(file) as new:
            assert new.address != old.address
            assert new.view(0, 3).tobytes() == b"new"
            assert old.view(0, 3).tobytes() == b"\0\1\2"


def test_each_handle_of_a_file_with_two_names_has_its_own(file: Path) -> None:
    link = file.with_name("link.gguf")
    link.symlink_to(file)
    with FileMapping.open(file) as first, FileMapping.open(link) as second:
        assert (first.path, second.path, first.address) == (file, link, second.address)
        os.truncate(file, 100)
        with pytest.raises(MappingError, match=r"link\.gguf: changed since"):
            second.check()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_handle_is_another_handle(file: Path, copied: Callable[[FileMapping], FileMapping]) -> None:
    mapping = FileMapping.open(file)
    other = copied(mapping)
    assert other.address == mapping.address
    mapping.close()
    assert other.view(1, 1)[0] == 1
    other.close()
    assert not mapped(file)


def test_a_handle_is_not_pickled(file: Path) -> None:
    with (
        FileMapping.open(file) as mapping,
        pytest.raises(CopyError, match=r"weights\.gguf.*cannot be copied or pickled"),
    ):
        pickle.dumps(mapping)


def test_offsets_may_be_whole_numbers_of_any_kind(file: Path) -> None:
    with FileMapping.open(file) as mapping:
        for kind in (np.uint8, np.int16, np.uint32, np.int64, np.uint64, np.array):
            assert mapping.view(kind(10), kind(100)).tobytes() == file.read_bytes()[10:110]
        with pytest.raises(TypeError):
            mapping.view(10.0, 100)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", ["absent", "directory", "fifo", "empty"])
def test_what_cannot_be_mapped_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "it.gguf"
    {"absent": lambda: None, "directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "empty": path.touch}[make]()
    says = {"absent": "No such file", "directory": "a directory", "fifo": "not a regular file", "empty": "is empty"}
    with pytest.raises(MappingError, match=rf"it\.gguf: .*{says[make]}"):
        FileMapping.open(path)


def test_no_descriptor_is_left_behind(file: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        FileMapping.open(file).close()
        with pytest.raises(MappingError):
            FileMapping.open(file.parent)
    assert len(os.listdir("/proc/self/fd")) == before


CUT_OFF = """
import os
from qmm.errors import MappingError
from qmm.loaders import FileMapping

mapping = FileMapping.open(sys.argv[1])
view = mapping.view(0, mapping.nbytes)
os.truncate(sys.argv[1], 4096)
print(view[0], view[4095], flush=True)
try:
    mapping.check()
except MappingError as error:
    print("refused", flush=True)
print(view[int(sys.argv[2])], flush=True)
"""


def test_reading_what_was_cut_off_a_file_ends_the_process_and_the_check_comes_before(file: Path) -> None:
    whole = file.read_bytes()
    done = run_python(CUT_OFF, file, 4096)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "0 255\nrefused\n")
    file.write_bytes(whole)
    done = run_python(CUT_OFF, file, 4000)
    assert (done.returncode, done.stdout) == (0, f"0 255\nrefused\n{whole[4000]}\n")


def test_a_forked_child_opens_files_whatever_other_threads_were_doing(file: Path) -> None:
    """A thread that is not in the child held the lock when it was forked."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with mapping_module._lock.now:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking a process with threads
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(FileMapping.open(file).view(1, 1)[0])
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_bytes_are_read_until_all_are_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give fewer at a time than were asked for."""
    usual = os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, buffers, offset: usual(number, [buffers[0][:7]], offset))
    found = bytearray(50)
    with FileMapping.open(file) as mapping:
        mapping.read(3, memoryview(found))
    assert found == file.read_bytes()[3:53]


def test_bytes_that_cannot_be_read_are_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", refuse)
    with FileMapping.open(file) as mapping, pytest.raises(MappingError, match=r"byte 3 cannot be read: Input/output"):
        mapping.read(3, memoryview(bytearray(5)))
