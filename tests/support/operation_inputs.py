"""Inputs of the kernels of operations: random ones, and the edges of what each operation's docstring allows."""

from __future__ import annotations

import numpy as np
from operation_kernels import ITEMS

__all__ = [
    "random_bytes",
    "quiet",
    "any_floats",
    "ties",
    "to_halves",
    "to_bfloats",
    "to_bytes",
    "to_floats",
    "to_runs",
    "to_fma",
    "to_dots",
    "to_dots_of_bytes",
    "to_short_dots",
    "to_short_dots_of_subnormals",
    "shortened",
]

RNG = np.random.default_rng(0)
EDGES = np.array(
    [
        *(0.0, 1.0, np.inf, np.nan),
        *(2.0**-149, 2.0**-126 - 2.0**-149, 2.0**-126, 2.0**126, 2.0**127, 2.0**128 - 2.0**104),
        *(65504.0, 65519.996, 65520.0, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24),  # as halves: the largest, and subnormals
        *(2.0**128 - 2.0**119, 2.0**128 - 2.0**119 - 2.0**104),  # as bfloats: the tie with infinity, and what is below
        *(2.0**-134, 1.5 * 2.0**-133),  # as bfloats: ties of subnormals
    ],
    np.float32,
)
EDGES = np.concatenate([EDGES, -EDGES])


def random_bytes(*shape: int) -> np.ndarray:
    """Bytes, the extremes of a signed one among them in whole rows."""
    made = RNG.integers(0, 256, shape, np.uint8)
    for i, value in enumerate((0x80, 0x7F, 0xFF, 0)):
        made[64 * i : 64 * i + 32] = value
    return made


def quiet(values: np.ndarray) -> np.ndarray:
    """Numbers whose NaNs are quiet: others do not pass through Python's floats unchanged."""
    return np.where(np.isnan(values), (values.view(np.uint32) | 0x400000).view(np.float32), values)


def any_floats(*shape: int) -> np.ndarray:
    """Edges, random bits, and ordinary numbers; in another order each time."""
    count = int(np.prod(shape))
    random_bits = RNG.integers(0, 1 << 32, count // 2, np.uint32).view(np.float32)
    made = np.concatenate([EDGES, quiet(random_bits), RNG.standard_normal(count, np.float32)])[:count]
    return RNG.permutation(made).reshape(shape)


def ties(exponents: range, dropped: int) -> np.ndarray:
    """Numbers half way between two that are shorter by so many bits, and those just beside: 3 * 64 for each exponent,
    of both signs."""
    middles = (RNG.integers(0, 1 << 23 - dropped, (len(exponents), 64)) << dropped) + (1 << dropped - 1)
    middles += ((np.array(exponents) + 127) << 23)[:, None] + (RNG.integers(0, 2, middles.shape) << 31)
    return np.concatenate([middles - 1, middles, middles + 1]).astype(np.uint32).view(np.float32).ravel()


def to_halves() -> np.ndarray:
    """Ties of normal halves; ties of subnormal ones, which are multiples of 2**-24; others."""
    subnormal = ((np.arange(512) + 0.5) * 2.0**-24).astype(np.float32)
    beside = [subnormal, np.nextafter(subnormal, np.float32(0)), -np.nextafter(subnormal, np.float32(1))]
    made = np.concatenate([ties(range(-14, 16, 3), 13), *beside])
    return np.concatenate([made, any_floats(ITEMS * 8 - len(made))])


def to_bfloats() -> np.ndarray:
    made = ties(range(-126, 128, 20), 16)
    return np.concatenate([made, any_floats(ITEMS * 8 - len(made))])


def to_bytes() -> np.ndarray:
    """Four values and a factor whose products round to signed bytes: ties, numbers just beside, random ones as the
    quantization makes them, and values that vanish."""
    factors = 2.0 ** RNG.integers(-100, 100, 128)
    middles = np.resize(np.arange(-128, 127) + 0.5, (128, 4))
    middles = RNG.permuted(middles, axis=None).astype(np.float32)
    beside = [middles, *(np.nextafter(middles, np.float32(end)) for end in (-128, 127))]
    rows = [np.column_stack([values / factors[:, None], factors]) for values in beside]
    values = RNG.standard_normal((ITEMS - 384, 4), np.float32) * RNG.lognormal(0, 20, (ITEMS - 384, 1))
    values = values.astype(np.float32)
    values[:8] = RNG.choice([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126], (8, 4))
    inverse = np.float32(127) / np.maximum(np.abs(values).max(1, keepdims=True), np.float32(2.0**-100))
    return np.concatenate([*rows, np.column_stack([values, inverse])]).astype(np.float32)


def to_floats() -> np.ndarray:
    """Any number, and a normal positive one."""
    normal = RNG.integers(0x00800000, 0x7F800000, ITEMS, np.uint32)
    normal[:4] = 0x00800000, 0x7F7FFFFF, 0x7E800000, 0x7F000000
    normal[4:64] &= 0x7F800000
    return np.column_stack([any_floats(ITEMS), normal.view(np.float32)])


def to_runs() -> np.ndarray:
    """Sixteen bytes, sixteen numbers, a scale and a minimum."""
    made = any_floats(ITEMS, 24)
    made[:, :4] = random_bytes(ITEMS, 16).view(np.float32)
    made[100:, 20:22] = RNG.standard_normal((ITEMS - 100, 2), np.float32)
    return made


def to_fma() -> np.ndarray:
    """Any numbers; sums that cancel; sums a little beside a tie, which float64 takes for the tie; zeros."""
    made = any_floats(ITEMS, 3)
    made[100:200, :2] = RNG.standard_normal((100, 2), np.float32)
    made[100:200, 2] = -made[100:200, 0] * made[100:200, 1]
    made[200:300, :2] = 1 + 2.0**-12 * (1 + 2 * RNG.integers(0, 2, (100, 1)))
    made[200:300, 2] = 2.0**-80 * RNG.choice([1, -1], 100)
    made[300:400] = RNG.standard_normal((100, 3), np.float32)
    made[400:404] = (1, 1, -1), (-1, 1, 1), (0, -1, -0.0), (0, 1, -0.0)
    return made


def to_dots() -> np.ndarray:
    """Twice sixteen numbers, of like and of unlike magnitudes, some of them not finite."""
    made = RNG.standard_normal((ITEMS, 32), np.float32)
    made[:200] *= 2.0 ** RNG.integers(-30, 30, (200, 32))
    made[200:220] *= 2.0**-70  # products below the smallest normal number
    made[220:240, :16] = RNG.permuted(np.resize(EDGES[np.abs(EDGES) < 1], (20, 16)), axis=1)
    made[240:260, 5] = np.inf
    made[250:260, 16 + 5] = np.resize([-1, 0], 10)
    made[255:260, 6] = np.inf
    made[260:270, 31] = np.nan
    return made


def to_dots_of_bytes() -> np.ndarray:
    """Six times sixteen bytes; every other warp has what :func:`mma_s8` is meant for, a diagonal of x."""
    made = random_bytes(ITEMS, 96)
    made[32:64] = 0x80
    lane = np.arange(ITEMS) & 31
    beside = ((lane & 3) != lane >> 3) & (np.arange(ITEMS) & 32 != 0)
    made.reshape(ITEMS, 6, 16)[beside, 2::3] = 0
    return made


def to_short_dots() -> np.ndarray:
    """Three times sixteen numbers of 11 bits, of like and of unlike magnitudes, some not finite; and four totals."""
    made = RNG.standard_normal((ITEMS, 52), np.float32)
    made[128:256] *= 2.0 ** RNG.integers(-15, 15, (128, 52))
    made[260, 3] = made[261, 48] = np.inf
    made[295, 20] = -np.inf
    made[300, 40] = np.nan
    made[325, 35] = 0
    made[320:352, 3] = np.inf
    return shortened(made)


def to_short_dots_of_subnormals() -> np.ndarray:
    """The same with weights below the smallest normal number, as those of bfloat16 may be, and products above it."""
    made = RNG.standard_normal((ITEMS, 52), np.float32)
    made[:, :32] *= 2.0**-129
    made[:, 32:48] *= 2.0**24
    made[:, 48:] *= 2.0**-103
    return shortened(made)


def shortened(made: np.ndarray) -> np.ndarray:
    """With the last 13 bits of all but the totals 0, as the tensor cores' TF32 leaves them out."""
    made.view(np.uint32)[:, :48] &= 0xFFFFE000
    return made
