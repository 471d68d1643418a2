"""Files that change, move or vanish while a model or an engine on the CPU uses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_files import Value, write_gguf
from small_model import CHANGES, LOSSES, K, is_mapped, replace_file, write_small_model

import qmm
from qmm.errors import GGUFError, MappingError
from qmm.loaders import FileMapping, GGUFIndex
from qmm.loaders.files import OpenFile
from qmm.loaders.gguf import index as gguf
from qmm.model import Model


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_is_an_error_before_its_next_use(
    path: Path, x: np.ndarray, change: Callable[[Path], object], says: str
) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        engine.matmul("a", x)
        change(path)
        for use in (
            lambda: engine.matmul("a", x),
            lambda: engine.dequantize("b"),
            lambda: engine.address("a"),
            lambda: model["b"].data,
        ):
            with pytest.raises(MappingError, match=f"model.gguf: .*{says}"):
                use()
    assert not is_mapped(path)


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_model_goes_on_with_its_file_when_the_name_is_gone(
    path: Path, x: np.ndarray, lose: Callable[[Path], object]
) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        expected, bytes_before = engine.matmul("a", x), model["b"].data.tobytes()
        lose(path)
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
        assert model["b"].data.tobytes() == bytes_before
        if path.exists():
            with qmm.open(path) as new, qmm.Engine(new, "cpu") as again:
                assert not again.matmul("a", x).any()
    assert not is_mapped(path)


def test_one_file_under_two_names_is_used_when_the_first_name_is_gone(tmp_path: Path, rng: np.random.Generator) -> None:
    """As in the cache of Hugging Face, where revisions are links to blobs, and old ones are pruned."""
    for folder in ("blobs", "snapshots/old", "snapshots/new"):
        (tmp_path / folder).mkdir(parents=True)
    write_small_model(tmp_path / "blobs/0123", rng)
    names = [tmp_path / f"snapshots/{revision}/model.gguf" for revision in ("old", "new")]
    for name in names:
        name.symlink_to("../../blobs/0123")
    x = np.ones(K, np.float32)
    old, new = (qmm.open(name) for name in names)
    with qmm.Engine(new, "cpu") as engine:
        expected = engine.matmul("a", x)
        names[0].unlink()
        old.close()
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
        with qmm.open(names[1]) as again, qmm.Engine(again, "cpu") as other:
            assert again.path == names[1]
            np.testing.assert_array_equal(other.matmul("a", x), expected)
    new.close()


def test_a_relative_path_is_good_after_chdir(path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(path, {"w": ("F32", (1, 8), bytes(32))}, metadata={"tokens": ["a", "b"]})
    monkeypatch.chdir(path.parent)
    with qmm.open("model.gguf") as model, qmm.Engine(model, "cpu") as engine:
        monkeypatch.chdir("/")
        assert engine.matmul("w", np.ones(8, np.float32)).tolist() == [0]
        assert model["w"].data.size == 32
        assert model.metadata["tokens"] == ["a", "b"]
        assert (model.path, model["w"].info.path) == (path, path)
    metadata = model.metadata
    assert qmm.open(path).metadata["tokens"] == metadata["tokens"]


def test_metadata_is_read_from_the_open_file_or_from_the_same_one(path: Path) -> None:
    write_gguf(path, {}, metadata={"tokens": ["a", "b"], "more": ["c"], "rest": ["d"]})
    with qmm.open(path) as model:
        path.rename(path.with_name("elsewhere"))
        write_gguf(path, {}, metadata={"tokens": ["x", "y"], "more": ["z"], "rest": ["?"]})
        assert model.metadata["tokens"] == ["a", "b"]
    with pytest.raises(GGUFError, match=r"was written or replaced since it was opened.*'more' cannot be read"):
        model.metadata["more"]
    path.with_name("elsewhere").replace(path)
    assert model.metadata["more"] == ["c"]
    path.unlink()
    with pytest.raises(GGUFError, match=r"No such file.*'rest' cannot be read"):
        model.metadata["rest"]


def test_header_and_weights_are_of_one_file_whatever_becomes_of_the_name(
    path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced between the reading of its header and its mapping."""
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        expected = engine.matmul("a", x)
    share = FileMapping.of.__func__  # type: ignore[attr-defined]

    def replace_and_map(cls: type[FileMapping], file: OpenFile) -> FileMapping:
        replace_file(path)
        mapping: FileMapping = share(cls, file)
        return mapping

    monkeypatch.setattr(FileMapping, "of", classmethod(replace_and_map))
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
    index = GGUFIndex.read(path)
    replace_file(path)
    with pytest.raises(MappingError, match=r"model.gguf: was written or replaced since it was opened: inode was"):
        Model(index)


def test_shards_of_two_versions_of_a_model_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"model-{number:05d}-of-00002.gguf" for number in (1, 2)]

    def write(folder: Path, value: float) -> None:
        for number, named in enumerate(paths):
            keys = {"split.no": Value("uint16", number), "split.count": Value("uint16", 2), "split.tensors.count": 2}
            weights = np.full(8, value, np.float32).tobytes()
            write_gguf(folder / named.name, {f"w{number}": ("F32", (1, 8), weights)}, metadata=keys)

    write(tmp_path, 1)
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", 2)
    read_file = gguf._read_file

    def replace_and_read(file: OpenFile) -> object:
        found = read_file(file)
        for named in paths:
            if (tmp_path / "new" / named.name).exists():
                (tmp_path / "new" / named.name).replace(named)
        return found

    monkeypatch.setattr(gguf, "_read_file", replace_and_read)
    with pytest.raises(GGUFError, match=r"00001-of-00002.gguf: was written or replaced since it was opened"):
        qmm.open(paths[0])
    with qmm.open(paths[0]) as model:
        assert [tensor.data.view(np.float32)[0] for tensor in model.values()] == [2, 2]
