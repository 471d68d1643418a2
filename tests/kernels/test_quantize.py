"""Where activations lie once they are quantized: the order of scale blocks, as plain Python."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.ops.layout import BLOCK, scale_blocks_of
from qmm.kernels.ops.quantize.kernel import place_of

each_format = pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)


def spread_of(block_format: Format) -> int:
    """Scale blocks of a weight block; two blocks of a plain format share one."""
    return max(1, block_format.block_weights // BLOCK)


@pytest.mark.parametrize("spread", [1, 2, 4, 8])
@pytest.mark.parametrize("quads", [1, 2, 5])
def test_four_weight_blocks_alternate(spread: int, quads: int) -> None:
    # Activations' own words: weight block 4 g + t of s scale blocks has the j-th of them at (g * s + j) * 4 + t.
    described = {
        (4 * g + t) * spread + j: (g * spread + j) * 4 + t
        for g in range(quads)
        for t in range(4)
        for j in range(spread)
    }
    assert {block: place_of(block, spread) for block in range(4 * quads * spread)} == described


def test_an_example_by_hand() -> None:
    # Q4_K, five weight blocks of eight scale blocks. The second weight block's first two, the fifth's first two:
    assert [place_of(block, 8) for block in (8, 9, 32, 33)] == [1, 5, 32, 36]


@each_format
@pytest.mark.parametrize("blocks", [1, 3, 4, 7, 112])
def test_every_scale_block_has_a_place_of_its_own(block_format: Format, blocks: int) -> None:
    count = scale_blocks_of(block_format, blocks * block_format.block_weights)
    assert sorted(place_of(block, spread_of(block_format)) for block in range(count)) == list(range(count))


@each_format
def test_the_product_looks_where_the_quantization_put_it(block_format: Format) -> None:
    spread, quad_scale_blocks = spread_of(block_format), block_format.block_weights // 8
    for block in range(12):
        group, quad = divmod(block, 4)
        here = group * quad_scale_blocks
        for part in range(block_format.lanes):
            first = block_format.position(part, 0)
            for at_once, i in itertools.product((1, 2), range(block_format.runs)):
                if at_once == 2 and (i % 2 or not block_format.pairs):
                    continue
                step = block_format.run_step(at_once)
                run = block * (block_format.block_weights // 16) + block_format.position(part, i)
                # As multiply() reckons it, in its three ways: by a step from run to run, for each run, two in one.
                if step:
                    found = here + 4 * (first >> 1) + quad + 2 * step * (i // at_once), first & 1
                elif block_format.block_weights > 16:
                    position = block_format.position(part, i)
                    found = here + 4 * (position >> 1) + quad, position & 1
                else:
                    found = here + (quad >> 1), quad & 1
                assert found == (place_of(run // 2, spread), run % 2), (block, part, i)


def test_a_quad_of_lanes_reads_neighbours() -> None:
    for name in ("Q2_K", "Q4_K", "Q6_K", "Q8_0"):
        spread = spread_of(FORMATS[name])
        places = np.array([[place_of(block * spread + j, spread) for block in range(8)] for j in range(spread)])
        assert (np.diff(places.reshape(spread, 2, 4), axis=-1) == 1).all()
        assert (places.reshape(spread, 2, 4)[..., 0] % 4 == 0).all()
