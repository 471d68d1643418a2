"""Products in code that ``torch.compile`` compiles, and the engines that graphs name. torch is not imported here."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

from qmm.errors import ClosedError
from qmm.model import Model, Tensor
from qmm.tracing import TRACED, outside

if TYPE_CHECKING:
    from qmm.engine import Engine

__all__ = ["add_engine", "compiled_matmul", "compiled_matmul_each", "engine_of"]

_engines: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def compiled_matmul(
    seen: bool | str, engine: Engine, tensor: str | Tensor, x: Any, out: Any, stream: Any, activations: str | None
) -> Any:
    """:meth:`qmm.Engine.matmul` where :func:`watched` is ``seen``: an operator in the graph, or a call outside it."""
    if seen == TRACED:
        from qmm.torch_operator import graph_takes, multiply

        name = tensor.name if isinstance(tensor, Tensor) and tensor.model is engine.model else tensor
        mode = engine.activations if activations is None else activations
        if isinstance(name, str) and graph_takes(engine, name, x, out, stream, mode):
            return multiply(engine._key, name, x, out, mode)
    return outside(type(engine).matmul)(engine, tensor, x, out, stream, activations=activations)


def compiled_matmul_each(
    seen: bool | str, engine: Engine, tensors: Any, x: Any, outs: Any, stream: Any, activations: str | None
) -> list[Any]:
    """:meth:`qmm.Engine.matmul_each` where :func:`watched` is ``seen``: one operator for each product, or a call."""
    if seen == TRACED:
        tensors = [tensors] if isinstance(tensors, (str, Tensor)) else list(tensors)  # torch 2.6
        results = [None] * len(tensors) if outs is None else list(outs)
        if len(results) == len(tensors):
            pairs = zip(tensors, results, strict=True)
            return [compiled_matmul(seen, engine, tensor, x, out, stream, activations) for tensor, out in pairs]
    each: list[Any] = outside(type(engine).matmul_each)(engine, tensors, x, outs, stream, activations=activations)
    return each


# Engines by their keys ------------------------------------------------------------------------------------------------


def add_engine(engine: Engine, model: Model) -> str:
    """The key by which graphs know an engine. It is never used again in this process. In another process that makes the
    same engines in the same order it is the same, so that compiled graphs are found in PyTorch's caches; it names the
    file, so that it never leads to another one's weights."""
    nbytes = sum(file.identity.nbytes for file in model.known)
    written = max(file.identity.mtime_ns for file in model.known)
    key = f"{model.known[0].path} ({nbytes} bytes, written {written}), engine {next(_numbers)}"
    _engines[key] = engine
    return key


def engine_of(key: str) -> Engine:
    """The engine of a key.

    Raises:
        ClosedError: it is gone.
    """
    engine = _engines.get(key)
    if engine is None:
        raise ClosedError(
            f"{key}: there is no such engine in this process any more. A graph holds an engine's name only: keep the "
            "engine open, in the process that made the graph, for as long as the graph is used."
        )
    return engine
