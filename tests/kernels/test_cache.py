"""Compiled kernels on disk: what is found again, what is not believed, and what a hit spares."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import re
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_driver import Driver
from ptx_compile import GROUPS, Spec, without_gpu

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.formats.q4_0 import load, position, unpack
from qmm.kernels.runtime import cache, launch
from qmm.kernels.runtime.cache import CachedKernel, Code, Store, digest_of_sources, key_of, store

ROOT = Path(__file__).resolve().parents[2]
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


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# What is found again --------------------------------------------------------------------------------------------------


def test_what_was_put_is_found(filled: Store) -> None:
    assert Store(filled.folder).get(KEY) == CODE
    assert Store(filled.folder).get(KEY + " ") is None


def test_only_this_user_may_look_into_the_folder_or_write_a_file(filled: Store) -> None:
    assert stat.S_IMODE(filled.folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(filled.folder)] == [0o600]


def test_a_second_put_replaces_the_first(filled: Store) -> None:
    filled.put(KEY, Code("other", b"code"))
    assert filled.get(KEY) == Code("other", b"code")
    assert len(files(filled.folder)) == 1


def test_a_hit_takes_less_than_a_millisecond(filled: Store) -> None:
    kernel = next(iter(GROUPS["Q4_K"])).kernel()
    key = key_of(kernel.name, kernel.key, (9, 0))
    filled.put(key, Code("entry", os.urandom(100_000)))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        assert filled.get(key_of(kernel.name, kernel.key, (9, 0)))
        times.append(time.perf_counter() - started)
    assert min(times) < 1e-3


# What is not believed -------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def truncated_to_nothing_much(path: Path) -> None:
    os.truncate(path, 20)


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
    truncated_to_nothing_much,
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


def test_sealing_alone_leaves_an_entry_right(filled: Store) -> None:
    path = filled.path(KEY)
    path.write_bytes(sealed(path.read_bytes()))
    assert filled.get(KEY) == CODE


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


def test_an_entry_under_another_ones_name_is_a_miss(filled: Store) -> None:
    filled.path(KEY).rename(filled.path("another key"))
    assert filled.get("another key") is None


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


# Folders that cannot be used ------------------------------------------------------------------------------------------

UNPRIVILEGED = """
import os, sys, warnings
from pathlib import Path
from qmm.kernels.runtime.cache import Code, Store
if os.geteuid() == 0:  # whom no permission stops
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
warnings.simplefilter("error")
store = Store(Path(sys.argv[1]))
store.put("key", Code("entry", b"code"))
print(store.get("key"), os.listdir(sys.argv[1]))
"""


def test_a_folder_that_may_not_be_written_is_left_alone() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, into which only this user may look
        os.chmod(folder, 0o555)
        assert output(python(UNPRIVILEGED, folder)) == "None []\n"
        os.chmod(folder, 0o755)


FULL = """
import resource, sys, warnings
from pathlib import Path
from qmm.kernels.runtime.cache import Code, Store
warnings.simplefilter("error")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
store = Store(Path(sys.argv[1]))
store.put("key", Code("entry", bytes(100_000)))
print(store.get("key"), len(list(store.folder.iterdir())))
store.put("key", Code("entry", b"code"))
print(store.get("key"), len(list(store.folder.iterdir())))
"""


def test_a_disk_that_is_full_is_left_without_half_a_file(folder: Path) -> None:
    first, second = output(python(FULL, str(folder))).splitlines()
    assert first == "None 0"
    assert second == "Code(entry='entry', code=b'code') 1"


def test_one_warning_names_a_folder_that_the_user_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file" / "kernels"
    blocked.parent.write_bytes(b"")
    monkeypatch.setenv("QMM_CACHE_DIR", str(blocked))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            named = store()
            assert named is not None
            named.put(KEY, CODE)
            assert named.get(KEY) is None
    (warning,) = caught
    assert re.search(f"QMM_CACHE_DIR={blocked}: .*compiled in every process", str(warning.message))


def test_no_warning_about_a_folder_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.delenv("QMM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unnamed = store()
        assert unnamed is not None
        unnamed.put(KEY, CODE)
        assert unnamed.get(KEY) is None


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place() -> Path | None:
        found = store()
        return found.folder if found else None

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QMM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert place() == tmp_path / ".cache" / "qmm" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert place() == tmp_path / ".cache" / "qmm" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert place() == tmp_path / "xdg" / "qmm" / "kernels"
    monkeypatch.setenv("QMM_CACHE_DIR", str(tmp_path / "named"))
    assert place() == tmp_path / "named"
    monkeypatch.setenv("QMM_CACHE_DIR", "")
    assert place() is None
    monkeypatch.delenv("QMM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert place() is None


# Many processes -------------------------------------------------------------------------------------------------------

WRITER = """
import sys, warnings
from pathlib import Path
from qmm.kernels.runtime.cache import Code, Store
warnings.simplefilter("error")  # of a put that fails
store, number = Store(Path(sys.argv[1]), named=True), int(sys.argv[2])
for repeat in range(100):
    store.put("key", Code(f"entry{number}", bytes([number]) * (50_000 * number)))
    found = store.get("key")
    assert found is not None, "it was there and is gone"
    writer = int(found.entry[len("entry"):])
    assert found.code == bytes([writer]) * (50_000 * writer), "parts of two"
"""


def test_processes_that_write_the_same_entry_at_once(folder: Path) -> None:
    for process in [python(WRITER, str(folder), str(number)) for number in (1, 2, 3, 4)]:
        output(process)
    assert [path.suffix for path in files(folder)] == [".kernel"]


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


# Keys -----------------------------------------------------------------------------------------------------------------

CONSTANTS: dict[str, Any] = {"ROWS": 2, "SCALE": 0.5, "PLAIN": False, "load": load, "wait": ("wait", 2)}


@pytest.mark.parametrize(
    "changed",
    [
        {"ROWS": 3},
        {"ROWS": 2.0},
        {"ROWS": "2"},
        {"SCALE": 0.25},
        {"PLAIN": True},
        {"PLAIN": 0},
        {"load": unpack},
        {"load": FORMATS["Q4_1"].load},
        {"load": "qmm.kernels.formats.q4_0:load"},
        {"wait": ("wait", 1)},
        {"wait": "wait"},
        {"new": 1},
        {"ROWS": np.int64(2)},
        {"ROWS": np.arange(2)},
    ],
    ids=str,
)
def test_every_constant_is_in_the_key(changed: dict[str, Any]) -> None:
    key = key_of("kernel", CONSTANTS, (9, 0))
    assert key is not None
    assert key_of("kernel", dict(reversed(CONSTANTS.items())), (9, 0)) == key
    assert key_of("kernel", {**CONSTANTS, **changed}, (9, 0)) not in (key, None)


def test_the_values_of_an_array_are_in_the_key() -> None:
    keys = {key_of("kernel", {"table": table}, (9, 0)) for table in (
        np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([[1, 2, 3]]), np.array([1, 2, 3], np.int32),
        np.array([1, 2, 3], np.uint32),
    )}  # fmt: skip
    assert len(keys) == 5


def test_name_and_compute_capability_are_in_the_key() -> None:
    keys = {key_of(name, CONSTANTS, cc) for name in ("a", "b") for cc in ((9, 0), (9, 1), (12, 0), (1, 20))}
    assert len(keys) == 8


@pytest.mark.parametrize("distribution", ["qmm", "numba", "llvmlite", "numba-cuda", "cuda-bindings", "nvidia-nvvm",
                                          "nvidia-nvjitlink", "nvidia-nvvm-cu12"])  # fmt: skip
def test_versions_are_in_the_key(distribution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    key = key_of("kernel", CONSTANTS, (9, 0))
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "another" if name == distribution else version(name)
    )
    cache._versions.cache_clear()
    assert key_of("kernel", CONSTANTS, (9, 0)) != key
    monkeypatch.undo()
    cache._versions.cache_clear()
    assert key_of("kernel", CONSTANTS, (9, 0)) == key


def test_pythons_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of("kernel", CONSTANTS, (9, 0))
    monkeypatch.setattr(sys, "version", "another")
    cache._versions.cache_clear()
    assert key_of("kernel", CONSTANTS, (9, 0)) != key
    monkeypatch.undo()
    cache._versions.cache_clear()


@pytest.mark.parametrize("setting", ["CUDA_HOME", "NUMBA_CUDA_DEBUGINFO", "NUMBA_OPT"])
def test_settings_of_the_compilers_are_in_the_key(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of("kernel", CONSTANTS, (9, 0))
    monkeypatch.setenv(setting, "another")
    assert key_of("kernel", CONSTANTS, (9, 0)) != key


def test_the_source_of_the_package_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of("kernel", CONSTANTS, (9, 0))
    assert digest_of_sources(ROOT / "kernels") in str(key)
    monkeypatch.setattr(cache, "SOURCES", "another")
    assert key_of("kernel", CONSTANTS, (9, 0)) not in (key, None)
    monkeypatch.setattr(cache, "SOURCES", "")  # unreadable
    assert key_of("kernel", CONSTANTS, (9, 0)) is None


def test_names_and_texts_of_all_sources_make_the_digest(tmp_path: Path) -> None:
    (tmp_path / "formats").mkdir()
    digests = [digest_of_sources(tmp_path)]
    assert digests == [""]
    for path, text in [
        ("a.py", "1"),
        ("a.py", "2"),
        ("formats/b.py", "1"),
        ("formats/b.py", "2"),
        ("formats/c.py", ""),
    ]:
        (tmp_path / path).write_text(text)
        digests.append(digest_of_sources(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "d.py")
    digests.append(digest_of_sources(tmp_path))
    assert len(set(digests)) == len(digests)
    (tmp_path / "notes.txt").write_text("not a source")
    assert digest_of_sources(tmp_path) == digests[-1]
    (tmp_path / "e.py").symlink_to("nowhere")
    assert digest_of_sources(tmp_path) == ""


OWN_FORMAT = """
import math
import numpy as np
from qmm.kernels.lang.fields import load2
from qmm.kernels.lang.primitives import half
FIRST = {first}
TABLE = np.array([{entry}, 2], np.int8)
def helper(bits):
    return half(bits) * {factor} + math.floor(FIRST)
def load(block, lane):
    return load2(block, TABLE[0]), helper(lane)
def closed(value):
    def load(block, lane):
        return load2(block, value)
    return load
"""


@pytest.fixture
def module_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Imports OWN_FORMAT with other values each time, always under the same name."""

    def imported(**values: object) -> ModuleType:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        path.write_text(OWN_FORMAT.format(**{"first": 1, "entry": 1, "factor": 1, **values}))
        spec = importlib.util.spec_from_file_location("own_format", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own_format", module)
        spec.loader.exec_module(module)
        return module

    return imported


def test_functions_of_the_user_are_in_the_key_with_all_that_they_use(module_of: Callable[..., ModuleType]) -> None:
    def key(**values: object) -> str | None:
        return key_of("kernel", {"load": module_of(**values).load}, (9, 0))

    keys = {key(), key(first=2), key(entry=3), key(factor=4)}
    assert len(keys) == 4
    assert None not in keys
    assert key() in keys


def test_closures_are_told_apart_by_what_they_hold(module_of: Callable[..., ModuleType]) -> None:
    module = module_of()
    keys = {key_of("kernel", {"load": module.closed(value)}, (9, 0)) for value in (1, 2, 1)}
    assert len(keys) == 2
    assert None not in keys


def test_a_function_put_in_place_of_one_of_the_package_is_described_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    from qmm.kernels.formats import q4_0

    key = key_of("kernel", {"load": load}, (9, 0))
    monkeypatch.setattr(q4_0, "load", position)
    assert key_of("kernel", {"load": load}, (9, 0)) not in (key, None)


@pytest.mark.parametrize("value", [object(), np.array([object()]), eval("lambda block, lane: 0"), FORMATS["F32"]])
def test_what_cannot_be_described_is_not_cached(value: object, folder: Path) -> None:
    cached = CachedKernel("kernel", {"load": value}, (9, 0))
    cached.put(CODE)
    assert cached.get() is None
    assert not folder.exists()


def test_sources_edited_while_the_process_runs_keep_their_code_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel.py").write_text("before")
    monkeypatch.setattr(cache, "FOLDER", tmp_path)
    monkeypatch.setattr(cache, "SOURCES", digest_of_sources(tmp_path))
    cached = CachedKernel("kernel", CONSTANTS, (9, 0))
    cached.put(CODE)
    assert cached.get() == CODE
    (tmp_path / "kernel.py").write_text("after")
    fresh = CachedKernel("another", CONSTANTS, (9, 0))
    fresh.put(CODE)
    assert fresh.get() is None
    assert cached.get() == CODE


def test_a_function_of_the_user_changed_during_compilation_keeps_its_code_out(
    folder: Path, module_of: Callable[..., ModuleType]
) -> None:
    module = module_of()
    cached = CachedKernel("kernel", {"load": module.load}, (9, 0))
    module.FIRST = 7
    cached.put(CODE)
    assert cached.get() is None
    module.FIRST = 1
    cached.put(CODE)
    assert cached.get() == CODE


# Kernels --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    made.arguments = 3  # of the kernel that is launched here
    monkeypatch.setattr(launch, "driver", made)
    return made


@pytest.fixture
def no_gpu() -> Iterator[None]:
    with without_gpu():
        yield


def fresh_kernel() -> launch.CUDAKernel:
    launch.read_kernel.cache_clear()
    return launch.read_kernel()


@pytest.mark.usefixtures("no_gpu")
def test_a_kernel_is_compiled_once_and_found_by_the_next_process(fake: Driver, folder: Path) -> None:
    fresh_kernel().launch(0, 1, 0, 1, 2, 3)
    (entry,) = files(folder)
    again = fresh_kernel()
    again.launch(0, 1, 0, 1, 2, 3)
    assert "function" not in vars(again)  # it was not even built
    assert len(fake.launches) == 2

    # Damaged: compiled again, and the file is right again (code differs from one compilation to the next, by a name).
    entry.write_bytes(entry.read_bytes()[:-1])
    again = fresh_kernel()
    again.launch(0, 1, 0, 1, 2, 3)
    assert "function" in vars(again)
    again = fresh_kernel()
    again.launch(0, 1, 0, 1, 2, 3)
    assert "function" not in vars(again)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("code", [Code("read", b"no ELF"), Code("unknown", b"\x7fELF of another kernel")], ids=str)
def test_code_that_the_driver_refuses_is_replaced(fake: Driver, folder: Path, code: Code) -> None:
    kernel = fresh_kernel()
    cached = CachedKernel(kernel.name, kernel.key, (9, 0))
    cached.put(code)
    kernel.launch(0, 1, 0, 1, 2, 3)
    assert "function" in vars(kernel)
    found = cached.get()
    assert found is not None
    assert found.code.startswith(b"\x7fELF")
    assert found.entry.encode() in found.code


@pytest.mark.usefixtures("no_gpu")
def test_code_that_the_driver_refuses_is_not_kept(fake: Driver, folder: Path) -> None:
    fake.accepts = lambda code: False
    with pytest.raises(RuntimeError, match="loading read: the driver returned CUDA_ERROR_INVALID_IMAGE"):
        fresh_kernel().launch(0, 1, 0, 1, 2, 3)
    assert not folder.exists()


@pytest.mark.usefixtures("no_gpu")
def test_kernels_work_without_a_cache(fake: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QMM_CACHE_DIR", "")
    fresh_kernel().launch(0, 1, 0, 1, 2, 3)
    assert len(fake.launches) == 1
    assert files(tmp_path) == []


LAUNCHES = """
import pickle, sys
import qmm, qmm.engine, qmm.device
from qmm.kernels.runtime import launch
from qmm.kernels.formats import FORMATS
driver = launch.driver
class Driver:
    def __getattr__(self, name):
        real = getattr(driver, name)
        found = (0,) if name == "cuLaunchKernelEx" else (0, 9)
        return (lambda *arguments: found) if name.startswith("cu") else real
launch.driver = Driver()
for maker, arguments in pickle.loads(bytes.fromhex(sys.argv[1])):
    kernel = getattr(launch, maker)(*[FORMATS.get(value, value) if isinstance(value, str) else value
                                      for value in arguments])
    kernel.launch(0, 1, 0, *range(kernel.arguments))
print(sorted({name.split(".")[0] for name in sys.modules} & {"numba", "llvmlite", "gguf"}))
"""


def test_from_a_filled_cache_kernels_are_launched_without_numba(folder: Path) -> None:
    specs = [Spec("read_kernel", ()), *(spec for group in ("Q4_K", "F32", "activations") for spec in GROUPS[group])]
    for spec in specs:
        kernel = spec.kernel()
        CachedKernel(kernel.name, kernel.key, (9, 9)).put(CODE)
    assert len(files(folder)) == len(specs)
    assert output(python(LAUNCHES, pickle.dumps([tuple(spec) for spec in specs]).hex())) == "[]\n"
    assert len(files(folder)) == len(specs)  # none was looked for under another key, compiled and put


def test_every_kernel_can_be_described_and_told_from_every_other() -> None:
    kernels = {spec.kernel() for specs in GROUPS.values() for spec in specs}
    keys = {key_of(kernel.name, kernel.key, (9, 0)) for kernel in kernels}
    assert None not in keys
    assert len(keys) > len(FORMATS)
    described = {str(sorted(kernel.key["constants"].items(), key=str)) + kernel.key["template"] for kernel in kernels}
    assert len(keys) == len(described)


def test_a_format_of_the_users_own_can_be_described(module_of: Callable[..., ModuleType]) -> None:
    own = Format(**{**vars(FORMATS["Q4_0"]), "load": module_of().load})
    keys = [key_of("kernel", block_format.constants(), (9, 0)) for block_format in (own, FORMATS["Q4_0"])]
    assert keys[0] not in (keys[1], None)
