"""F16: plain IEEE float16, little endian. A lane takes 16 numbers."""

from __future__ import annotations

from qmm.kernels.formats.format import Format
from qmm.kernels.lang.fields import load16
from qmm.kernels.lang.primitives import half_floats


def load(block, lane):
    return load16(block, 0), load16(block, 16)


def unpack(lane, low, high):
    return ((half_floats(low, high), 1.0, 0.0),)


def position(lane, i):
    return 0


FORMAT = Format(
    name="F16",
    block_weights=16,
    block_nbytes=32,
    lanes=1,
    runs=1,
    has_minimum=False,
    load=load,
    unpack=unpack,
    position=position,
    alignment=16,
    plain=True,
    short=True,
)
