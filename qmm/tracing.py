"""What ``torch.compile`` makes of qmm: a product of tensors is one operator in its graph, all else is called as it is.

torch is not imported here, and need not be installed. Its compiler, Dynamo, handles a function twice. Where it follows
a call in the code that it compiles, the attributes that :func:`untraced` sets stop it; ``Engine.matmul`` it may follow,
where :func:`watched` is TRACED. Where the function then runs, Dynamo is asked about each frame of Python in it, Numba's
too, unless it was called through ``torch.compiler.disable``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["TRACED", "outside", "untraced", "watched"]

F = TypeVar("F", bound=Callable[..., Any])
REASON = (
    "qmm's kernels are compiled already, and read memory by its address. A graph can have products of PyTorch tensors "
    "that qmm takes, without stream=. Else, without fullgraph=True, torch.compile compiles what comes before and after "
    "the call, and an error is qmm's own"
)
TRACED = "traced"
"""What :func:`watched` is where Dynamo follows its call."""
_modules = sys.modules
_set: list[Callable[[object], object]] = []
_disabled: dict[Callable[..., Any], Callable[..., Any]] = {}


def untraced(function: F) -> F:
    """Make Dynamo call a function instead of tracing it. Its body begins with ``if watched(): ...
    outside(function)``."""
    vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=REASON)
    return function


def watched() -> bool | str:
    """Whether Dynamo is asked about this thread's frames, which is so only in code compiled by torch.compile; TRACED
    where Dynamo follows the call."""
    if not _set:
        dynamo = _modules.get("torch._C._dynamo.eval_frame")  # there with torch, not only with its compiler
        if dynamo is None:
            return False
        _set.append(dynamo.set_eval_frame)
    asked = _set[0](None)  # get_eval_frame_callback would do, but that of torch 2.6 loses references
    if asked is None:
        return False
    _set[0](asked)
    return bool(asked)


def _traced() -> str:
    return TRACED


watched._torchdynamo_inline = _traced  # type: ignore[attr-defined]  # what Dynamo takes in its place


@untraced
def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function to call where :func:`watched`: Dynamo is asked about no frame in it."""
    if function not in _disabled:
        decorators = sys.modules["torch._dynamo.decorators"]
        _disabled[function] = decorators.disable(function)
        if hasattr(function, "_torchdynamo_disable"):
            decorators.skip(function)  # else Dynamo compiles the way to here, once for each name of a tensor
    return _disabled[function]
