"""What tests of several commands are given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A simulated CUDA (:mod:`simulated_cuda`)."""
    from simulated_cuda import installed

    with installed(monkeypatch) as made:
        yield made


@pytest.fixture
def simulated(cuda: Any) -> Iterator[Any]:
    """A device on it (:mod:`simulated_work`)."""
    from simulated_work import opened

    with opened(cuda) as made:
        yield made
