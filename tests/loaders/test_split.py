"""Models that are split over several files, and whole files that say they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import F32_ROW, Value, write_gguf

from qmm.errors import GGUFError
from qmm.loaders import GGUFIndex


def write_shards(folder: Path, count: int = 3, **overrides: Any) -> list[Path]:
    paths = [folder / f"model-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        metadata = {
            "split.no": Value("uint16", number),
            "split.count": Value("uint16", count),
            "split.tensors.count": count,
        }
        metadata |= {"general.name": "whole", "tokens": ["a", "b"]} if number == 0 else {}
        tensor = ("F32", (number + 1, 8), bytes(32 * (number + 1)))
        write_gguf(path, {f"w{number}": tensor}, metadata=metadata | overrides)
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_shard_opens_the_whole_model(tmp_path: Path, opened: int) -> None:
    paths = write_shards(tmp_path)
    index = GGUFIndex.read(paths[opened])
    assert index.path == paths[opened]
    assert index.files == tuple(paths)
    assert [(t.name, t.path, t.shape) for t in index.tensors.values()] == [
        (f"w{number}", paths[number], (number + 1, 8)) for number in range(3)
    ]
    assert index.metadata["general.name"] == "whole"
    assert index.metadata["tokens"] == ["a", "b"]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].unlink()
    with pytest.raises(GGUFError, match=r"shard 2 of 3 is missing: .*model-00002-of-00003.gguf"):
        GGUFIndex.read(paths[2])


def test_shard_of_another_place_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(GGUFError, match=r"00002-of-00003.gguf: should be shard 1 of 3 .* but says 2 of 3"):
        GGUFIndex.read(paths[0])


def test_shard_that_is_a_whole_file_is_named(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    write_gguf(paths[2], {"x": F32_ROW})
    with pytest.raises(GGUFError, match=r"00003-of-00003.gguf: should be shard 2 of 3 .* but says -1 of 1"):
        GGUFIndex.read(paths[0])


def test_shard_of_another_name_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(GGUFError, match=r"renamed.gguf: is one of 3 shards .*NAME-00001-of-00003.gguf"):
        GGUFIndex.read(renamed)
    renamed = renamed.rename(tmp_path / "model-00001-of-00004.gguf")
    with pytest.raises(GGUFError, match=r"its name says 4 shards, but split.count is 3"):
        GGUFIndex.read(renamed)


def test_shards_with_too_few_tensors_are_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, **{"split.tensors.count": 4})
    with pytest.raises(GGUFError, match=r"split.tensors.count is 4, but the 3 shards hold 3"):
        GGUFIndex.read(paths[0])


def test_shards_that_disagree_on_the_number_of_tensors_are_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    shard = {"split.no": Value("uint16", 2), "split.count": Value("uint16", 3), "split.tensors.count": 5}
    write_gguf(paths[2], {"w2": F32_ROW}, metadata=shard)
    with pytest.raises(GGUFError, match=r"00003-of-00003.gguf: split.tensors.count is 5, but the 3 shards hold 3"):
        GGUFIndex.read(paths[0])


@pytest.mark.parametrize("number", ["00000", "00004", "0000\N{ARABIC-INDIC DIGIT TWO}"])
def test_shard_of_a_number_that_there_is_not_is_refused(tmp_path: Path, number: str) -> None:
    """All shards are there, but the file that was asked for would not be among those that were read."""
    paths = write_shards(tmp_path)
    extra = tmp_path / f"model-{number}-of-00003.gguf"
    extra.write_bytes(paths[1].read_bytes())
    with pytest.raises(GGUFError, match=r"its name says shard [04] of 3|is not named like NAME-00001-of-00003.gguf"):
        GGUFIndex.read(extra)


def test_each_shard_has_its_own_alignment(tmp_path: Path) -> None:
    """llama-gguf-split writes general.alignment into the first shard only."""
    paths = write_shards(tmp_path, **{"split.tensors.count": 4})
    shard = {"split.no": Value("uint16", 0), "split.count": Value("uint16", 3), "split.tensors.count": 4}
    places = write_gguf(paths[0], {"v": F32_ROW, "w0": F32_ROW}, metadata=shard, alignment=4096)
    index = GGUFIndex.read(paths[1])
    assert (index.alignment, index.tensors["w0"].offset) == (4096, places["w0"])
    assert index.tensors["w1"].offset % 32 == 0 != index.tensors["w1"].offset % 4096


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes().replace(b"w2", b"w0"))
    with pytest.raises(GGUFError, match=r"00003-of-00003.gguf: tensor 'w0' is in .*00001-of-00003.gguf already"):
        GGUFIndex.read(paths[0])


def test_split_count_of_one_is_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "any-name.gguf"
    write_gguf(path, {"w": F32_ROW}, metadata={"split.count": Value("uint16", 1)})
    assert GGUFIndex.read(path).files == (path,)


def test_split_count_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"w": F32_ROW}, metadata={"split.count": "3"})
    with pytest.raises(GGUFError, match=r"'split.count' should be an integer, but is str"):
        GGUFIndex.read(path)


@pytest.mark.parametrize("name", ["requantized.gguf", "model-00001-of-00003.gguf", "model-00002-of-00003.gguf"])
def test_a_whole_file_with_the_keys_of_former_shards_is_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    keys = {"split.no": Value("uint16", 0), "split.count": Value("uint16", 3), "split.tensors.count": 2}
    write_gguf(path, {"a": F32_ROW, "b": F32_ROW}, metadata=keys)
    assert (list(GGUFIndex.read(path).tensors), GGUFIndex.read(path).files) == (["a", "b"], (path,))
    keys["split.tensors.count"] = 3
    write_gguf(path, {"a": F32_ROW, "b": F32_ROW}, metadata=keys)
    with pytest.raises(
        GGUFError, match=r"shard \d of 3 is missing|is one of 3 shards \(split.count\), but is not named"
    ):
        GGUFIndex.read(path)


def test_a_shard_with_all_tensors_beside_the_others_is_still_a_shard(tmp_path: Path) -> None:
    """``llama-gguf-split --no-tensor-first-split`` puts the model's own keys alone into the first shard."""
    paths = [tmp_path / f"model-{number:05d}-of-00002.gguf" for number in (1, 2)]
    keys = [
        {"split.no": Value("uint16", n), "split.count": Value("uint16", 2), "split.tensors.count": 1} for n in (0, 1)
    ]
    write_gguf(paths[0], {}, metadata=keys[0] | {"general.name": "whole"})
    write_gguf(paths[1], {"w": F32_ROW}, metadata=keys[1])
    for path in paths:
        index = GGUFIndex.read(path)
        assert (index.files, list(index.tensors), index.metadata["general.name"]) == (tuple(paths), ["w"], "whole")
