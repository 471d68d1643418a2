"""Every format as plain Python: the bits against gguf's dequantization, and against blocks written by hand.

The tests walk the table FORMATS, so that a new format meets them all without being named here; the one thing to write
for it is a block by hand.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from types import FunctionType
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import random_blocks

from qmm.errors import EmulatorError
from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.lang.fields import load2, load16
from qmm.kernels.lang.primitives import run_weights

each_format = pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)


def decode(block_format: Format, data: bytes) -> np.ndarray:
    """The weights of whole blocks, by the format's own functions."""
    blocks = [
        data[start : start + block_format.block_nbytes] for start in range(0, len(data), block_format.block_nbytes)
    ]
    weights = np.full((len(blocks), block_format.block_weights // 16, 16), np.float32(12345))
    with np.errstate(all="ignore"):
        for index, block in enumerate(blocks):
            for lane in range(block_format.lanes):
                runs = block_format.unpack(lane, *block_format.load(block, lane))
                assert len(runs) == block_format.runs
                for i, (q, scale, minimum) in enumerate(runs):
                    weights[index, block_format.position(lane, i)] = run_weights(q, scale, minimum)
    return weights.reshape(-1)


def oracle(block_format: Format, data: bytes) -> np.ndarray:
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType[block_format.name]
        return gguf.quants.dequantize(np.frombuffer(data, np.uint8), kind).reshape(-1)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, zeros' signs included; a NaN is a NaN, for which one is the compiler's choice."""
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@each_format
@pytest.mark.parametrize("extreme", [False, True], ids=["ordinary", "extreme"])
def test_weights_are_gguf_s_bit_for_bit(block_format: Format, extreme: bool, rng: np.random.Generator) -> None:
    data = random_blocks(block_format.name, (40, block_format.block_weights), rng, extreme)
    assert_same_bits(decode(block_format, data), oracle(block_format, data))


@each_format
def test_any_bytes_are_decoded_as_gguf_does(block_format: Format, rng: np.random.Generator) -> None:
    data = rng.bytes(60 * block_format.block_nbytes)  # scales that are NaN or infinite among them
    assert_same_bits(decode(block_format, data), oracle(block_format, data))


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


@each_format
def test_sizes_are_ggml_s(block_format: Format) -> None:
    weights, nbytes = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block_format.name]]
    scale = 16 if block_format.plain else 1  # a plain format's block is 16 of its numbers
    assert (block_format.block_weights, block_format.block_nbytes) == (weights * scale, nbytes * scale)


@each_format
def test_lanes_make_each_run_of_a_block_once(block_format: Format) -> None:
    places = [block_format.position(lane, i) for lane in range(block_format.lanes) for i in range(block_format.runs)]
    assert sorted(places) == list(range(block_format.block_weights // 16))


@each_format
def test_lanes_are_a_power_of_two(block_format: Format) -> None:
    assert (
        block_format.lanes & (block_format.lanes - 1) == 0
    )  # kernels/ops/matvec/kernel.py finds a unit's lane by a mask


@each_format
def test_loads_stay_in_the_block_and_miss_no_byte(block_format: Format, rng: np.random.Generator) -> None:
    block = rng.bytes(block_format.block_nbytes)
    read = set()
    for lane in range(block_format.lanes):
        block_format.load(block, lane)  # NumPy refuses to look beyond the 'bytes'
        for offset, nbytes in loads_of(block_format, lane):
            assert offset >= 0
            assert offset + nbytes <= block_format.block_nbytes
            read |= set(range(offset, offset + nbytes))
    assert read == set(range(block_format.block_nbytes))


@each_format
def test_loads_keep_to_the_alignment(block_format: Format) -> None:
    assert block_format.alignment in (1, 2, 4, 8, 16)
    assert block_format.block_nbytes % block_format.alignment == 0  # the next block is no worse off
    for lane in range(block_format.lanes):
        for offset, nbytes in loads_of(block_format, lane):
            assert offset % min(nbytes, block_format.alignment) == 0, f"lane {lane} reads {nbytes} bytes at {offset}"


@each_format
def test_formats_check_themselves(block_format: Format) -> None:
    block_format.check()


def changed(name: str, **fields: Any) -> Format:
    return dataclasses.replace(FORMATS[name], **fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Q4_K", {"lanes": 3, "block_weights": 48 * FORMATS["Q4_K"].runs}, "lanes must be a power of two, not 3"),
        ("Q8_0", {"lanes": 0, "block_weights": 0}, "block_weights must be at least 1, not 0"),
        ("Q8_0", {"lanes": 0}, "lanes must be at least 1, not 0"),
        ("Q8_0", {"lanes": -1, "runs": -2}, "lanes must be at least 1, not -1"),
        ("Q8_0", {"runs": 0}, "runs must be at least 1, not 0"),
        ("Q8_0", {"block_nbytes": 0}, "block_nbytes must be at least 1, not 0"),
        ("Q8_0", {"alignment": 0}, "alignment must be at least 1, not 0"),
        ("Q8_0", {"alignment": 3, "block_nbytes": 36}, "alignment must be a power of two, not 3"),
        ("F16", {"block_weights": 32, "runs": 2}, "block_weights of a plain format must be 16, not 32"),
        ("Q8_0", {"short": True}, "short is for plain formats"),
        ("F32", {"pairs": True}, "runs must be even for pairs of them, not 1"),
        ("F32", {"run_minima": True}, "pairs is False"),
    ],
)
def test_a_geometry_that_kernels_cannot_have_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        changed(name, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"load": lambda block, lane: (load2(block, 0), load16(block, 2), load16(block, 20))},
            "2 bytes past the end of a",
        ),
        ({"load": lambda block, lane: (load2(block, -2), load16(block, 2), load16(block, 18))}, "2 bytes before"),
        ({"load": lambda block, lane: (load2(block, 0), load16(block, 1), load16(block, 18))}, "multiple of 2"),
        ({"unpack": lambda lane, *registers: ()}, "unpack of lane 0 gives 0 runs, not 2"),
        ({"unpack_product": lambda lane, *registers: (1,)}, "unpack_product of lane 0 gives 1 runs, not 2"),
        ({"position": lambda lane, i: i + 1}, r"each of 0 to 1 once, but gives \[1, 2\]"),
        ({"position": lambda lane, i: 0}, r"gives \[0, 0\]"),
        ({"position": lambda lane, i: 1 - i}, "a pair 1 and 0"),
    ],
)
def test_functions_that_break_their_promises_are_noticed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, EmulatorError), match=f"Q8_0.*{message}|{message} .*Q8_0"):
        changed("Q8_0", **{"pairs": True, **fields}).check()


@each_format
def test_runs_are_signed_bytes_and_minima_only_where_promised(block_format: Format, rng: np.random.Generator) -> None:
    data = random_blocks(block_format.name, (1, block_format.block_weights), rng)
    for lane in range(block_format.lanes):
        for q, _, minimum in block_format.unpack(lane, *block_format.load(data, lane)):
            assert q.dtype == (np.float32 if block_format.plain else np.uint32)
            assert q.nbytes == (64 if block_format.plain else 16)
            assert block_format.has_minimum or minimum == 0


@each_format
def test_the_tensor_cores_of_matvec_are_exact(block_format: Format, rng: np.random.Generator) -> None:
    bias = 12582912.0  # what dot_pair adds, and matvec takes away as scale * bias
    data = rng.bytes(100 * block_format.block_nbytes)
    for start in range(0, len(data), block_format.block_nbytes):
        block = data[start : start + block_format.block_nbytes]
        for lane in range(block_format.lanes):
            with np.errstate(all="ignore"):
                runs = block_format.unpack(lane, *block_format.load(block, lane))
            for q, scale, _ in runs:
                if block_format.short:
                    mantissas, _ = np.frexp(q[np.isfinite(q)])
                    assert (np.float64(mantissas) * 2**11 % 1 == 0).all()
                elif not block_format.plain and np.isfinite(scale):
                    assert float(np.float32(scale) * np.float32(bias)) == float(scale) * bias


def spaced(*places: tuple[int, ...]) -> Format:
    """A format whose lanes take the runs at these places."""
    fields = {**vars(FORMATS["Q8_0"]), "lanes": len(places), "runs": len(places[0]), "pairs": False}
    weights = 16 * len(places) * len(places[0])
    return Format(**{**fields, "block_weights": weights, "position": lambda lane, i: places[lane][i]})


@pytest.mark.parametrize(
    ("places", "step"),
    [
        ([(0, 2), (1, 3)], 2),
        ([(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)], 4),
        ([(0, 1), (2, 3)], 0),  # both halves of a scale block
        ([(0, 2, 4, 6), (1, 3, 7, 5)], 0),  # not the same throughout
        ([(0, 2), (1, 3), (4, 7), (5, 6)], 0),
        ([(0,), (1,)], 0),
    ],
)
def test_a_run_step_is_one_even_number_for_the_whole_block(places: list[tuple[int, ...]], step: int) -> None:
    assert spaced(*places).run_step() == step


def test_a_step_of_pairs() -> None:
    assert spaced((0, 1, 2, 3), (4, 5, 6, 7)).run_step(2) == 2
    assert spaced((0, 1, 4, 5), (2, 3, 6, 7)).run_step(2) == 4
    assert spaced((0, 1), (2, 3)).run_step(2) == 0  # one pair has no step


@each_format
def test_runs_are_where_the_run_step_says(block_format: Format) -> None:
    for at_once in (1, 2) if block_format.pairs else (1,):
        step = block_format.run_step(at_once)
        assert step % 2 == 0
        for lane in range(block_format.lanes if step else 0):
            first, *others = (block_format.position(lane, i) for i in range(0, block_format.runs, at_once))
            assert others == [first + step * i for i in range(1, block_format.runs // at_once)]


@each_format
def test_pairs_of_runs_are_neighbours_of_one_scale(block_format: Format, rng: np.random.Generator) -> None:
    data = random_blocks(block_format.name, (20, block_format.block_weights), rng)
    unpack = block_format.constants(product=True).unpack
    scales, minima = [], []
    for start in range(0, len(data), block_format.block_nbytes):
        block = data[start : start + block_format.block_nbytes]
        for lane in range(block_format.lanes):
            runs = unpack(lane, *block_format.load(block, lane))
            for i in range(0, block_format.runs - 1, 2):
                (_, scale, minimum), (_, of_next, minimum_of_next) = runs[i], runs[i + 1]
                places = [block_format.position(lane, j) for j in (i, i + 1)]
                scales.append(scale == of_next and places[0] % 2 == 0 and places[1] == places[0] + 1)
                minima.append(minimum == minimum_of_next)
    assert block_format.pairs == (len(scales) > 0 and all(scales))
    assert block_format.run_minima == (block_format.pairs and not all(minima))


@each_format
def test_products_unpack_the_same_weights(block_format: Format, rng: np.random.Generator) -> None:
    data = random_blocks(block_format.name, (20, block_format.block_weights), rng)
    unpack = block_format.constants(product=True).unpack
    for start in range(0, len(data), block_format.block_nbytes):
        block = data[start : start + block_format.block_nbytes]
        for lane in range(block_format.lanes):
            loaded = block_format.load(block, lane)
            for run, of_product in zip(block_format.unpack(lane, *loaded), unpack(lane, *loaded), strict=True):
                np.testing.assert_array_equal(run_weights(*of_product), run_weights(*run))  # -0.0 is 0.0 here


@each_format
def test_rows_are_whole_blocks_or_plain(block_format: Format) -> None:
    weights, nbytes = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block_format.name]]
    assert block_format.row_nbytes(3 * weights) == 3 * nbytes
    assert block_format.blocks(3 * block_format.block_weights) == 3
    assert block_format.blocks(3 * block_format.block_weights + 1) == 4
    if not block_format.plain:
        with pytest.raises(ValueError, match=f"{weights} weights, not {weights + 16}"):
            block_format.row_nbytes(weights + 16)


def loads_of(block_format: Format, lane: int) -> list[tuple[int, int]]:
    """What a lane loads: offset and bytes of each load, by the format's own ``load`` over recording primitives."""
    recorded = []

    def recorder(nbytes: int) -> Callable[[Any, int], int]:
        def load(block: Any, offset: int) -> int:
            recorded.append((offset, nbytes))
            return 0

        return load

    primitives = {f"load{nbytes}": recorder(nbytes) for nbytes in (1, 2, 4, 16)}
    assert isinstance(block_format.load, FunctionType)
    FunctionType(block_format.load.__code__, {**block_format.load.__globals__, **primitives})(None, lane)
    return recorded


# ---------------------------------------------------------------------------------------------------------------------
# Blocks written by hand: fields as ggml-common.h has them, and the weights that they mean
# ---------------------------------------------------------------------------------------------------------------------

# One bit pattern each of: zero, minus zero, one, a fraction, the largest, the smallest normal and subnormal, infinity.
HALVES = [0x0000, 0x8000, 0x3C00, 0xB555, 0x7BFF, 0x0400, 0x0001, 0x7C00] * 2
HALF_VALUES = [0.0, -0.0, 1.0, -1365 / 4096, 65504.0, 2.0**-14, 2.0**-24, float("inf")] * 2
BFLOATS = [0x0000, 0x8000, 0x3F80, 0xBEAB, 0x7F7F, 0x0080, 0x0001, 0xFF80] * 2
BFLOAT_VALUES = [0.0, -0.0, 1.0, -171 / 512, 255 * 2.0**120, 2.0**-126, 2.0**-133, -float("inf")] * 2


def q8_0() -> tuple[bytes, list[float]]:
    d = struct.pack("<e", -0.25)
    qs = bytes([0x80, 0x81, 0xFF, 0x00, 0x01, 0x7F]) + bytes(range(10, 36))
    return d + qs, [-0.25 * q for q in (-128, -127, -1, 0, 1, 127, *range(10, 36))]


def q4_0() -> tuple[bytes, list[float]]:
    d = struct.pack("<e", 0.5)
    qs = bytes([0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F])
    return d + qs, [0.5 * (q - 8) for q in (*range(16), *reversed(range(16)))]


def q4_1() -> tuple[bytes, list[float]]:
    d, m = struct.pack("<e", 1.5), struct.pack("<e", -3.0)
    qs = bytes([0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F])
    return d + m + qs, [1.5 * q - 3.0 for q in (*range(16), *reversed(range(16)))]


# The fifth bit is set for weights 0, 9, 15, 16, 30: 0x40018201.
FIFTH = struct.pack("<I", 0x40018201)
FIVE_BITS = [19, 3, 3, 3, 3, 3, 3, 3, 3, 19, 3, 3, 3, 3, 3, 19, 28, *[12] * 13, 28, 12]


def q5_0() -> tuple[bytes, list[float]]:
    return struct.pack("<e", 0.125) + FIFTH + bytes([0xC3] * 16), [0.125 * (q - 16) for q in FIVE_BITS]


def q5_1() -> tuple[bytes, list[float]]:
    block = struct.pack("<ee", -2.0, 7.0) + FIFTH + bytes([0xC3] * 16)
    return block, [-2.0 * q + 7.0 for q in FIVE_BITS]


def q2_k() -> tuple[bytes, list[float]]:
    # Run i has the scale i (low nibble) and the minimum 15 - i (high nibble).
    scales = bytes([0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87, 0x78, 0x69, 0x5A, 0x4B, 0x3C, 0x2D, 0x1E, 0x0F])
    # First half: 0b11100100 holds 0 for weights 0-31, 1 for 32-63, 2 for 64-95, 3 for 96-127. Second: the reverse, but
    # its last byte 0b01010101.
    qs = bytes([0xE4] * 32 + [0x1B] * 31 + [0x55])
    q = [n // 32 for n in range(128)] + [3 - n // 32 for n in range(128)]
    for n in (159, 191, 223, 255):
        q[n] = 1
    block = scales + qs + struct.pack("<ee", 1.5, 0.5)
    return block, [1.5 * (n // 16) * q[n] - 0.5 * (15 - n // 16) for n in range(256)]


def q3_k() -> tuple[bytes, list[float]]:
    # Bit j of a byte of hmask is weight 32 j + byte's third bit: set for 64-95 and 224-255 (0x84), for byte 0 for none.
    hmask = bytes([0x00] + [0x84] * 31)
    qs = bytes([0xE4] * 32 + [0x1B] * 32)  # as in q2_k
    low = [n // 32 for n in range(128)] + [3 - n // 32 for n in range(128)]
    q = [low[n] - (0 if n // 32 in (2, 7) and n % 32 != 0 else 4) for n in range(256)]
    six_bits = [11, 48, 21, 58, 31, 4, 41, 14, 51, 24, 61, 34, 7, 44, 17, 54]
    # In hexadecimal 0B 30 15 3A 1F 04 29 0E, 33 18 3D 22 07 2C 11 36: eight bytes of low digits, the first eight
    # scales' in the low nibbles; then four of high digits, two bits each, those of scales 0, 4, 8, 12 in the first.
    scales = bytes([0x3B, 0x80, 0xD5, 0x2A, 0x7F, 0xC4, 0x19, 0x6E, 0b00110100, 0b10010011, 0b01111001, 0b11100011])
    block = hmask + qs + scales + struct.pack("<e", -0.5)
    return block, [-0.5 * (six_bits[n // 16] - 32) * q[n] for n in range(256)]


# Scales 0-3 and minima 0-3 are whole in the low six bits of bytes 0-7. Of 4-7, in hexadecimal 09 1A 2B 3C and
# 37 26 15 04, the low digits share bytes 8-11 and the high ones are the top two bits of bytes 0-7.
SCALES = [0x01, 0x12, 0x23, 0x34, 0x09, 0x1A, 0x2B, 0x3C]
MINIMA = [0x3F, 0x2E, 0x1D, 0x0C, 0x37, 0x26, 0x15, 0x04]
PACKED_SCALES = bytes([0x01, 0x52, 0xA3, 0xF4, 0xFF, 0xAE, 0x5D, 0x0C, 0x79, 0x6A, 0x5B, 0x4C])
# 32 bytes hold 32 weights in their low nibbles and the next 32 in their high ones.
NIBBLES = bytes([0x10] * 32 + [0x32] * 32 + [0x54] * 32 + [0x76] * 16 + [0xFE] * 16)
FOUR_BITS = [n // 32 for n in range(192)] + [6] * 16 + [14] * 16 + [7] * 16 + [15] * 16


def q4_k() -> tuple[bytes, list[float]]:
    block = struct.pack("<ee", 0.5, -0.25) + PACKED_SCALES + NIBBLES
    return block, [0.5 * SCALES[n // 32] * FOUR_BITS[n] + 0.25 * MINIMA[n // 32] for n in range(256)]


def q5_k() -> tuple[bytes, list[float]]:
    # Byte l of qh holds the fifth bit of weights l, 32 + l, ..., 224 + l: 0x81 for the first and the last 32; byte 5
    # for weights 37 and 197 instead.
    qh = bytes([0x81] * 5 + [0x42] + [0x81] * 26)
    fifth = [n // 32 in ((1, 6) if n % 32 == 5 else (0, 7)) for n in range(256)]
    block = struct.pack("<ee", 0.5, -0.25) + PACKED_SCALES + qh + NIBBLES
    return block, [0.5 * SCALES[n // 32] * (FOUR_BITS[n] + 16 * fifth[n]) + 0.25 * MINIMA[n // 32] for n in range(256)]


def q6_k() -> tuple[bytes, list[float]]:
    # A half of the block has 64 bytes of ql, its weights 0-63 in their low nibbles and 64-127 in the high ones; and 32
    # of qh, with two bits for each of the weights l, 32 + l, 64 + l, 96 + l.
    ql = bytes([0x21] * 32 + [0x43] * 32 + [0x65] * 32 + [0x87] * 32)
    low = [1] * 32 + [3] * 32 + [2] * 32 + [4] * 32 + [5] * 32 + [7] * 32 + [6] * 32 + [8] * 32
    qh = bytes([0b11100100] * 32 + [0b00011011] * 31 + [0b10101010])
    high = [n // 32 for n in range(128)] + [3 - n // 32 for n in range(128)]
    for n in (159, 191, 223, 255):
        high[n] = 2
    scales = [-128, 127, -1, 0, 1, 2, 3, 5, -7, 11, -13, 17, -19, 23, -29, 31]
    block = ql + qh + struct.pack("<16b", *scales) + struct.pack("<e", 0.25)
    return block, [0.25 * scales[n // 16] * (low[n] + 16 * high[n] - 32) for n in range(256)]


HAND_MADE: dict[str, Callable[[], tuple[bytes, list[float]]]] = {
    "F32": lambda: (struct.pack("<16f", *range(-8, 8)), [float(value) for value in range(-8, 8)]),
    "F16": lambda: (struct.pack("<16H", *HALVES), HALF_VALUES),
    "BF16": lambda: (struct.pack("<16H", *BFLOATS), BFLOAT_VALUES),
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


def test_every_format_has_a_block_by_hand() -> None:
    assert set(HAND_MADE) == set(FORMATS)


@each_format
def test_a_block_by_hand_means_what_it_says(block_format: Format) -> None:
    block, expected = HAND_MADE[block_format.name]()
    assert len(block) == block_format.block_nbytes
    assert len(expected) == block_format.block_weights
    weights = np.array(expected, np.float32)
    np.testing.assert_array_equal(weights, np.array(expected))  # float32 holds what was computed by hand
    np.testing.assert_array_equal(decode(block_format, block), weights)
    np.testing.assert_array_equal(oracle(block_format, block), weights)
