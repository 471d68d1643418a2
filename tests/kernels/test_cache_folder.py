"""The folder of the cache: where it is, that many may write there, and what happens where nobody can."""

from __future__ import annotations

import functools
import os
import re
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from children import run_python

from qmm.kernels.runtime.cache import Code, store

KEY = '{"name": "kernel"}'
CODE = Code("entry", bytes(range(256)) * 40)


def said_by(code: str, *arguments: object) -> str:
    done = run_python(code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


UNPRIVILEGED = """
import os, warnings
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
        assert said_by(UNPRIVILEGED, folder) == "None []\n"
        os.chmod(folder, 0o755)


FULL = """
import resource, warnings
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


def test_a_disk_that_is_full_is_left_without_half_a_file(tmp_path: Path) -> None:
    first, second = said_by(FULL, tmp_path / "kernels").splitlines()
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
    monkeypatch.setenv("QMM_CACHE_DIR", "~/mine")  # quoted, so that no shell expanded it
    assert place() == tmp_path / "mine"
    monkeypatch.setenv("QMM_CACHE_DIR", "")
    assert place() is None
    monkeypatch.delenv("QMM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert place() is None


WRITER = """
import warnings
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


def test_processes_that_write_the_same_entry_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(functools.partial(said_by, WRITER, tmp_path), (1, 2, 3, 4)))
    assert [path.suffix for path in tmp_path.iterdir()] == [".kernel"]
