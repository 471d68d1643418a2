"""The indices of a thread in its warp, CTA and grid, and the order of launches."""

from __future__ import annotations

from typing import Any

from qmm.kernels.lang.current import this_cta, this_lane
from qmm.kernels.lang.operation import operation

__all__ = [
    "cta_count",
    "cta_index",
    "lane_index",
    "launch_dependents",
    "shared_memory",
    "thread_index",
    "wait_for_predecessors",
]


def _register(e: Any, name: str) -> Any:
    return e.zext(e.ptx(f"mov.u32 $0, %{name};", "=r"), e.i64)


@operation("() -> int64")
def lane_index():
    """The thread's number in its warp, 0 to 31."""
    return this_lane().index


@lane_index.cuda
def _(e):
    return _register(e, "laneid")


@operation("() -> int64")
def thread_index():
    """The thread's number in its CTA."""
    return this_lane().thread


@thread_index.cuda
def _(e):
    return _register(e, "tid.x")


@operation("() -> int64")
def cta_index():
    """The CTA's number in the grid."""
    return this_cta().index


@cta_index.cuda
def _(e):
    return _register(e, "ctaid.x")


@operation("() -> int64")
def cta_count():
    """How many CTAs the grid has."""
    return this_cta().count


@cta_count.cuda
def _(e):
    return _register(e, "nctaid.x")


@operation("() -> int64")
def shared_memory():
    """The shared-window address of the launch's dynamic shared memory, aligned to a line of 128 bytes."""
    return this_cta().shared.start


@shared_memory.cuda
def _(e):
    return e.zext(e.ptrtoint(e.dynamic_shared_memory("qmm_shared"), e.i32), e.i64)


@operation("() -> None")
def launch_dependents():
    """Lets the next kernel of the stream start where SMs have room (sm_90 and later)."""
    this_lane()  # the emulator starts the next one when this one has ended, which is allowed


@launch_dependents.cuda
def _(e):
    e.ptx("griddepcontrol.launch_dependents;", "", volatile=True)


@operation("() -> None")
def wait_for_predecessors():
    """Waits for all kernels before this one; their writes are visible then (sm_90 and later)."""
    this_lane().wait_for_predecessors()


@wait_for_predecessors.cuda
def _(e):
    e.ptx("griddepcontrol.wait;", "", volatile=True)
