"""The compile-time constants of the product kernel, and the kernel's description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qmm.kernels.formats import Format
from qmm.kernels.ops.layout import COLUMN_TILES, ZERO_NBYTES
from qmm.kernels.ops.matvec.config import Schedule
from qmm.kernels.ops.tiling import PRODUCERS, PipelineConstants
