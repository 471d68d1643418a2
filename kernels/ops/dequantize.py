"""Dequantization on the GPU: a tensor's weights as float32, bit for bit what ``gguf.quants.dequantize`` gives.

The ring of pipeline stages and the units of lanes are those of :mod:`qmm.kernels.ops.matvec.kernel`; a lane stores the
runs of its unit.
"""

from __future__ import annotations

import functools

from qmm.kernels.formats import Format
from qmm.kernels.lang.fields import FieldAccess
from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.primitives import run_weights
from qmm.kernels.lang.ptx.barrier import fence_mbarrier_init, mbarrier_arrive, mbarrier_wait, sync_cta
from qmm.kernels.lang.ptx.global_memory import store_global_run, store_global_run_part
from qmm.kernels.lang.ptx.grid import cta_count, cta_index, lane_index, shared_memory, thread_index
from qmm.kernels.lang.specialize import unroll
from qmm.kernels.ops.layout import ROOMY_RUNS, WARPS
from qmm.kernels.ops.op import Architecture, At, LaunchSpec, WeightLayout, Work, alignment_of
from qmm.kernels.ops.pipeline import following, prepare, produce
from qmm.kernels.ops.tiling import EMPTY, PipelineConstants, Tiling
from qmm.kernels.runtime.kernel import Kernel

__all__ = ["dequantization_tiling", "dequantize", "dequantize_kernel", "plan"]

c = PipelineConstants.placeholder()


def dequantize(weights, row_nbytes, m, blocks, chunks, k, out):
    """``out`` is ``(m, k)`` float32, row-major, at a multiple of 16 bytes."""
    lane = lane_index()
    thread = thread_index()
    warp = thread >> 5
    barriers = shared_memory()
    ring = barriers + c.BARRIERS_NBYTES
    row = cta_index() * c.ROWS
    row_step = cta_count() * c.ROWS
    prepare(barriers, thread)
    fence_mbarrier_init(c.BULK)
    sync_cta()
    if warp >= c.WARPS:
        if warp < c.WARPS + c.PRODUCERS:
            produce(ring, barriers, weights, row_nbytes, m, chunks, row, 0, row_step, 0, 1 << 62, warp - c.WARPS, lane)
    else:
        full = barriers
        stage = ring
        parity = 0
        chunk = 0
        while row < m:
            mbarrier_wait(full, parity, c.BULK)
            for u in unroll(c.UNITS):
                part = (warp + c.K_WARPS * u) & (c.LANES - 1)
                place = ((warp + c.K_WARPS * u) // c.LANES) * 4 + (lane & 3)
                block = chunk * c.CHUNK_BLOCKS + place
                for r in unroll(c.LANE_ROWS):
                    line = (lane >> 2) + 8 * r
                    if mask("blocks of weights", block < blocks) and mask("rows of weights", row + line < m):
                        phase = (weights + (row + line) * row_nbytes + chunk * c.CHUNK_NBYTES) & (c.LINE - 1)
                        runs = c.unpack(part, *c.load(stage + line * c.PITCH + phase + place * c.BLOCK_NBYTES, part))
                        target = out + ((row + line) * k + block * (16 * c.BLOCK_RUNS)) * 4
                        for i in unroll(c.RUNS):
                            q, scale, minimum = runs[i]
                            values = run_weights(q, scale, minimum)
                            if c.PLAIN:
                                store_global_run_part(
                                    target, values, mask("tail of weights", min(16, k - block * 16), 16)
                                )
                            else:
                                store_global_run(target + c.position(part, i) * 64, values)
            mbarrier_arrive(full + EMPTY)
            row, chunk = following(row, chunk, chunks, row_step)
            stage += c.STAGE_NBYTES
            full += 8
            if full == barriers + 8 * c.STAGES:
                full = barriers
                stage = ring
                parity ^= 1


@functools.lru_cache(maxsize=4096)
def dequantization_tiling(block_format: Format, alignment: int, architecture: Architecture) -> Tiling:
    """The tiling of the dequantization: as many warps as have registers and leave room for two stages."""
    warps = WARPS if block_format.runs <= ROOMY_RUNS else WARPS // 2
    least = Tiling.of(block_format, alignment, 0)
    while warps > 4 and least.shared_nbytes(0) > architecture.shared_nbytes:
        warps //= 2
        least = Tiling.of(block_format, alignment, 0, warps=warps)
    return Tiling.of(block_format, alignment, least.ring_within(architecture.shared_nbytes, 0), warps=warps)


@functools.cache
def dequantize_kernel(block_format: Format, tiling: Tiling, bulk: bool) -> Kernel:
    """Dequantization to float32."""
    constants = PipelineConstants(**tiling.constants(block_format, bulk, product=False))
    name = f"dequantize_{block_format.name}_{tiling.alignment}"
    return Kernel(name, dequantize, constants, tiling.threads, FieldAccess(tiling.alignment, "shared"), shared=True)


def plan(block_format: Format, m: int, k: int, weights: WeightLayout, architecture: Architecture) -> Work:
    """The work of dequantizing a tensor to ``(m, k)`` float32, row-major at a multiple of 16 bytes; m and k are at
    least 1."""
    row_nbytes = block_format.row_nbytes(k)
    tiling = dequantization_tiling(block_format, alignment_of(weights.alignment | row_nbytes), architecture)
    ctas = min(architecture.sms, -(-m // tiling.rows))
    kernel = dequantize_kernel(block_format, tiling, architecture.bulk)
    launch = LaunchSpec.of(
        kernel,
        ctas,
        shared_nbytes=tiling.shared_nbytes(0),
        weights=At("weights"),
        row_nbytes=row_nbytes,
        m=m,
        blocks=block_format.blocks(k),
        chunks=tiling.chunks(block_format, k),
        k=k,
        out=At("y"),
    )
    return Work((launch,))
