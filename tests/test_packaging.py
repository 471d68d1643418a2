"""What the wheel ships: built from a copy of the tree, listed, and imported from another directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"qmm": "qmm", "kernels": "qmm/kernels", "loaders": "qmm/loaders"}  # folder -> where the wheel has it


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy, for setuptools writes into the tree, and an old build/ there would be shipped. The `test` extra has
    # setuptools, so that no build environment need be installed.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in [*ROOMS, "tests", "benchmarks"]:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def shipped(wheel: Path) -> list[str]:
    return sorted(n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n)


def in_the_tree() -> list[str]:
    """Name every Python file of the three rooms as the wheel should have it."""
    found = []
    for folder, place in ROOMS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT / folder)
            if folder != "qmm" or inner.parts[0] not in ROOMS:  # qmm/kernels and qmm/loaders are links
                found.append(f"{place}/{inner.as_posix()}")
    return sorted(found)


def test_wheel_ships_every_python_file_once(shipped: list[str]) -> None:
    assert [name for name in shipped if name.endswith(".py")] == in_the_tree()


def test_wheel_has_one_top_level_package(shipped: list[str]) -> None:
    assert {name.split("/")[0] for name in shipped} == {"qmm"}  # no kernels, loaders, tests, benchmarks
    assert {"qmm/__init__.py", "qmm/kernels/__init__.py", "qmm/loaders/__init__.py"} <= set(shipped)
    assert any(name.startswith("qmm/kernels/formats/") for name in shipped)


def test_wheel_imports_from_elsewhere_and_leaks_no_rooms(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); import qmm, qmm.kernels, qmm.loaders; from importlib import util;"
        "assert 'site' in qmm.__file__ and 'site' in qmm.kernels.__file__ and 'site' in qmm.loaders.__file__;"
        "leaked = [util.find_spec(name) for name in ('kernels', 'loaders')];"
        f"assert not any(s and {str(ROOT)!r} in str(s.origin) for s in leaked), leaked"
    )
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may name the tree
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_to_the_rooms() -> None:
    for room in ("kernels", "loaders"):
        assert (ROOT / "qmm" / room).resolve() == ROOT / room, f"qmm/{room} must be a link to ../{room}"


def test_version_is_the_changelogs() -> None:
    import qmm

    assert f"## [{qmm.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_pre_commit_and_ci_run_the_same_checks() -> None:
    ci, hooks = ((ROOT / name).read_text(encoding="utf-8") for name in (".ci/run", ".pre-commit-config.yaml"))
    for check in ("ruff check", "ruff format --check", "mypy"):
        assert check in ci
        assert f"entry: {check}" in hooks


def test_numpy_is_held_while_numba_cuda_needs_row_stack() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(d.startswith("numpy") and "<2.5" in d for d in project["dependencies"])
