"""The index against files written byte by byte, against gguf's reader, and against damage."""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import pickle
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import gguf_reference
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf_files import FORMATS, Array, Value, random_blocks, write_gguf

import qmm
from qmm.cli.info import describe
from qmm.errors import GGUFError, UnsupportedTypeError
from qmm.loaders import FileMapping, GGUFIndex
from qmm.loaders.files import OpenFile
from qmm.loaders.gguf.header import (
    COUNT_LIMIT,
    HEADER_LIMIT,
    LAST_READ_NBYTES,
    LONG_TEXT,
    NESTED_LIMIT,
    STRING_LIMIT,
    TEXT_LIMIT,
    HeaderReader,
    ValueType,
)

F32_ROW = ("F32", (1, 8), bytes(32))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_value_types_are_those_of_gguf() -> None:
    assert {kind.name: int(kind) for kind in ValueType} == {kind.name: int(kind) for kind in GGUFValueType}


def test_the_test_writer_knows_the_block_sizes_of_gguf() -> None:
    for name, form in FORMATS.items():
        kind = GGMLQuantizationType[name]
        assert (form.number, form.values, form.nbytes) == (kind.value, *GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("alignment", [1, 2, 4, 8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_every_tensor_is_where_gguf_reader_finds_it(
    tmp_path: Path, rng: np.random.Generator, alignment: int, version: int
) -> None:
    path = tmp_path / "model.gguf"
    tensors = {}
    for name, form in FORMATS.items():
        shape = (3, 2, form.values * 2)
        tensors[f"blk.{name}.weight"] = (name, shape, random_blocks(name, shape, rng))
    places = write_gguf(path, tensors, alignment=alignment, version=version)

    index = GGUFIndex.read(path)
    reader = gguf.GGUFReader(path)
    assert (index.version, index.alignment, index.files) == (version, alignment, (path,))
    assert list(index.tensors) == [tensor.name for tensor in reader.tensors] == list(tensors)
    for theirs in reader.tensors:
        ours = index.tensors[theirs.name]
        assert ours.type == theirs.tensor_type.name
        assert ours.shape == tuple(theirs.shape.tolist()[::-1])
        assert (ours.m, ours.k) == (6, ours.shape[-1])
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert ours.offset == places[ours.name]
        with FileMapping.open(ours.path) as mapping:
            assert mapping.view(ours.offset, ours.nbytes).tobytes() == tensors[ours.name][2]


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


def test_unknown_type_gets_the_room_up_to_its_neighbour_or_the_end(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = {"first": (99, (3,), bytes(40)), "second": F32_ROW, "third": (4, (2, 2), bytes(33))}
    places = write_gguf(path, tensors)  # type: ignore[arg-type]
    index = GGUFIndex.read(path)
    first, second, third = index.tensors.values()
    assert (first.type, first.nbytes, second.type, third.type) == ("unknown(99)", 64, "F32", "unknown(4)")
    assert third.offset == places["third"]
    assert third.offset + third.nbytes == path.stat().st_size


def test_a_tensor_of_an_unknown_type_is_listed_and_only_its_use_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"new": (99, (1, 8), bytes(32)), "known": ("F32", (1, 8), np.ones(8, np.float32).tobytes())})
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        assert [(row.name, row.type, row.nbytes, row.supported) for row in describe(model).tensors] == [
            ("new", "unknown(99)", 32, False),
            ("known", "F32", 32, True),
        ]
        assert model["new"].data.tobytes() == bytes(32)
        with pytest.raises(UnsupportedTypeError, match=r"tensor 'new' is of type unknown\(99\)"):
            engine.matmul("new", np.ones(8, np.float32))
        assert engine.matmul("known", np.ones(8, np.float32)).tolist() == [8]


@pytest.mark.parametrize("other", [F32_ROW, (98, (1, 8), bytes(32))], ids=["known", "unknown"])
def test_two_tensors_at_one_offset_overlap_whatever_their_types_and_order(
    tmp_path: Path, other: tuple[str | int, tuple[int, ...], bytes]
) -> None:
    path = tmp_path / "model.gguf"
    for names in ("ab", "ba"):
        tensors = dict(zip(names, (other, (99, (1, 8), bytes(32))), strict=True))
        write_gguf(path, tensors, offsets={names[1]: 0})  # type: ignore[arg-type]
        with pytest.raises(GGUFError, match=r"tensor '[ab]' takes bytes \d+ to \d+, but tensor '[ab]' begins at byte"):
            GGUFIndex.read(path)


def test_unknown_type_has_no_byte_without_values_and_at_least_one_with_them(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for order in (("none", "w"), ("w", "none")):
        tensors = {"none": (99, (0, 3), b""), "w": F32_ROW}
        write_gguf(path, {name: tensors[name] for name in order}, offsets={"none": 0, "w": 0})
        assert {name: tensor.nbytes for name, tensor in GGUFIndex.read(path).tensors.items()} == {"none": 0, "w": 32}
    write_gguf(path, {"w": F32_ROW, "some": (99, (1, 3), b"")})
    with pytest.raises(GGUFError, match=r"tensor 'some' takes bytes 160 to 161, but the file ends at byte 160"):
        GGUFIndex.read(path)


@pytest.mark.parametrize(
    ("shape", "m", "k"),
    [
        *[((), 1, 1), ((5,), 1, 5), ((2, 3, 4, 5), 24, 5), ((0, 5), 0, 5), ((7, 0), 7, 0), ((2, 1, 3, 1, 5), 6, 5)],
        ((1,) * 63 + (5,), 1, 5),
    ],
)
def test_shapes(tmp_path: Path, shape: tuple[int, ...], m: int, k: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"w": ("F32", shape, bytes(4 * m * k)), "v": F32_ROW})
    tensor = GGUFIndex.read(path).tensors["w"]
    assert (tensor.shape, tensor.m, tensor.k, tensor.nbytes) == (shape or (1,), m, k, 4 * m * k)


def test_tensor_table_may_be_out_of_order(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    places = write_gguf(path, {"a": F32_ROW, "b": F32_ROW}, offsets={"a": 32, "b": 0})
    index = GGUFIndex.read(path)
    assert list(index.tensors) == ["a", "b"]
    assert [tensor.offset for tensor in index.tensors.values()] == [places["b"], places["a"]]


# Damage. Each case: what it is, keyword arguments of write_gguf, and what the message must say.

DAMAGE: list[tuple[str, dict[str, Any], str]] = [
    ("magic", {"magic": b"GGML"}, r"not a GGUF file: it has b'GGML'"),
    ("version-0", {"version": 0}, r"version 0; qmm reads versions 2 and 3"),
    ("version-1", {"version": 1}, r"version 1; qmm reads versions 2 and 3.*Convert the model again"),
    ("version-4", {"version": 4}, r"version 4; qmm reads versions 2 and 3"),
    ("big-endian", {"endian": ">"}, r"big endian.*gguf-convert-endian .* little"),
    ("tensor-count", {"tensor_count": 2**63}, r"claims 9223372036854775808 tensors"),
    ("tensor-count-one-more", {"tensor_count": 3}, "cut short"),
    ("key-count", {"key_count": 2**63}, r"claims 9223372036854775808 metadata keys"),
    ("alignment-0", {"alignment": 32, "metadata": {"general.alignment": Value("uint32", 0)}}, r"alignment is 0"),
    ("alignment-text", {"metadata": {"general.alignment": "32"}}, r"'general.alignment' should be .* but is string"),
    ("alignment-true", {"metadata": {"general.alignment": True}}, r"'general.alignment' should be .* but is bool"),
    ("alignment-array", {"metadata": {"general.alignment": Array("uint32", [32])}}, r"should be .* but is uint32\[1\]"),
    ("alignment-negative", {"metadata": {"general.alignment": -32}}, r"alignment is -32, and must be 1 at least"),
    ("misaligned", {"offsets": {"b": 33}}, r"tensor 'b' has offset 33.*alignment 32"),
    ("overlap", {"offsets": {"b": 0}}, r"tensor '[ab]' takes bytes \d+ to \d+, but tensor '[ab]' begins"),
    ("outside", {"offsets": {"b": 1 << 40}}, r"tensor 'b' takes bytes .* but the file ends at byte \d+"),
    ("outside-by-one-step", {"offsets": {"b": 64}}, r"'b' takes bytes 192 to 224, but the file ends at byte 192"),
    ("outside-by-wrapping", {"offsets": {"b": 2**64 - 32}}, r"tensor 'b' takes bytes .* but the file ends at"),
    ("dimensions-wrap", {"dimensions": {"b": (2**32, 2**32)}}, r"4294967296 x 4294967296, .* is 18446744073709551616"),
    ("dimensions-wrap-to-0", {"dimensions": {"b": (2**63, 2)}}, r"tensor 'b' has dimensions 9223372036854775808 x 2"),
    ("dimension-behind-0", {"dimensions": {"b": (0, 2**63)}}, r"tensor 'b' has dimensions 0 x 9223372036854775808"),
    ("dimensions-wrap-behind-0", {"dimensions": {"b": (0, 2**62, 2)}}, r"whose product is 9223372036854775808"),
    ("dimensions-just-too-long", {"dimensions": {"b": (2**63 - 8,)}}, r"'b' takes bytes .* but the file ends at"),
    ("dimensions-65", {"dimensions": {"b": (8,) + (1,) * 64}}, r"tensor 'b' has 65 dimensions; qmm reads at most 64"),
    ("array-count", {"metadata": {"a": Array("int8", [], 2**63)}}, r"claims 9223372036854775808 elements of .*'a'"),
    ("array-of-strings-count", {"metadata": {"a": Array("string", [], 2**61)}}, r"claims \d+ elements of .*'a'"),
    ("array-of-strings-short", {"metadata": {"a": Array("string", ["x"], 6)}}, r"a string in metadata key 'a' needs"),
    ("nested-count", {"metadata": {"a": Array("array", [], 2**63)}}, r"claims 9223372036854775808 elements of .*'a'"),
    ("nested-of-unknown", {"metadata": {"a": Array("array", [Array("?", [])])}}, r"'a' has value type 99"),
    ("split-count-negative", {"metadata": {"split.count": -2}}, r"'split.count' is -2"),
    ("array-of-unknown", {"metadata": {"a": Array("?", [])}}, r"has value type 99; qmm knows 0 to 12"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    path = tmp_path / "damaged.gguf"
    write_gguf(path, {"a": F32_ROW, "b": F32_ROW}, **arguments)
    with pytest.raises(GGUFError, match=message) as caught:
        GGUFIndex.read(path)
    assert str(path) in str(caught.value)


def test_row_of_partial_blocks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    write_gguf(path, {"w": ("Q4_K", (2, 256), bytes(288))}, dimensions={"w": (128, 4)})
    with pytest.raises(GGUFError, match=r"tensor 'w' has rows of 128 values.*256 in a block of Q4_K"):
        GGUFIndex.read(path)


def test_last_tensor_ends_at_the_last_byte_and_not_one_before(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path, {"w": F32_ROW})
    tensor = GGUFIndex.read(path).tensors["w"]
    assert tensor.offset + tensor.nbytes == path.stat().st_size
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(GGUFError, match=r"tensor 'w' takes bytes .*cut short"):
        GGUFIndex.read(path)


def test_duplicate_tensor_and_key_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "double.gguf"
    write_gguf(path, {"aa": F32_ROW, "ab": F32_ROW}, metadata={"ka": 1, "kb": 2})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"ab", b"aa"))
    with pytest.raises(GGUFError, match="tensor 'aa' occurs twice"):
        GGUFIndex.read(path)
    path.write_bytes(whole.replace(b"kb", b"ka"))
    with pytest.raises(GGUFError, match="key 'ka' occurs twice"):
        GGUFIndex.read(path)


# What breaks the format, and files in use have.


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


@pytest.mark.parametrize("alignment", [1, 2, 4, 24])
def test_tensors_at_any_alignment_are_used(tmp_path: Path, rng: np.random.Generator, alignment: int) -> None:
    """gguf.md wants a multiple of 8, ggml a power of two; kernels of qmm read at any address."""
    path = tmp_path / "model.gguf"
    kinds = {"Q4_K": (3, 512), "Q8_0": (3, 32), "F32": (3, 33), "BF16": (2, 5)}
    tensors: dict[str, Any] = {"odd": ("Q8_0", (1, 32), bytes(34)), "byte": (99, (1,), bytes(1))}
    tensors |= {kind: (kind, shape, random_blocks(kind, shape, rng)) for kind, shape in kinds.items()}
    places = write_gguf(path, tensors, alignment=alignment)
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        assert model.alignment == alignment
        for kind, (m, k) in kinds.items():
            assert model[kind].info.offset == places[kind]
            rows = np.frombuffer(tensors[kind][2], np.uint8).reshape(m, -1)
            weights = gguf.quants.dequantize(rows.copy(), GGMLQuantizationType[kind])
            np.testing.assert_array_equal(engine.dequantize(kind), weights)
            x = rng.standard_normal((4, k)).astype(np.float32)
            exact = x.astype(np.float64) @ weights.T.astype(np.float64)
            assert np.sum((engine.matmul(kind, x) - exact) ** 2) <= 5e-4 * np.sum(exact**2)


@pytest.mark.parametrize("byte", [0, 1, 2, 255])
def test_any_byte_but_0_is_true(tmp_path: Path, byte: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"w": F32_ROW}, metadata={"flag": Value("bool", byte), "flags": Array("bool", [0, byte, 1])})
    metadata = GGUFIndex.read(path).metadata
    assert metadata["flag"] is (byte != 0)
    assert metadata["flags"].dtype == np.bool_
    assert metadata["flags"].view(np.uint8).tolist() == [0, byte != 0, 1]
    assert not metadata["flags"].flags.writeable


def test_a_tensor_of_five_dimensions_is_used_by_its_rows(tmp_path: Path, rng: np.random.Generator) -> None:
    """The patch embedding of a video model; ggml has at most four dimensions, gguf-py and MLX write more."""
    path = tmp_path / "wan.gguf"
    shape = (8, 4, 1, 2, 32)
    block = random_blocks("Q8_0", (64, 32), rng)
    write_gguf(path, {"patch": ("Q8_0", shape, block), "w": ("Q8_0", (64, 32), block)})
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        x = rng.standard_normal((3, 32)).astype(np.float32)
        assert (model["patch"].shape, model["patch"].m, model["patch"].k) == (shape, 64, 32)
        assert engine.matmul("patch", x).shape == (3, 8, 4, 1, 2)
        np.testing.assert_array_equal(engine.matmul("patch", x).reshape(3, 64), engine.matmul("w", x))
        np.testing.assert_array_equal(engine.dequantize("patch").reshape(64, 32), engine.dequantize("w"))


@pytest.mark.parametrize("cut", [0, 24], ids=["padded", "not-padded"])
def test_a_tensor_without_values_may_be_last_in_a_file_that_is_not_padded(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.gguf"
    weights = np.arange(90, dtype=np.float32)
    write_gguf(
        path, {"w": ("F32", (3, 30), weights.tobytes() + bytes(24)), "__index_timestep_zero__": ("F32", (0,), b"")}
    )
    os.truncate(path, path.stat().st_size - cut)
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        empty = model["__index_timestep_zero__"]
        assert (empty.nbytes, empty.data.size, engine.dequantize(empty).shape) == (0, 0, (0,))
        np.testing.assert_array_equal(engine.dequantize("w").reshape(-1), weights)


def test_tensors_without_values_may_claim_any_place(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"w": F32_ROW, "none": ("F32", (0, 3), b"")}, offsets={"none": 2**64 - 32})
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        assert model["none"].data.size == 0
        assert engine.matmul("none", np.ones(3, np.float32)).shape == (0,)
        assert engine.address("none") == 0


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


# Files, names, and what becomes of them.


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


def sparse(path: Path, prefix: bytes) -> None:
    """``prefix``, then zeros up to 1 TiB that take no room on the disk."""
    path.write_bytes(prefix)
    os.truncate(path, 1 << 40)


def head(tensors: int, keys: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)


def key(kind: int) -> bytes:
    return struct.pack("<Q1sI", 1, b"k", kind)


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def array(name: bytes, item: int, count: int) -> bytes:
    return text(name) + struct.pack("<IIQ", 9, item, count)


def keys(count: int) -> bytes:
    return b"".join(text(b"k%d" % index) + struct.pack("<II", 4, index) for index in range(count))


def rows(count: int) -> bytes:
    return b"".join(text(b"t%d" % index) + struct.pack("<IQIQ", 1, 8, 0, 32 * index) for index in range(count))


LONG = "\U000e0001".encode() * (TEXT_LIMIT // 4 - 8)  # as text four bytes a character, as a repr ten

# A sparse file makes every count and length plausible: what is left is the bounds of header.py.
HOSTILE = {
    "strings-2^36": head(0, 1) + key(9) + struct.pack("<IQ", 8, 1 << 36),
    "strings-at-the-limit": head(2, 1) + key(9) + struct.pack("<IQ", 8, STRING_LIMIT),
    "bytes-2^39": head(0, 1) + key(9) + struct.pack("<IQ", 0, 1 << 39),
    "nested-2^36": head(0, 1) + key(9) + struct.pack("<IQ", 9, 1 << 36),
    "nested-at-the-limit": head(0, 3) + key(9) + struct.pack("<IQ", 9, NESTED_LIMIT),
    "deep": head(0, 1) + key(9) + struct.pack("<IQ", 9, 1) * 1000,
    "string-2^39": head(0, 1) + key(8) + struct.pack("<Q", 1 << 39),
    "long-string-in-array": head(0, 2) + key(9) + struct.pack("<IQQ", 8, 1 << 20, 1 << 39),
    "keys-2^36": head(0, 1 << 36),
    "keys-at-the-limit": head(0, COUNT_LIMIT) + keys(COUNT_LIMIT - 1) + key(99),
    "tensors-2^34": head(1 << 34, 0),
    "tensors-at-the-limit": head(COUNT_LIMIT, 0) + rows(COUNT_LIMIT - 1) + rows(1),
    "long-name": head(1, 0) + struct.pack("<Q", 1 << 30),
    "long-name-of-a-misaligned-tensor": head(1, 0) + text(LONG) + struct.pack("<IQIQ", 1, 8, 0, 3),
    "long-name-twice": head(2, 0) + (text(LONG[: len(LONG) // 2]) + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2,
    "long-key-of-an-unknown-type": head(0, 1) + text(LONG) + struct.pack("<I", 99),
    "alignment-of-megabytes": head(0, 1) + text(b"general.alignment") + struct.pack("<I", 8) + text(LONG),
    "alignment-is-an-array": head(0, 1) + array(b"general.alignment", 0, HEADER_LIMIT - 100),
    "split-count-is-an-array": head(0, 1) + array(b"split.count", 0, HEADER_LIMIT - 100),
    "split-count-is-strings": head(0, 1) + array(b"split.count", 8, STRING_LIMIT),
}


@pytest.mark.parametrize("prefix", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_costs_neither_time_nor_memory(tmp_path: Path, prefix: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    sparse(path, prefix)
    started = time.process_time()  # not the wall: a busy machine must not fail this
    with pytest.raises(GGUFError) as caught:
        GGUFIndex.read(path)
    assert time.process_time() - started < 1
    assert len(str(caught.value)) < 3000
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            GGUFIndex.read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_header_at_every_limit_is_read_within_a_second_and_64_mb(tmp_path: Path) -> None:
    """Each limit is bearable alone; one file may reach them all."""
    path = tmp_path / "full.gguf"
    texts = keys(COUNT_LIMIT - 2), rows(COUNT_LIMIT - 1)
    taken = len(texts[0]) + len(texts[1]) - 16 * (COUNT_LIMIT - 2) - (8 + 24) * (COUNT_LIMIT - 1) + 2
    name = LONG[: (TEXT_LIMIT - taken) // 4 * 4]
    chain = struct.pack("<Q", 8) + struct.pack("<Q", 1)  # contents that look like headers: the slowest to step over
    prefix = b"".join([
        head(COUNT_LIMIT, COUNT_LIMIT),
        texts[0],
        array(b"n", 9, NESTED_LIMIT),
        (struct.pack("<IQ", 8, 1) + text(b"")) * NESTED_LIMIT,
        array(b"s", 8, STRING_LIMIT - NESTED_LIMIT),
        chain * (STRING_LIMIT - NESTED_LIMIT),
        texts[1],
        text(name) + struct.pack("<IQIQ", 1, 8, 0, 32 * COUNT_LIMIT),
    ])  # fmt: skip
    sparse(path, prefix)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        index = GGUFIndex.read(path)
        seconds.append(time.process_time() - started)
    assert (len(index.tensors), len(index.metadata)) == (COUNT_LIMIT, COUNT_LIMIT)
    assert min(seconds) < 1
    del index
    tracemalloc.start()
    try:
        GGUFIndex.read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def small_model(path: Path) -> gguf_reference.File:
    """A file with every kind of field, and where they are."""
    metadata = {"n": 7, "s": "text", "list": ["a", "bc"], "nest": Array("array", [Array("int8", [1])])}
    write_gguf(path, {"a": F32_ROW, "b": F32_ROW}, metadata=metadata, alignment=64)
    return gguf_reference.read_file(path)


def test_a_file_cut_at_any_byte_is_refused_with_that_byte(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    fields = small_model(path).fields
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, -1, -1):
        os.truncate(path, cut)
        with pytest.raises(GGUFError) as caught:
            GGUFIndex.read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        if short := re.search(r"at byte (\d+): .* (\d+) bytes, but only (\d+) bytes are left", message):
            position, needed, left = map(int, short.groups())
            assert any(field.position == position for field in fields)
            assert position + left + (8 if "claims" in message else 0) == cut
            assert needed > left
        elif cut < 8:
            assert (f"only {cut} bytes" if cut else "is empty (0 bytes)") in message
        else:
            place = re.search(r"tensor '[ab]' takes bytes \d+ to (\d+), but the file ends at byte (\d+)", message)
            assert place, message
            assert int(place[2]) == cut < int(place[1])
            assert cut >= fields[-1].position + fields[-1].nbytes


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_an_absurd_number_anywhere_in_the_header_is_in_the_message(tmp_path: Path, value: int) -> None:
    path = tmp_path / "absurd.gguf"
    file = small_model(path)
    whole = path.read_bytes()
    start = file.tensors[0].offset
    changed = 0
    for kind, position, nbytes in file.fields:
        if kind not in ("version", "count", "length", "value type", "dimensions", "dimension", "offset"):
            continue
        absurd = value >> (64 - 8 * nbytes)
        path.write_bytes(whole[:position] + absurd.to_bytes(nbytes, "little") + whole[position + nbytes :])
        with pytest.raises(GGUFError) as caught:
            GGUFIndex.read(path)
        said = {int(number, 0) for number in re.findall(r"0x[0-9a-f]+|\d+", str(caught.value).removeprefix(str(path)))}
        # An offset counts from the start of the data, and a string's length from behind its own 8 bytes.
        assert said & {absurd, absurd + start, absurd + 8}, f"{kind} at byte {position}: {caught.value}"
        changed += 1
    assert changed == 32


def test_control_characters_of_a_name_do_not_get_into_messages(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    write_gguf(path, {"a\n\0\x1b[31m\u202e": F32_ROW}, offsets={"a\n\0\x1b[31m\u202e": 3})
    with pytest.raises(GGUFError, match=r"tensor 'a\\n\\x00\\x1b\[31m\\u202e' has offset 3") as caught:
        GGUFIndex.read(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("left", [10, 49], ids=["before-a-number", "before-a-chain-of-strings"])
def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "shrinking.gguf"
    write_gguf(path, {}, metadata={"t": ["a"] * 300})
    with HeaderReader(OpenFile.open(path, GGUFError)) as header:
        os.truncate(path, left)
        header.position = 33  # of the type of "t"
        with pytest.raises(
            GGUFError, match=rf"at byte {max(33, left)}: .*it could not be read: the file became shorter"
        ):
            header.value("it")


# Split models.


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


# What is touched, and how fast.


def resident_pages(mapping: FileMapping) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """By page of the file: whether the page cache holds it (mincore(2))."""
    count = -(-mapping.nbytes // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(mapping.address), ctypes.c_size_t(mapping.nbytes), flags):
        raise OSError(ctypes.get_errno(), "mincore")
    return np.frombuffer(flags, dtype=np.uint8) & 1 == 1


def test_no_weight_page_is_mapped_or_read(tmp_path: Path) -> None:
    """Indexing maps nothing at all, and reads from the disk only the header and the rest of the last read of it.

    The last read does not know where the header ends, so up to LAST_READ_NBYTES of what follows come into the page
    cache (not into the process). Beyond that nothing is read, for which POSIX_FADV_RANDOM is needed: the kernel would
    read ahead.
    """
    path = tmp_path / "big.gguf"
    nbytes = 64 << 20
    write_gguf(path, {"w": ("F32", (nbytes // 4,), os.urandom(1 << 20) * 64)}, metadata={"t": ["token"] * 100_000})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with FileMapping.open(path) as mapping:
        if resident_pages(mapping).mean() > 0.01:
            pytest.skip("this file system keeps pages in spite of POSIX_FADV_DONTNEED (tmpfs, overlay)")
    before = Path("/proc/self/maps").read_text()
    index = GGUFIndex.read(path)
    assert str(path) not in before + Path("/proc/self/maps").read_text()
    with FileMapping.open(path) as mapping:
        pages = resident_pages(mapping)
        smaps = Path("/proc/self/smaps").read_text().split(str(path))[1].splitlines()
    assert next(line.split() for line in smaps if line.startswith("Rss:"))[1:] == ["0", "kB"]
    beyond = (index.tensors["w"].offset + LAST_READ_NBYTES) // mmap.PAGESIZE + 1
    assert not pages[beyond:].any()


def test_sparse_weights_of_a_terabyte_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    write_gguf(path, {"w": ("F32", (8,), b"")}, dimensions={"w": (1 << 37,)})
    os.truncate(path, path.stat().st_size + (1 << 39))
    started = time.perf_counter()
    assert GGUFIndex.read(path).tensors["w"].nbytes == 1 << 39
    assert time.perf_counter() - started < 1


def test_gemma(gemma_path: Path) -> None:
    index = GGUFIndex.read(gemma_path)
    assert (index.version, index.alignment, len(index.tensors)) == (3, 32, 236)
    by_type: dict[str, int] = {}
    for tensor in index.tensors.values():
        by_type[tensor.type] = by_type.get(tensor.type, 0) + 1
        assert tensor.offset % 32 == 0
    assert by_type == {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}
    assert index.tensors["token_embd.weight"].shape == (262_144, 640)
    assert max(tensor.offset + tensor.nbytes for tensor in index.tensors.values()) == gemma_path.stat().st_size
    tokens = index.metadata["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[:4]) == (262_144, ["<pad>", "<eos>", "<bos>", "<unk>"])
    assert index.metadata["tokenizer.ggml.scores"].shape == (262_144,)
    assert index.metadata["general.architecture"] == "gemma3"


def test_gemma_is_indexed_in_milliseconds(gemma_path: Path) -> None:
    """8 ms on two slow cores; benchmarks/bench_open.py has the figures. The bound leaves room for a busy machine."""
    times = []
    for _ in range(8):
        started = time.perf_counter()
        GGUFIndex.read(gemma_path)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.030


def test_random_blocks_are_finite_in_every_format(rng: np.random.Generator) -> None:
    for extreme in (False, True):
        for name, form in FORMATS.items():
            data = random_blocks(name, (4, 4 * form.values), rng, extreme)
            assert len(data) == gguf_files.nbytes_of(name, (4, 4 * form.values))
            rows = np.frombuffer(data, dtype=np.uint8).reshape(4, -1)
            with np.errstate(all="ignore"):
                assert np.isfinite(gguf.quants.dequantize(rows.copy(), GGMLQuantizationType[name])).all()
