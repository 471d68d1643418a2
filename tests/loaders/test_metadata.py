"""Keys and values: every type, against gguf's reader; arrays and long texts, which are read when they are asked for."""

from __future__ import annotations

import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from gguf_files import F32_ROW, Array, Value, write_gguf

import qmm
from qmm.errors import GGUFError, UnsupportedTypeError
from qmm.loaders import GGUFIndex
from qmm.loaders.gguf.header import (
    LONG_TEXT,
    TEXT_LIMIT,
    ValueType,
)


def test_value_types_are_those_of_gguf() -> None:
    assert {kind.name: int(kind) for kind in ValueType} == {kind.name: int(kind) for kind in GGUFValueType}


def test_every_value_type_reads_as_gguf_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    numbers = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": math.pi, "bool": True,
    }  # fmt: skip
    metadata: dict[str, Any] = {f"scalar.{kind}": Value(kind, number) for kind, number in numbers.items()}
    metadata |= {f"array.{kind}": Array(kind, [number, 0, number]) for kind, number in numbers.items()}
    metadata |= {"text": "häuser 🎈", "empty": "", "texts": ["a", "", "ö" * 300], "nothing": Array("int32", [])}
    write_gguf(path, {"w": F32_ROW}, metadata=metadata)

    index = GGUFIndex.read(path)
    assert list(index.metadata) == list(metadata)
    reader = gguf.GGUFReader(path)
    for key in metadata:
        theirs = reader.get_field(key)
        assert theirs is not None
        ours = index.metadata[key]
        assert (ours.tolist() if isinstance(ours, np.ndarray) else ours) == theirs.contents(), key
    for kind in numbers:
        assert index.metadata.type_of(f"scalar.{kind}") == kind
        assert index.metadata.type_of(f"array.{kind}") == f"{kind}[3]"
        array = index.metadata[f"array.{kind}"]
        assert array.dtype == np.dtype(kind)
        assert not array.flags.writeable
    assert type(index.metadata["scalar.bool"]) is bool
    assert index.metadata.type_of("texts") == "string[3]"


def test_nested_arrays(tmp_path: Path) -> None:
    path = tmp_path / "nested.gguf"
    inner = Array("array", [Array("string", ["x", "yz"]), Array("uint8", [1, 2])])
    write_gguf(path, {}, metadata={"a": Array("array", [inner, Array("int16", [-1])]), "behind": 7})
    metadata = GGUFIndex.read(path).metadata
    assert metadata["behind"] == 7
    assert metadata.type_of("a") == "array[2]"
    (texts, numbers), minus = metadata["a"]
    assert texts == ["x", "yz"]
    assert numbers.tolist() == [1, 2]
    assert minus.tolist() == [-1]


def test_arrays_are_read_once_and_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {}, metadata={"tokens": ["a", "b"], "name": "n"})
    index = GGUFIndex.read(path)
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(1) or pread(*arguments))
    assert "tokens" in index.metadata
    assert (len(index.metadata), index.metadata["name"], index.metadata.type_of("tokens")) == (2, "n", "string[2]")
    assert not reads
    assert index.metadata["tokens"] is index.metadata["tokens"]
    assert reads
    with pytest.raises(KeyError):
        index.metadata["absent"]


def test_a_long_text_is_read_when_asked_for_and_not_before(tmp_path: Path) -> None:
    """A whole tokenizer.json, as some writers put it there, is longer than all else that a header may hold."""
    path = tmp_path / "model.gguf"
    long, short = "ö🎈" * (TEXT_LIMIT // 4), "x" * LONG_TEXT
    write_gguf(path, {"w": F32_ROW}, metadata={"long": long, "short": short, "behind": 7})
    tracemalloc.start()
    try:
        metadata = GGUFIndex.read(path).metadata
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert [metadata.in_file(key) for key in metadata] == [True, False, False]
    assert (metadata.type_of("long"), metadata["short"], metadata["behind"]) == ("string", short, 7)
    assert metadata["long"] == long
    assert not metadata.in_file("long")
    assert metadata["long"] is metadata["long"]


def test_many_texts_of_some_length_are_left_in_the_file(tmp_path: Path) -> None:
    """75 licences of 60 kB are more text than a header may hold, and each is shorter than LONG_TEXT."""
    path = tmp_path / "model.gguf"
    texts = {f"license.{number}": f"{number} " * 20_000 for number in range(75)}
    write_gguf(path, {"w": F32_ROW}, metadata=texts | {"general.name": "short"})
    metadata = GGUFIndex.read(path).metadata
    assert not metadata.in_file("license.0")
    assert metadata.in_file("license.74")
    assert not metadata.in_file("general.name")
    assert dict(metadata) == texts | {"general.name": "short"}


def test_a_long_text_that_is_not_all_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {}, metadata={"long": b"x" * 100_001})
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(GGUFError, match=r"metadata key 'long' needs 100001 bytes, but only 100000 bytes are left"):
        GGUFIndex.read(path)


def test_an_array_of_a_file_written_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {}, metadata={"tokens": ["a", "b"]})
    index = GGUFIndex.read(path)
    write_gguf(path, {}, metadata={"tokens": ["a", "bc"]})
    with pytest.raises(GGUFError, match=r"written or replaced since .* was \d+, is \d+.*'tokens' cannot be read"):
        index.metadata["tokens"]


def test_text_that_is_not_utf8_is_kept_byte_for_byte_and_hides_nothing_else(tmp_path: Path) -> None:
    """Latin-1 authors, names of tensors, and tokens that are bytes; ggml knows no encoding."""
    path = tmp_path / "model.gguf"
    metadata: dict[Any, Any] = {b"k\xff": 1, "author": "Andr\xe9".encode("latin-1"), "after": "ö"}
    metadata |= {"tokens": Array("string", ["ok", b"\xff", "ö", b"a\xc3"]), "long": b"x" * 100_000 + b"\xe9"}
    name: Any = b"w\xe9"
    write_gguf(path, {name: ("F32", (1, 8), np.ones(8, np.float32).tobytes())}, metadata=metadata)
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        found = dict(model.metadata)
        assert found.pop("k\udcff") == 1
        assert found.pop("long").encode("utf-8", "surrogateescape") == metadata["long"]
        assert found == {"author": "Andr\udce9", "after": "ö", "tokens": ["ok", "\udcff", "ö", "a\udcc3"]}
        assert found["author"].encode("utf-8", "surrogateescape") == metadata["author"]
        assert engine.matmul(os.fsdecode(name), np.ones(8, np.float32)).tolist() == [8]  # as the command line gives it
        with pytest.raises(UnsupportedTypeError, match=r"'w\\udce9' is of type") as caught:
            raise UnsupportedTypeError(f"{model[os.fsdecode(name)].name!r} is of type")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("byte", [0, 1, 2, 255])
def test_any_byte_but_0_is_true(tmp_path: Path, byte: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"w": F32_ROW}, metadata={"flag": Value("bool", byte), "flags": Array("bool", [0, byte, 1])})
    metadata = GGUFIndex.read(path).metadata
    assert metadata["flag"] is (byte != 0)
    assert metadata["flags"].dtype == np.bool_
    assert metadata["flags"].view(np.uint8).tolist() == [0, byte != 0, 1]
    assert not metadata["flags"].flags.writeable
