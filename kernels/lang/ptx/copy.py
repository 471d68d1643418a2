"""Asynchronous copies from global memory to shared memory, prefetches to L2, and copies of the tensor's edges.

The product kernel reads weights by these only.
"""

from __future__ import annotations

from qmm.kernels.lang.current import this_cta, this_lane
from qmm.kernels.lang.operation import operation

__all__ = ["bulk_copy", "copy16", "copy_edge", "prefetch_l2"]


@operation("(int64, int64) -> None")
def copy16(target, source):
    """Starts copying 16 bytes from global to shared memory, both 16-byte aligned, past L1 (sm_80 and later)."""
    this_lane().copy(target, source, 16)


@copy16.cuda
def _(e, target, source):
    e.ptx("cp.async.cg.shared.global [$0], [$1], 16;", "r,l", e.trunc(target, e.i32), source, volatile=True)


@operation("(int64, int64, literal) -> None")
def copy_edge(target, source, nbytes):
    """Copies 1, 2 or 4 bytes, at multiples of that, from global to shared memory, synchronously."""
    cta = this_cta()
    data, at = cta.memory.read(source, nbytes, nbytes)
    cta.shared.write(target, data[at : at + nbytes], nbytes)


@copy_edge.cuda
def _(e, target, source, nbytes):
    register, letter = {1: ("b8", "h"), 2: ("b16", "h"), 4: ("b32", "r")}[nbytes]
    value = e.ptx(f"ld.global.{register} $0, [$1];", f"={letter},l", source, volatile=True)
    e.ptx(f"st.shared.{register} [$0], $1;", f"r,{letter}", e.trunc(target, e.i32), value, volatile=True)


@operation("(int64, int64, int64, int64) -> None")
def bulk_copy(target, source, nbytes, barrier):
    """Starts copying from global to shared memory, all at multiples of 16; the barrier counts the bytes (sm_90)."""
    this_lane().bulk_copy(target, source, nbytes, barrier)


@bulk_copy.cuda
def _(e, target, source, nbytes, barrier):
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    target, nbytes, barrier = (e.trunc(value, e.i32) for value in (target, nbytes, barrier))
    e.ptx(text, "r,l,r,r", target, source, nbytes, barrier, volatile=True)


@operation("(int64, int64) -> None")
def prefetch_l2(source, nbytes):
    """Prefetches global memory to L2, all at multiples of 16; its completion cannot be waited for (sm_90)."""
    this_cta().memory.prefetch(source, nbytes)


@prefetch_l2.cuda
def _(e, source, nbytes):
    e.ptx("cp.async.bulk.prefetch.L2.global [$0], $1;", "l,r", source, e.trunc(nbytes, e.i32), volatile=True)
