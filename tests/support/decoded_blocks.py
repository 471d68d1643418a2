"""The weights of blocks, by the format's own functions and by gguf's, and how the two are compared."""

from __future__ import annotations

import gguf
import numpy as np

from qmm.kernels.formats import Format
from qmm.kernels.lang.primitives import run_weights

__all__ = ["assert_same_bits", "decode", "oracle"]


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
    """The weights of whole blocks, as gguf has them."""
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType[block_format.name]
        return gguf.quants.dequantize(np.frombuffer(data, np.uint8), kind).reshape(-1)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, zeros' signs included; a NaN is a NaN, for which one is the compiler's choice."""
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))
