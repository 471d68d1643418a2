"""Paths and what they lead to: what cannot be opened, and names of any bytes."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import F32_ROW, write_gguf

import qmm
from qmm.errors import GGUFError
from qmm.loaders import FileMapping, GGUFIndex


@pytest.mark.parametrize("make", ["absent", "directory", "fifo", "empty"])
def test_what_is_no_file_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "it.gguf"
    {"absent": lambda: None, "directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "empty": path.touch}[make]()
    with pytest.raises(GGUFError, match=r"it\.gguf"):
        GGUFIndex.read(path)


def test_what_cannot_be_opened_is_an_error_of_the_operating_system_too(tmp_path: Path) -> None:
    path = tmp_path / "it.gguf"
    for kind in (qmm.FileMissingError, FileNotFoundError, GGUFError):
        with pytest.raises(kind, match=r"it\.gguf: cannot be opened: No such file") as caught:
            qmm.open(path)
    assert isinstance(caught.value, OSError)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(path))
    below = tmp_path / "file" / "it.gguf"
    below.parent.touch()
    with pytest.raises(qmm.FileAccessError, match=r"it\.gguf: cannot be opened: Not a directory") as caught:
        qmm.open(below)
    assert not isinstance(caught.value, FileNotFoundError)
    assert caught.value.errno == errno.ENOTDIR
    with pytest.raises(FileNotFoundError), FileMapping.open(path):
        pass
    again = pickle.loads(pickle.dumps(caught.value))  # as from a worker
    assert (str(again), again.errno, again.filename) == (str(caught.value), errno.ENOTDIR, caught.value.filename)


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_a_path_may_be_text_bytes_or_a_path(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"w": F32_ROW})
    with qmm.open(kind(path)) as model:
        assert model.path == path


def test_a_name_of_a_file_may_be_no_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/m\xe9.gguf"
    write_gguf(os.fsdecode(path), {"w": F32_ROW})
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        assert engine.matmul("w", np.zeros(8, np.float32)).tolist() == [0]


def test_a_path_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(GGUFError, match="embedded null byte"):
        GGUFIndex.read("a\0b.gguf")
