"""Activations quantized by NumPy, as the CPU's kernel should."""

from __future__ import annotations

import numpy as np


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int8 activations by NumPy, in float32 as the kernel makes them: ``q (n, blocks, 32)``, scales and sums; of rows
    whose largest magnitude is between 2**-96 and 2**96."""
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(axis=2) / np.float32(127)
    subnormal = d < np.float32(2.0**-126)
    d = np.where(subnormal, d + np.float32(2.0**-149), d)
    lift = np.where(subnormal, np.float32(2.0**24), np.float32(1))
    q = np.rint(blocks * lift[:, :, None] * (np.float32(1) / (d * lift))[:, :, None])
    sums = d[:, :, None] * q.reshape(len(x), -1, 2, 16).sum(axis=3)
    return q, d, sums.reshape(len(x), -1)
