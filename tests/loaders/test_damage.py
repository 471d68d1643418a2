"""Damaged headers: each is refused, and the message names the place and the numbers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import gguf_reference
import pytest
from gguf_files import F32_ROW, Array, Value, write_gguf

from qmm.errors import GGUFError
from qmm.loaders import GGUFIndex
from qmm.loaders.files import OpenFile
from qmm.loaders.gguf.header import (
    HeaderReader,
)

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
