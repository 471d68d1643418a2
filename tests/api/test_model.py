"""Models and tensors: names, shapes, bytes, and what happens at their ends."""

from __future__ import annotations

import weakref
from pathlib import Path

import gguf_files
import numpy as np
import pytest

import qmm
from qmm.errors import ClosedError, GGUFError, QmmError, TensorNotFoundError, UnsupportedTypeError

SHAPES = {"norm": ("F32", (64,)), "up": ("Q8_0", (3, 64)), "experts": ("Q4_K", (2, 5, 256))}
IQ1_S = 19  # 256 values in 50 bytes: a type without a kernel


@pytest.fixture
def blocks(rng: np.random.Generator) -> dict[str, bytes]:
    return {name: gguf_files.random_blocks(kind, shape, rng) for name, (kind, shape) in SHAPES.items()}


@pytest.fixture
def path(tmp_path: Path, blocks: dict[str, bytes]) -> Path:
    file = tmp_path / "model.gguf"
    tensors: dict[str, tuple[str | int, tuple[int, ...], bytes]] = {
        name: (kind, shape, blocks[name]) for name, (kind, shape) in SHAPES.items()
    }
    tensors["exotic"] = (IQ1_S, (2, 256), bytes(100))
    gguf_files.write_gguf(file, tensors, metadata={"general.name": "small"})
    return file


def test_model_is_a_mapping_in_file_order(path: Path) -> None:
    with qmm.open(path) as model:
        assert list(model) == ["norm", "up", "experts", "exotic"]
        assert len(model) == 4
        assert "up" in model
        assert "down" not in model
        assert 3 not in model
        assert [tensor.name for tensor in model.values()] == list(model)
        assert model.metadata["general.name"] == "small"
        assert (model.version, model.alignment, model.files) == (3, 32, (path,))
        assert model.nbytes == sum(tensor.nbytes for tensor in model.values())
        assert "4 tensors" in repr(model)


def test_tensor_says_what_it_is(path: Path) -> None:
    with qmm.open(path) as model:
        experts = model["experts"]
        assert (experts.type, experts.shape, experts.m, experts.k) == ("Q4_K", (2, 5, 256), 10, 256)
        assert experts.nbytes == 10 * 144
        assert experts.supported
        assert experts.format.name == "Q4_K"
        assert (model["norm"].m, model["norm"].k) == (1, 64)
        assert "2 x 5 x 256 Q4_K, 1440 bytes" in repr(experts)


def test_tensor_is_the_same_object_while_it_is_held_and_holds_no_dropped_model(path: Path) -> None:
    model = qmm.open(path)
    up = model["up"]
    assert model["up"] is up
    assert next(tensor for tensor in model.values() if tensor.name == "up") is up
    dropped = weakref.ref(model)
    del up, model
    assert dropped() is None  # at once, not when the collector comes


def test_data_is_the_files_bytes_read_only_and_not_a_copy(path: Path, blocks: dict[str, bytes]) -> None:
    with qmm.open(path) as model:
        for name, expected in blocks.items():
            assert model[name].data.tobytes() == expected
        data = model["up"].data
        assert not data.flags.writeable
        assert np.shares_memory(data, model["up"].data)


def test_data_outlives_the_model_that_was_closed(path: Path, blocks: dict[str, bytes]) -> None:
    with qmm.open(path) as model:
        data = model["up"].data
    assert data.tobytes() == blocks["up"]


def test_unknown_tensor_suggests_near_names_and_is_a_key_error(path: Path) -> None:
    with qmm.open(path) as model:
        with pytest.raises(TensorNotFoundError, match=r"model.gguf: has no tensor 'expert' among its 4.*'experts'"):
            model["expert"]
        with pytest.raises(KeyError):
            model["expert"]
        with pytest.raises(TensorNotFoundError, match="qmm info"):
            model["zzz"]
        assert model.get("zzz") is None


def test_type_without_a_kernel_is_a_tensor_that_says_so(path: Path) -> None:
    with qmm.open(path) as model:
        exotic = model["exotic"]
        assert not exotic.supported
        assert exotic.data.size == 100
        with pytest.raises(UnsupportedTypeError, match=r"'exotic' is of type IQ1_S.*Q8_0"):
            _ = exotic.format


def test_closed_model_refuses_bytes_but_knows_its_tensors(path: Path) -> None:
    model = qmm.open(path)
    model.close()
    model.close()
    assert model.closed
    assert "closed" in repr(model)
    assert model["up"].shape == (3, 64)
    with pytest.raises(ClosedError, match=r"qmm\.open"):
        _ = model["up"].data


def test_opening_nonsense_is_one_error_of_qmm(tmp_path: Path) -> None:
    for name, content in {"empty": b"", "text": b"hello, world" * 100, "short": b"GGUF\x03\0\0\0"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(QmmError, match=name):
            qmm.open(tmp_path / name)
    with pytest.raises(GGUFError, match="missing"):
        qmm.open(tmp_path / "missing")


def test_a_refused_file_leaves_no_mapping_behind(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])  # the last tensor lacks a byte
    with pytest.raises(GGUFError, match="cut short"):
        qmm.open(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
