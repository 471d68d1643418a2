"""Machine code on disk: what is found again, what is not believed, and what is dropped."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qmm.kernels.runtime import cache
from qmm.kernels.runtime.cache import Code, Store

KEY = '{"name": "kernel"}'
CODE = Code("entry", bytes(range(256)) * 40)
DAY = 86400


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache's folder, named by the environment and not there yet."""
    path = tmp_path / "above" / "kernels"
    monkeypatch.setenv("QMM_CACHE_DIR", str(path))
    return path


@pytest.fixture
def filled(folder: Path) -> Store:
    kept = Store(folder)
    kept.put(KEY, CODE)
    assert kept.get(KEY) == CODE
    return kept


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


# What is found again --------------------------------------------------------------------------------------------------


def test_what_was_put_is_found(filled: Store) -> None:
    assert Store(filled.folder).get(KEY) == CODE
    assert Store(filled.folder).get(KEY + " ") is None


def test_only_this_user_may_look_into_the_folder_or_write_a_file(filled: Store) -> None:
    assert stat.S_IMODE(filled.folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(filled.folder)] == [0o600]


# What is not believed -------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def symbolic_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def named_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def writable_by_the_group(path: Path) -> None:
    path.chmod(0o620)


def writable_by_all(path: Path) -> None:
    path.chmod(0o602)


def sealed(data: bytes) -> bytes:
    """An entry with its digest made anew: only the other checks can find what is wrong with it."""
    body = data[: -cache.DIGEST_NBYTES]
    return body + hashlib.sha256(body).digest()


def another_key(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(b"kernel") == 1
    path.write_bytes(sealed(data.replace(b"kernel", b"colonel"[:6])))


def shorter_than_the_head(path: Path) -> None:
    path.write_bytes(sealed(path.read_bytes()[: cache.DIGEST_NBYTES + 5]))


def another_program(path: Path) -> None:
    path.write_bytes(sealed(b"NOTQMM!!" + path.read_bytes()[8:]))


def another_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(sealed(bytes(data)))


def wrong_code_length(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(sealed(bytes(data)))


def entry_that_is_no_text(path: Path) -> None:
    path.write_bytes(sealed(path.read_bytes().replace(b"entry", b"\xff\xfe\xff\xfe\xff")))


DAMAGES = [
    truncated,
    empty,
    lengthened,
    symbolic_link,
    named_pipe,
    writable_by_the_group,
    writable_by_all,
    another_key,
    shorter_than_the_head,
    another_program,
    another_version,
    wrong_code_length,
    entry_that_is_no_text,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_or_foreign_entry_is_a_miss_and_replaced(filled: Store, damage: Callable[[Path], None]) -> None:
    damage(filled.path(KEY))
    assert filled.get(KEY) is None
    filled.put(KEY, CODE)
    assert filled.get(KEY) == CODE
    assert filled.path(KEY).is_file()
    assert not filled.path(KEY).is_symlink()


def test_a_flipped_bit_anywhere_is_found(filled: Store) -> None:
    path = filled.path(KEY)
    right = path.read_bytes()
    head, tail = len(right) - len(CODE.code) - cache.DIGEST_NBYTES, len(right) - cache.DIGEST_NBYTES
    for place in (*range(head), *range(head, tail, 97), *range(tail, len(right))):
        wrong = bytearray(right)
        wrong[place] ^= 1 << place % 8
        path.write_bytes(wrong)
        assert filled.get(KEY) is None, place
    path.write_bytes(right)
    assert filled.get(KEY) == CODE


def test_a_file_of_another_user_is_a_miss(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: filled.path(KEY).stat().st_uid + 1)
    assert filled.get(KEY) is None


def test_a_pipe_is_a_miss_though_the_right_bytes_come_out_of_it(filled: Store) -> None:
    path = filled.path(KEY)
    data = path.read_bytes()
    path.unlink()
    os.mkfifo(path, 0o600)
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert os.write(descriptor, data) == len(data)
        assert filled.get(KEY) is None
    finally:
        os.close(descriptor)


def test_a_directory_in_an_entrys_place_is_left_there(filled: Store) -> None:
    filled.path(KEY).unlink()
    filled.path(KEY).mkdir()
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        filled.put(KEY, CODE)
        assert filled.get(KEY) is None
    assert files(filled.folder) == [filled.path(KEY)]  # and nothing half-written beside it
    assert len(os.listdir("/proc/self/fd")) == open_files


# What is dropped ------------------------------------------------------------------------------------------------------


def aged(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def test_a_put_drops_what_was_not_used_for_long(filled: Store) -> None:
    filled.put("recent", CODE)
    aged(filled.path("recent"), cache.MOST_DAYS - 1)
    aged(filled.path(KEY), cache.MOST_DAYS + 1)
    filled.put("new", CODE)
    assert set(files(filled.folder)) == {filled.path("recent"), filled.path("new")}


def test_a_hit_keeps_an_entry(filled: Store) -> None:
    aged(filled.path(KEY), cache.MOST_DAYS + 1)
    assert filled.get(KEY)
    filled.put("new", CODE)
    assert filled.get(KEY)


def test_a_put_drops_the_longest_unused_beyond_the_limit(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = filled.path(KEY).stat().st_size
    for days, key in enumerate("abcd"):
        filled.put(key, CODE)
        aged(filled.path(key), days + 1)
    monkeypatch.setattr(cache, "MOST_NBYTES", 4 * nbytes)  # their keys are shorter
    filled.put("new", CODE)
    left = {key for key in (KEY, *"abcd", "new") if filled.path(key).exists()}
    assert left == {"new", KEY, "a", "b"}


def test_a_put_never_drops_what_it_put(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_NBYTES", 1)
    aged(filled.path(KEY), -1)  # a clock that was wrong
    filled.put("new", CODE)
    assert files(filled.folder) == [filled.path("new")]


def test_only_files_of_the_cache_are_dropped(filled: Store) -> None:
    ours = [filled.path(KEY).with_suffix(f".{number:016x}.part") for number in range(2)]
    others = [filled.folder / name for name in ("thesis.kernel", "notes.txt", f"{'0' * 64}.txt", f"{'0' * 63}.kernel")]
    for path in [*ours, *others]:
        path.write_bytes(b"")
        aged(path, 1000)
    aged(ours[1], 0)  # whose writer may be at it
    inner = filled.folder / f"{'1' * 64}.kernel"
    inner.mkdir()
    aged(inner, 1000)
    filled.put(KEY, CODE)
    assert set(files(filled.folder)) == {filled.path(KEY), ours[1], inner, *others}
