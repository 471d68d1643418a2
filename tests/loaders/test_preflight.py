"""Registering in a child process first: which file system a file is on, and how a child ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmm.errors import RegistrationError
from qmm.loaders.access import preflight as module
from qmm.loaders.access.preflight import FileSystem, probe
from qmm.loaders.mapping import FileMapping

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:27 / /mnt rw,relatime - overlay first rw
31 22 0:27 / /mnt/my\040models rw,relatime shared:3 master:1 - nfs4 server:/models rw,vers=4.2
32 30 0:28 / /mnt rw,relatime - fuse.s3 second rw
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(bytes(10_000))
    return path


@pytest.fixture
def mapping(file: Path) -> Iterator[FileMapping]:
    with FileMapping.open(file) as made:
        yield made


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/model.gguf", ("ext4", "/dev/vda", "/")),
        ("/mntother/model.gguf", ("ext4", "/dev/vda", "/")),
        ("/mnt/my models/a.gguf", ("nfs4", "server:/models", "/mnt/my models")),
        ("/mnt/a.gguf", ("fuse.s3", "second", "/mnt")),
    ],
)
def test_the_innermost_and_last_mount_counts(
    path: str, expected: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(module, "MOUNTS", mounts)
    assert FileSystem.of(path) == expected
    mounts.unlink()
    assert FileSystem.of(path) == ("unknown",) * 3


def test_the_files_own_file_system_is_the_one_that_stat_means(file: Path) -> None:
    found = FileSystem.of(file)
    assert os.stat(found.mount_point).st_dev == os.stat(file).st_dev


def with_child(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Has the child run something else. No file here makes a registration hang or die."""
    monkeypatch.setattr(module, "_child_source", lambda file, device: source)


def test_a_child_that_does_not_return_is_an_error_in_time(
    mapping: FileMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_child(monkeypatch, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    started = time.monotonic()
    with pytest.raises(RegistrationError) as caught:
        probe(mapping, 3, seconds=0.5)
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert message.startswith(f"{mapping.path}: ")
    for part in ("CUDA device 3", "0.5 s", FileSystem.of(mapping.path).type, 'placement="device"', 'placement="host"'):
        assert part in message


def test_no_child_is_left_behind(mapping: FileMapping, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[subprocess.Popen[str]] = []
    usual = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        made.append(usual(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(module.subprocess, "Popen", noted)
    with_child(monkeypatch, "import time; time.sleep(600)")
    with pytest.raises(RegistrationError):
        probe(mapping, seconds=0.2)
    assert [child.returncode for child in made] == [-signal.SIGKILL]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import os; os.abort()", "was killed by SIGABRT"),
        ("raise SystemExit('no such thing')", "ended with status 1: no such thing"),
    ],
)
def test_a_child_that_dies_is_an_error_with_its_end(
    mapping: FileMapping, source: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_child(monkeypatch, source)
    with pytest.raises(RegistrationError, match=says):
        probe(mapping)


def test_a_refusal_is_left_to_the_process_itself(mapping: FileMapping) -> None:
    """On a machine with a GPU there is no such device; on others there is none at all."""
    assert probe(mapping, 4096) is False


SAYS_WHAT_IT_MAPS = """
from qmm.loaders.access import preflight as probe

class Registration:
    @classmethod
    def of(cls, mapping, ranges, device):
        raise SystemExit(f"{mapping.nbytes} bytes, {bytes(mapping.view(0, 4))}")

probe.HostRegistration = Registration
"""


@pytest.mark.parametrize("gone", [False, True])
def test_the_child_maps_the_very_file_whatever_has_its_name(
    mapping: FileMapping, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gone:
        mapping.path.unlink()
    else:
        other = mapping.path.with_suffix(".new")
        other.write_bytes(b"other")
        other.replace(mapping.path)
    usual = module._child_source
    monkeypatch.setattr(module, "_child_source", lambda file, device: SAYS_WHAT_IT_MAPS + usual(file, device))
    with pytest.raises(RegistrationError, match=r"10000 bytes, b'\\x00\\x00\\x00\\x00'"):
        probe(mapping)


def test_a_child_that_cannot_start_is_an_error_that_says_so(
    mapping: FileMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on processes would have the tests become another user for good; a program that is not there will do."""
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(
        RegistrationError, match=rf"^{mapping.path}: .*could not be started .*No such file.*placement="
    ) as caught:
        probe(mapping)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_first_contact_that_worked_is_remembered(
    mapping: FileMapping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    outcomes = [False, True, True, True]  # refused, which this process asks about itself, and then worked

    def tries(mapping: FileMapping, device: int) -> bool:
        tried.append(device)
        return outcomes.pop(0)

    monkeypatch.setattr(module, "probe", tries)
    monkeypatch.setattr(module, "call", lambda function: 13000)
    monkeypatch.setattr(module, "_known", set())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QMM_CACHE_DIR", "~/cache")
    for _ in range(4):
        module.first_contact(mapping, 1, "a GPU")
    assert tried == [1, 1]
    assert any((tmp_path / "cache" / "registering").iterdir())
    module._known.clear()  # as in another process
    module.first_contact(mapping, 2, "a GPU")
    assert tried == [1, 1]
    module.first_contact(mapping, 2, "another GPU")
    assert tried == [1, 1, 2]
    monkeypatch.setenv("QMM_CACHE_DIR", "")  # nothing is kept on disk
    module._known.clear()
    module.first_contact(mapping, 3, "a GPU")
    module.first_contact(mapping, 3, "a GPU")
    assert tried == [1, 1, 2, 3]
