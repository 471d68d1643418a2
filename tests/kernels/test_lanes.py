"""The CUDA kernels' own source, run lane by lane on the CPU, in memory that refuses what lies outside a tensor.

What runs is what Numba gets to compile, with the twins of ``lanes_twins.py`` for the operations in PTX; what the
machine refuses, ``lanes_machine.py`` says.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import lanes_twins
import numpy as np
import pytest
from lanes import LaneGPU, expected_reads, run_dequantization, run_product
from lanes_machine import SHARED_WINDOW, Block, LaneError, Memory, Settings
from lanes_twins import MAKERS, TWINS, LaneTarget

from qmm.arrays import View
from qmm.kernels import activations, dequantize, launch, matvec, probe, ptx, ring
from qmm.kernels.cuda_target import CUDATarget
from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.specialize import specialize
from qmm.kernels.staging import WARPS, Machine, Schedule

HOPPER = Machine(2, 232448, True)
ONE = Machine(1, 232448, True)
AMPERE = Machine(2, 166912, False)
ADA = Machine(2, 101376, False)

formats = pytest.mark.parametrize("name", FORMATS)


def depth(block_format: Format, which: str) -> int:
    """One block, a row shorter than a chunk, one of several chunks."""
    if block_format.plain:
        return {"one": 5, "short": 37, "deep": 1100}[which]
    blocks = {"one": 1, "short": 3, "deep": 11}[which]
    return block_format.block_weights * (blocks if block_format.block_weights == 256 else 6 * blocks - 5)


# Machine, m, k, n, and what run_product is told besides. A shift of None is the least that the format allows.
CASES: dict[str, tuple[Machine, int, str, int, dict[str, Any]]] = {
    "fused": (HOPPER, 70, "deep", 1, {}),
    "mapped": (HOPPER, 20, "short", 2, {"int8": False, "mapped": True, "shift": 13, "settings": Settings(slow=0)}),
    "not fused": (HOPPER, 70, "short", 3, {"x_shift": 4, "shift": None, "settings": Settings(late=False, slow=5)}),
    "eight": (HOPPER, 37, "short", 8, {"settings": Settings(seed=1)}),
    "many rows": (ONE, 130, "one", 1, {"shift": 6, "settings": Settings(slow=3, seed=2)}),
    "copied by 16": (AMPERE, 37, "deep", 1, {"mapped": True, "shift": 13}),
    "one block": (AMPERE, 5, "one", 3, {"int8": False, "settings": Settings(late=False)}),
    "four, small": (ADA, 37, "short", 4, {"shift": 8, "settings": Settings(slow=8)}),
    "eight, small": (ADA, 20, "deep", 8, {"shift": None, "settings": Settings(late=False, slow=2)}),
}


def options_of(block_format: Format, options: dict[str, Any]) -> dict[str, Any]:
    least = min(4, block_format.alignment)
    shift = options.get("shift", 0)
    shift = least if shift is None else shift if shift % least == 0 or not block_format.plain else 8
    return {**options, "shift": shift}


@formats
@pytest.mark.parametrize("case", CASES)
def test_products(name: str, case: str) -> None:
    machine, m, which, n, options = CASES[case]
    block_format = FORMATS[name]
    run_product(name, m, depth(block_format, which), n, machine=machine, **options_of(block_format, options))
