"""Every format as plain Python: its geometry, and the bits against gguf's dequantization.

The tests walk the table FORMATS, so that a new format meets them all without being named here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import FunctionType
from typing import Any

import gguf
import numpy as np
import pytest
from decoded_blocks import assert_same_bits, decode, oracle
from gguf_files import random_blocks

from qmm.errors import EmulatorError
from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.lang.fields import load2, load16
from qmm.kernels.lang.primitives import half, run_weights
from qmm.kernels.lang.tables import table

THREE = table([1, 2, 3])


def changed_runs(run: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """An ``unpack`` that gives ``run(q, scale)`` for each run of Q8_0."""
    return lambda lane, d, *q: tuple(run(part, half(d)) for part in q)


each_format = pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)


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
        ({"unpack": changed_runs(lambda q, scale: (q, scale))}, r"gives \([^)]*\), .*not \(q, scale, minimum\)"),
        ({"unpack": changed_runs(lambda q, scale: (1, scale, 0.0))}, r"gives q as int \(\), not uint32 \(4,\)"),
        ({"unpack": changed_runs(lambda q, scale: (q, scale, scale))}, "but has_minimum is False"),
        ({"position": lambda lane, i: i + 1}, r"each of 0 to 1 once, but gives \[1, 2\]"),
        ({"position": lambda lane, i: 0}, r"gives \[0, 0\]"),
        ({"position": lambda lane, i: 1 - i}, "a pair 1 and 0"),
    ],
)
def test_functions_that_break_their_promises_are_noticed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, EmulatorError), match=f"Q8_0.*{message}|{message} .*Q8_0"):
        changed("Q8_0", **{"pairs": True, **fields}).check()


@pytest.mark.parametrize("width", [4, 8])
def test_an_index_past_the_end_of_a_table_of_rows_is_noticed(width: int) -> None:
    rows = table(np.arange(3 * width).reshape(3, width))
    np.testing.assert_array_equal(rows(*[2] * (16 // width)).view(np.uint8)[:width], np.arange(2 * width, 3 * width))
    with pytest.raises(EmulatorError, match="index 3 into a table of 3 entries"):
        rows(*[2] * (16 // width - 1), 3)


def test_an_index_past_the_end_of_a_table_is_noticed() -> None:
    with pytest.raises(EmulatorError, match=r"index \d+ into a table of 3 entries"):
        changed("Q8_0", unpack=changed_runs(lambda q, scale: (THREE(q), scale, 0.0))).check()


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
