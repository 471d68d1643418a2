"""Plans of the quantization of activations, and of the conversion of results."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from qmm.kernels.ops.layout import WARPS, Activations
from qmm.kernels.ops.op import Architecture, At, LaunchSpec, Operand
from qmm.kernels.ops.quantize.kernel import QuantizeConstants, cast, quantize
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["cast_kernel", "quantize_kernel", "quantize_specs", "store_specs"]


@functools.cache
def quantize_kernel(dtype: str, int8: bool, programmatic: bool) -> Kernel:
    """Activations of ``dtype`` to blocks of 32 int8 or float16 values."""
    constants = QuantizeConstants(DTYPE=dtype, INT8=int8, PROGRAMMATIC=programmatic, WARPS=WARPS)
    return Kernel(f"quantize_{dtype}_{'int8' if int8 else 'f16'}", quantize, constants, 32 * WARPS)


@functools.cache
def cast_kernel(dtype: str) -> Kernel:
    """float32 results to an array of ``dtype`` with any strides."""
    constants = QuantizeConstants(DTYPE=dtype, INT8=False, PROGRAMMATIC=False, WARPS=WARPS)
    return Kernel(f"cast_{dtype}", cast, constants, 32 * WARPS)


def quantize_specs(
    x: Operand, activations: Activations, area: At, area_nbytes: int, architecture: Architecture
) -> Iterator[LaunchSpec]:
    """The launches that quantize ``x`` to areas of ``activations.columns`` columns each.

    Args:
        x: activations ``(n, k)``.
        activations: their layout in each area.
        area: where the first one is.
        area_nbytes: from one area to the next.
        architecture: of the GPU.
    """
    kernel = quantize_kernel(x.dtype, activations.int8, architecture.bulk)
    for slab in x.slabs:
        padded = slab.rows + (-x.rows % activations.columns if slab is x.slabs[-1] else 0)
        ctas = architecture.ctas_for(-(-padded * activations.scale_blocks // WARPS))
        yield LaunchSpec.of(
            kernel,
            ctas,
            early=architecture.bulk,
            x=At("x", slab.offset),
            row_stride=slab.row_stride,
            column_stride=slab.column_stride,
            k=x.columns,
            blocks=activations.scale_blocks,
            spread=activations.spread,
            n=slab.rows,
            padded=padded,
            first=slab.first,
            columns=activations.columns,
            sum_count=activations.sums,
            area=area,
            area_nbytes=area_nbytes,
        )


def store_specs(y: Operand, source: At, pitch: int, architecture: Architecture) -> Iterator[LaunchSpec]:
    """The launches that copy float32 results, row-major at ``source`` with one number every ``pitch`` bytes, to
    ``y``."""
    kernel = cast_kernel(y.dtype)
    for slab in y.slabs:
        ctas = architecture.ctas_for(-(-slab.rows * y.columns // (32 * WARPS)))
        yield LaunchSpec.of(
            kernel,
            ctas,
            source=At(source.base, source.offset + slab.first * y.columns * pitch),
            pitch=pitch,
            n=slab.rows,
            m=y.columns,
            target=At("y", slab.offset),
            row_stride=slab.row_stride,
            column_stride=slab.column_stride,
        )
