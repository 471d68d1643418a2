"""Keys of machine code: all that it depends on is in them, and what text cannot tell has none."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.formats.q4_0 import load, position, unpack
from qmm.kernels.runtime import keys
from qmm.kernels.runtime.cache import CachedKernel, Code
from qmm.kernels.runtime.keys import digest_of_sources, key_of

ROOT = Path(__file__).resolve().parents[2]
CODE = Code("entry", b"code")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache's folder, named by the environment and not there yet."""
    monkeypatch.setenv("QMM_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


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
    key = key_of("kernel", CONSTANTS, (9, 0))
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "another" if name == distribution else version(name)
    )
    keys._versions.cache_clear()
    assert key_of("kernel", CONSTANTS, (9, 0)) != key
    monkeypatch.undo()
    keys._versions.cache_clear()
    assert key_of("kernel", CONSTANTS, (9, 0)) == key


def test_pythons_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of("kernel", CONSTANTS, (9, 0))
    monkeypatch.setattr(sys, "version", "another")
    keys._versions.cache_clear()
    assert key_of("kernel", CONSTANTS, (9, 0)) != key
    monkeypatch.undo()
    keys._versions.cache_clear()


@pytest.mark.parametrize("setting", ["CUDA_HOME", "NUMBA_CUDA_DEBUGINFO", "NUMBA_OPT"])
def test_settings_of_the_compilers_are_in_the_key(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of("kernel", CONSTANTS, (9, 0))
    monkeypatch.setenv(setting, "another")
    assert key_of("kernel", CONSTANTS, (9, 0)) != key


def test_the_source_of_the_package_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of("kernel", CONSTANTS, (9, 0))
    assert digest_of_sources(ROOT / "kernels") in str(key)
    monkeypatch.setattr(keys, "SOURCES", "another")
    assert key_of("kernel", CONSTANTS, (9, 0)) not in (key, None)
    monkeypatch.setattr(keys, "SOURCES", "")  # unreadable
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
from qmm.kernels.lang import fields
from qmm.kernels.lang.fields import load2
from qmm.kernels.lang.primitives import half
FIRST = {first}
TABLE = np.array([{entry}, 2], np.int8)
def helper(bits):
    return half(bits) * {factor} + math.floor(FIRST)
def load(block, lane):
    return load2(block, TABLE[0]), helper(lane)
def scaled(block, lane, by=FIRST, *, further=TABLE[0]):
    return load2(block, 0), by * further
def with_one_inside(block, lane):
    def inside():
        return FIRST
    return inside()
def by_module(block, lane):
    return fields.load2(block, 0)
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


def test_defaults_are_in_the_key(module_of: Callable[..., ModuleType]) -> None:
    def key(**values: object) -> str | None:
        module = module_of(**values)
        module.FIRST = 5  # the default keeps the value that it had
        return key_of("kernel", {"load": module.scaled}, (9, 0))

    assert len({key(), key(first=2), key(entry=3), None}) == 4
    assert key() == key()


def test_what_a_function_inside_uses_is_in_the_key(module_of: Callable[..., ModuleType]) -> None:
    keys = {key_of("kernel", {"load": module_of(first=first).with_one_inside}, (9, 0)) for first in (1, 2, 1)}
    assert len(keys) == 2
    assert None not in keys


def test_a_module_of_the_package_is_named_in_the_key(module_of: Callable[..., ModuleType]) -> None:
    assert '"module": "qmm.kernels.lang.fields"' in str(key_of("kernel", {"load": module_of().by_module}, (9, 0)))


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
    monkeypatch.setattr(keys, "FOLDER", tmp_path)
    monkeypatch.setattr(keys, "SOURCES", digest_of_sources(tmp_path))
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


def test_a_format_of_the_users_own_can_be_described(module_of: Callable[..., ModuleType]) -> None:
    own = Format(**{**vars(FORMATS["Q4_0"]), "load": module_of().load})
    keys = [key_of("kernel", block_format.constants().described(), (9, 0)) for block_format in (own, FORMATS["Q4_0"])]
    assert keys[0] not in (keys[1], None)
