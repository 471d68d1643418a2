"""Barriers: mbarriers in shared memory, named barriers of warps, and barriers of the CTA and of a warp.

An mbarrier is 8 bytes of shared memory, at a multiple of 8. Its phases follow each other. A phase is complete when as
many threads have arrived as it was initialized for, and all expected bytes have arrived. Waiters name the parity of the
phase that they wait for: 0 for the first. Addresses are of the shared window; all numbers are int64.
"""

from __future__ import annotations

from typing import Any

from qmm.kernels.lang.current import this_cta, this_lane
from qmm.kernels.lang.operation import operation

__all__ = [
    "fence_mbarrier_init",
    "mbarrier_arrive",
    "mbarrier_arrive_after_copies",
    "mbarrier_expect_tx",
    "mbarrier_init",
    "mbarrier_wait",
    "named_barrier_arrive",
    "named_barrier_wait",
    "sync_cta",
    "sync_warp",
]


def _on_barrier(e: Any, text: str, *values: Any) -> None:
    """Shared-window addresses and counts are 32 bits wide."""
    letters = ",".join("r" * len(values))
    e.ptx(text, letters, *[e.trunc(value, e.i32) for value in values], volatile=True)


@operation("(int64, int64) -> None")
def mbarrier_init(barrier, count):
    """Initializes an mbarrier whose phases ``count`` arrivals complete."""
    this_cta().mbarriers.initialize(barrier, count)


@mbarrier_init.cuda
def _(e, barrier, count):
    _on_barrier(e, "mbarrier.init.shared.b64 [$0], $1;", barrier, count)


@operation("(literal) -> None")
def fence_mbarrier_init(bulk):
    """Makes initialized mbarriers visible to other threads; with ``bulk`` also to bulk copies (sm_90 and later)."""
    this_lane()  # in the emulator they are visible at once


@fence_mbarrier_init.cuda
def _(e, bulk):
    e.ptx("fence.mbarrier_init.release.cluster;" if bulk else "membar.cta;", "", volatile=True)


@operation("(int64) -> None")
def mbarrier_arrive(barrier):
    """One arrival. The thread's earlier reads and writes are ordered before what others do after their wait."""
    mbarriers = this_cta().mbarriers
    mbarriers.arrive(mbarriers.at(barrier))


@mbarrier_arrive.cuda
def _(e, barrier):
    _on_barrier(e, "{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [$0]; }", barrier)


@operation("(int64) -> None")
def mbarrier_arrive_after_copies(barrier):
    """One arrival as soon as the thread's ``copy16`` so far are done."""
    this_lane().arrive_after_copies(barrier)


@mbarrier_arrive_after_copies.cuda
def _(e, barrier):
    _on_barrier(e, "cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", barrier)


@operation("(int64, int64) -> None")
def mbarrier_expect_tx(barrier, nbytes):
    """Makes the mbarrier's phase also expect so many bytes of bulk copies (sm_90 and later)."""
    mbarriers = this_cta().mbarriers
    mbarriers.expect(mbarriers.at(barrier), nbytes)


@mbarrier_expect_tx.cuda
def _(e, barrier, nbytes):
    _on_barrier(e, "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$0], $1;", barrier, nbytes)


@operation("(int64, int64, literal) -> None")
def mbarrier_wait(barrier, parity, bulk):
    """Waits until the phase of a parity is complete: with ``bulk`` (sm_90 and later) the thread sleeps meanwhile, else
    it polls."""
    mbarriers = this_cta().mbarriers
    mbarriers.wait(mbarriers.at(barrier), parity)


@mbarrier_wait.cuda
def _(e, barrier, parity, bulk):
    test = "try_wait" if bulk else "test_wait"
    text = f"{{ .reg .pred done; again: mbarrier.{test}.parity.shared.b64 done, [$0], $1; @!done bra again; }}"
    _on_barrier(e, text, barrier, parity)


@operation("(literal, literal) -> None")
def named_barrier_arrive(number, threads):
    """Arrives at named barrier ``number`` of so many threads, without waiting."""
    this_lane().at_barrier(number, threads, waits=False)


@named_barrier_arrive.cuda
def _(e, number, threads):
    e.ptx(f"barrier.cta.arrive.aligned {number}, {threads};", "", volatile=True)


@operation("(literal, literal) -> None")
def named_barrier_wait(number, threads):
    """Waits at named barrier ``number`` for so many threads, its own warp's included."""
    this_lane().at_barrier(number, threads, waits=True)


@named_barrier_wait.cuda
def _(e, number, threads):
    e.ptx(f"barrier.cta.sync.aligned {number}, {threads};", "", volatile=True)


@operation("() -> None")
def sync_cta():
    """Waits for all threads of the CTA."""
    lane = this_lane()
    lane.at_barrier(0, lane.cta.threads, waits=True)


@sync_cta.cuda
def _(e):
    # LLVM's own barrier: inline PTX might be duplicated into branches.
    e.call(e.declared("llvm.nvvm.barrier0", e.void, []), [])


@operation("() -> None", of_warp=True)
def sync_warp():
    """Waits for all lanes of the warp."""


@sync_warp.cuda
def _(e):
    e.ptx("bar.warp.sync 0xffffffff;", "", volatile=True)
