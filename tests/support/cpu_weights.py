"""Tensors of random blocks, to multiply by on the CPU, and which kernels the usual run compiles for that."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import tiers
from gguf_files import random_blocks

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.ops.cpu import products as cpu

COLUMNS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 33)
FULL = (("Q8_0", "int8"), ("Q4_1", "int8"), ("Q4_K", "int8"), ("Q8_0", "f16"), ("F16", "f16"))
"""Products whose kernels for several columns the usual run compiles: with one partial sum a column and with two, with
minima and without. ``--all`` compiles all."""

each_format = pytest.mark.parametrize("block_format", FORMATS.values(), ids=FORMATS)
each_product = pytest.mark.parametrize(
    ("block_format", "activations"),
    [
        pytest.param(block_format, activations, id=f"{name}-{activations}")
        for name, block_format in FORMATS.items()
        for activations in (("f16",) if block_format.plain else ("int8", "f16"))
    ],
)


def widths_of(block_format: Format) -> tuple[int, ...]:
    """k: one block, a few (odd ones for plain formats), and about three thousand."""
    if block_format.plain:
        return (1, 16, 17, 899, 2880)
    return (block_format.block_weights, 896, 2880) if block_format.block_weights == 32 else (256, 768, 2816)


def columns_for(block_format: Format, activations: str, columns: Sequence[int] = COLUMNS) -> list[int]:
    """Numbers of columns, or 1 where kernels for several are not compiled in this run."""
    full = tiers.every or (block_format.name, activations) in FULL
    return list(columns) if full else [1]


@functools.cache
def compile_product(block_format: Format, activations: str, columns: int) -> None:
    """Compiles the kernel of a product, in a thread.

    This deep in pytest's stack, CPython 3.11 maps and unmaps memory at every other call (a frame that just misses the
    end of a chunk of stack), and compiling takes twice as long.
    """
    k = block_format.block_weights
    data, x, out = np.zeros(k * 4, np.uint8), np.zeros((columns, k), np.float32), np.zeros((columns, 1), np.float32)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(cpu.matmul, block_format, data.ctypes.data, 1, k, x, out, activations).result()


class Weights(NamedTuple):
    """A tensor: its bytes, and its values as gguf has them."""

    block_format: Format
    data: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, block_format: Format, data: bytes, m: int) -> Weights:
        raw = np.frombuffer(data, np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[block_format.name])
        return cls(block_format, raw, values.reshape(m, -1))

    @classmethod
    def random(cls, block_format: Format, m: int, k: int, rng: np.random.Generator, extreme: bool = False) -> Weights:
        return cls.of(block_format, random_blocks(block_format.name, (m, k), rng, extreme), m)

    def matmul(self, x: np.ndarray, activations: str) -> np.ndarray:
        compile_product(self.block_format, activations, min(len(x), cpu.COLUMN_TILE))
        m, k = self.values.shape
        out = np.full((len(x), m), np.nan, np.float32)
        cpu.matmul(self.block_format, self.data.ctypes.data, m, k, x, out, activations)
        return out

    def dequantize(self) -> np.ndarray:
        m, k = self.values.shape
        out = np.full((m, k), np.nan, np.float32)
        cpu.dequantize(self.block_format, self.data.ctypes.data, m, k, out)
        return out

    def activations(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Normal numbers plus a row of the weight, as large: no product is small by chance, even where m is 1."""
        m, k = self.values.shape
        rows = self.values[np.arange(n) % m].astype(np.float64)
        rows *= np.sqrt(k) / np.linalg.norm(rows, axis=1, keepdims=True)
        return (rows + rng.standard_normal((n, k))).astype(np.float32)
