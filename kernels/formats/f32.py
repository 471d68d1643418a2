"""F32: plain float32, little endian. A lane takes 16 numbers."""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load16
from qmm.kernels.lang.primitives import float_floats


def load(block, lane):
    return load16(block, 0), load16(block, 16), load16(block, 32), load16(block, 48)


def unpack(lane, a, b, c, d):
    return ((float_floats(a, b, c, d), 1.0, 0.0),)


def position(lane, i):
    return 0


FORMAT = Format(
    name="F32",
    block_weights=16,
    block_nbytes=64,
    lanes=1,
    runs=1,
    has_minimum=False,
    load=load,
    unpack=unpack,
    position=position,
    alignment=16,
    plain=True,
)
