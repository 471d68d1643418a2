"""What kernels are written in: operations, their meaning in Python, and their lowering on each target.

Every user's kernel or format needs the names here; operations are in the modules beside
(:mod:`qmm.kernels.lang.primitives`, :mod:`qmm.kernels.lang.fields`, :mod:`qmm.kernels.lang.simd`,
:mod:`qmm.kernels.lang.ptx`). No compiler is imported.
"""

from __future__ import annotations

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.fields import FieldAccess
from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.specialize import registers, specialize, unroll
from qmm.kernels.lang.tables import table

__all__ = ["Constants", "FieldAccess", "mask", "registers", "specialize", "table", "unroll"]
