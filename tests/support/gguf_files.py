"""GGUF files for tests: written byte by byte, whole or damaged, full of random blocks.

Nothing here uses qmm or gguf's writer, so that a mistake of theirs cannot hide. Layout: ggml ``docs/gguf.md``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "F32_ROW",
    "FORMATS",
    "Array",
    "BlockFormat",
    "Value",
    "nbytes_of",
    "random_blocks",
    "small_blocks",
    "write_gguf",
]


F32_ROW = ("F32", (1, 8), bytes(32))
"""The smallest tensor that test files have."""


class BlockFormat(NamedTuple):
    """A ggml type: its number, values and bytes of a block, and byte offsets of the float16 fields in a block."""

    number: int
    values: int
    nbytes: int
    halves: tuple[int, ...] = ()


# Numbers, sizes and fields from ggml.h and ggml-common.h; tests/loaders/test_index.py compares numbers and sizes with
# gguf.constants.
FORMATS: dict[str, BlockFormat] = {
    "F32": BlockFormat(0, 1, 4),
    "F16": BlockFormat(1, 1, 2, (0,)),
    "BF16": BlockFormat(30, 1, 2),
    "Q4_0": BlockFormat(2, 32, 18, (0,)),  # d
    "Q4_1": BlockFormat(3, 32, 20, (0, 2)),  # d, m
    "Q5_0": BlockFormat(6, 32, 22, (0,)),  # d
    "Q5_1": BlockFormat(7, 32, 24, (0, 2)),  # d, m
    "Q8_0": BlockFormat(8, 32, 34, (0,)),  # d
    "Q2_K": BlockFormat(10, 256, 84, (80, 82)),  # d, dmin
    "Q3_K": BlockFormat(11, 256, 110, (108,)),  # d
    "Q4_K": BlockFormat(12, 256, 144, (0, 2)),  # d, dmin
    "Q5_K": BlockFormat(13, 256, 176, (0, 2)),  # d, dmin
    "Q6_K": BlockFormat(14, 256, 210, (208,)),  # d
}

# As bits: both zeros, the smallest and largest subnormals, the smallest normal, one, and the largest finite, each sign.
EXTREME_HALVES = np.array(
    [sign | bits for sign in (0x0000, 0x8000) for bits in (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF)],
    dtype=np.uint16,
)


def nbytes_of(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of row-major ``shape``; its last dimension must be whole blocks."""
    form = FORMATS[type_name]
    if shape[-1] % form.values:
        raise ValueError(f"k = {shape[-1]} is no multiple of the {form.values} values in a block of {type_name}")
    return math.prod(shape) // form.values * form.nbytes


def random_blocks(type_name: str, shape: Sequence[int], rng: np.random.Generator, extreme: bool = False) -> bytes:
    """Random valid blocks of a tensor of row-major ``shape``: every bit random but those of floating-point fields.

    float16 fields are +-[2^-7, 2^-5), so that dot products of any length stay far from overflow; BF16 and F32 values
    are standard normal. With ``extreme`` they are zeros, subnormals, ones and the largest finite values of either sign,
    never NaN or infinite.
    """
    form = FORMATS[type_name]
    nbytes = nbytes_of(type_name, shape)
    count = nbytes // form.nbytes
    if type_name in ("F32", "BF16"):
        if extreme:  # a float32 of these bits, and the bfloat16 that is its upper half, are finite
            values = EXTREME_FLOATS[rng.integers(0, len(EXTREME_FLOATS), count)]
        else:
            values = rng.standard_normal(count, dtype=np.float32).view(np.uint32)
        return values.tobytes() if type_name == "F32" else (values >> 16).astype(np.uint16).tobytes()
    blocks = np.frombuffer(rng.bytes(nbytes), dtype=np.uint8).reshape(count, form.nbytes).copy()
    for offset in form.halves:
        if extreme:
            halves = EXTREME_HALVES[rng.integers(0, len(EXTREME_HALVES), count)]
        else:
            bits = rng.integers(0, 0x10000, count, dtype=np.uint16)
            exponent = np.uint16(8) + (bits >> 10 & 1)  # 2^(8 - 15) or 2^(9 - 15); sign and fraction stay random
            halves = bits & np.uint16(0x83FF) | exponent << 10
        blocks[:, offset : offset + 2] = halves.astype("<u2").view(np.uint8).reshape(count, 2)
    return blocks.tobytes()


def small_blocks(type_name: str, shape: Sequence[int], rng: np.random.Generator) -> bytes:
    """Random blocks whose weights are so small that their products with the largest float32 are finite."""
    form = FORMATS[type_name]
    blocks = np.frombuffer(random_blocks(type_name, shape, rng), np.uint8).reshape(-1, form.nbytes).copy()
    if type_name in ("F32", "BF16"):
        item = blocks.view(np.uint32 if type_name == "F32" else np.uint16)
        item -= item.dtype.type(10 << (23 if type_name == "F32" else 7))  # 2^-10 of the standard normal values
    for offset in form.halves:
        fields = blocks[:, offset : offset + 2].copy().view(np.float16) * np.float16(
            2**-8 if form.values < 256 else 2**-14
        )
        blocks[:, offset : offset + 2] = fields.view(np.uint8)
    return blocks.tobytes()


# As EXTREME_HALVES, for float32; the upper halves are the same extremes of bfloat16.
EXTREME_FLOATS = np.array(
    [
        sign | bits
        for sign in (0x00000000, 0x80000000)
        for bits in (0x00000000, 0x00010000, 0x007F0000, 0x00800000, 0x3F800000, 0x7F7F0000)
    ],
    dtype=np.uint32,
)

# name in gguf.md: number, struct code
SCALAR_TYPES = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "B"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Value:
    """A metadata value of the type that is named, such as ``Value("uint16", 3)``."""

    type: str
    value: Any


@dataclass(frozen=True)
class Array:
    """A metadata array: ``Array("string", ["a", b"\\xff"])``, ``Array("array", [Array("int8", [1]), ...])``.

    ``count`` is what the file claims instead of the length of ``items``.
    """

    item: str
    items: Sequence[Any]
    count: int | None = None


def write_gguf(
    path: str | Path,
    tensors: Mapping[str, tuple[str | int, Sequence[int], bytes]],
    *,
    metadata: Mapping[str, Any] | None = None,
    alignment: int = 32,
    version: int = 3,
    endian: str = "<",
    magic: bytes = b"GGUF",
    filler: int = 0xFF,
    tensor_count: int | None = None,
    key_count: int | None = None,
    dimensions: Mapping[str, Sequence[int]] | None = None,
    offsets: Mapping[str, int] | None = None,
    write_alignment: bool | None = None,
) -> dict[str, int]:
    """Write a GGUF file that ends with the last byte of its last tensor.

    Args:
        tensors: By name: ggml's type name (or a number), row-major shape, and the bytes, which are not checked.
        metadata: int, float, bool and str are stored as int32, float32, bool and string; list of str as an array;
            Value and Array as they say.
        alignment: Of tensor data; written as ``general.alignment`` unless it is 32, or as ``write_alignment`` says.
        filler: The byte between tensors: what a kernel reads that reads too far.
        tensor_count, key_count: What the header claims instead of the truth.
        dimensions: By tensor: ``ne`` (fastest first) to claim instead of the shape's.
        offsets: By tensor: the offset to claim (from the start of the data) instead of the true one.

    Returns:
        By tensor: where its first byte is in the file.
    """
    keys = dict(metadata or {})
    if alignment != 32 if write_alignment is None else write_alignment:
        keys.setdefault("general.alignment", Value("uint32", alignment))

    header = bytearray(magic)
    header += struct.pack(
        f"{endian}IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    for key, value in keys.items():
        header += _text(key, endian) + _typed(value, endian)
    relative = 0
    places: dict[str, int] = {}
    for name, (kind, shape, data) in tensors.items():
        relative += -relative % alignment
        places[name] = relative
        ne = (dimensions or {}).get(name, tuple(shape)[::-1])
        number = FORMATS[kind].number if isinstance(kind, str) else kind
        offset = (offsets or {}).get(name, relative)
        header += _text(name, endian) + struct.pack(f"{endian}I{len(ne)}QIQ", len(ne), *ne, number, offset)
        relative += len(data)
    if tensors:
        header += bytes(-len(header) % alignment)
    with open(path, "wb") as file:
        file.write(header)
        position = 0
        for name, (_, _, data) in tensors.items():
            file.write(bytes([filler]) * (places[name] - position))
            file.write(data)
            position = places[name] + len(data)
    return {name: len(header) + place for name, place in places.items()}


def _text(text: str | bytes, endian: str) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack(f"{endian}Q", len(data)) + data


def _typed(value: Any, endian: str) -> bytes:
    """A value with its type before it."""
    if isinstance(value, bool):
        value = Value("bool", value)
    elif isinstance(value, int):
        value = Value("int32", value)
    elif isinstance(value, float):
        value = Value("float32", value)
    elif isinstance(value, list):
        value = Array("string", value)
    if isinstance(value, Value):
        number, code = SCALAR_TYPES[value.type]
        return struct.pack(f"{endian}I{code}", number, value.value)
    if isinstance(value, Array):
        return struct.pack(f"{endian}I", ARRAY) + _array(value, endian)
    return struct.pack(f"{endian}I", STRING) + _text(value, endian)


def _array(array: Array, endian: str) -> bytes:
    number = {"string": STRING, "array": ARRAY}.get(array.item) or SCALAR_TYPES.get(array.item, (99,))[0]
    head = struct.pack(f"{endian}IQ", number, len(array.items) if array.count is None else array.count)
    if array.item == "string":
        return head + b"".join(_text(item, endian) for item in array.items)
    if array.item == "array":
        return head + b"".join(_array(item, endian) for item in array.items)
    if array.item not in SCALAR_TYPES:
        return head + bytes(array.items)
    return head + struct.pack(f"{endian}{len(array.items)}{SCALAR_TYPES[array.item][1]}", *array.items)
