"""What tests of several commands are given."""

from __future__ import annotations

from pathlib import Path

import made_up_gpu as gpu
import pytest
from command_line import write_three_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tensors of ``command_line.SHAPES``, and one that has no kernel."""
    path = tmp_path_factory.mktemp("cli") / "model.gguf"
    write_three_tensors(path)
    return path


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.install(monkeypatch)
