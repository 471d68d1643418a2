"""What to install is named so that no command can fetch the stranger's project that PyPI has under qmm's name."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from qmm import extras

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
# `pip install`, options, other packages, and then qmm by name: alone, with extras or with a version, quoted or not.
BY_NAME = re.compile(r"""pip3?\s+install\b[^\n;&|)]*?[\s'"`]qmm(?=\[|[\s'"`<>=!~,;)]|$)""")


def specifiers(requirement: str) -> tuple[str, ...]:
    name, _, versions = re.sub(r"([<>=!~])", r" \1", requirement, count=1).partition(" ")
    return (name, *sorted(versions.split(",")))


@pytest.fixture
def without_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extras, "PROJECT", tmp_path / "pyproject.toml")


def test_a_command_has_what_the_extra_brings() -> None:
    assert extras.command("cu13") == f"pip install '{EXTRAS['cu13'][0]}' '{EXTRAS['cu13'][1]}'"
    assert extras.command("cu13") in extras.for_gpu()
    assert extras.command("cu12") in extras.for_gpu()


def packages(command: str) -> list[str]:
    return re.findall("'([^']+)'", command)


def test_extras_within_extras_are_resolved_and_nothing_is_named_twice() -> None:
    found = packages(extras.command("dev"))
    assert {*EXTRAS["cu13"], *EXTRAS["demo"]} <= set(found)
    assert {name for name in EXTRAS["test"] if not name.startswith("qmm[")} <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.usefixtures("without_source")
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_installed_package_says_the_same_as_its_source(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = packages(extras.command(extra))
    monkeypatch.setattr(extras, "PROJECT", ROOT / "pyproject.toml")
    assert sorted(map(specifiers, installed)) == sorted(map(specifiers, packages(extras.command(extra))))


@pytest.mark.usefixtures("without_source")
def test_where_nobody_knows_the_requirements_the_clone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert extras.command("demo") == "in a clone of qmm's repository: pip install '.[demo]'"
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=1", 'other>=2; extra == "demo2"'])  # a stranger's
    assert extras.command("demo") == "in a clone of qmm's repository: pip install '.[demo]'"


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_command_asks_for_qmm_by_name(extra: str) -> None:
    assert not BY_NAME.search(extras.command(extra))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install qmm", True),
        ("pip install 'qmm[cu13]'", True),
        ('pip install -U numpy "qmm>=1"', True),
        ("`pip install qmm`", True),
        ("pip install -e '.[cu13]' && qmm demo", False),
        ("pip install /path/to/qmm", False),
        ("pip install qmm-tools", False),
    ],
)
def test_the_search_tells_right_from_wrong(text: str, found: bool) -> None:
    assert bool(BY_NAME.search(text)) is found


def test_no_file_of_the_repository_tells_anybody_to_install_qmm_by_name() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:  # an unpacked archive
        paths = [path for path in ROOT.rglob("*") if path.suffix in (".md", ".py", ".toml", ".yaml")]
        paths = [path for path in paths if ".venv" not in path.parts]
    else:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    found = []
    for path in paths:
        if path.is_file() and path != Path(__file__).resolve():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [f"{path.relative_to(ROOT)}: {line.strip()}" for line in lines if BY_NAME.search(line)]
    assert found == []
