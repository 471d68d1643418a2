"""qmm's products as PyTorch operators, for what PyTorch has to see: gradients, transforms, traces and graphs.

:meth:`qmm.Engine.matmul` multiplies by the address of a tensor. Where a tensor is followed (it requires grad, is inside
of ``torch.func``, has no values yet, or is traced), the product is a call of an operator instead. PyTorch's dispatcher
then does the rest, and in the end calls back with plain tensors.

========================================================  =================================================
``qmm::matmul(x, engine, tensor, activations)``           ``x @ W^T``
``qmm::matmul_out(x, out, engine, tensor, activations)``  the same, into ``out``; has no gradient
``qmm::matmul_transposed(g, engine, tensor, ...)``        ``g @ W``, the gradient of the first, and vice versa
========================================================  =================================================

``engine`` is the engine's key: a graph holds this text, not the engine, which must be open where the graph runs.

Gradients are those of the product with the dequantized weight, in float32 (on a GPU in TF32, if PyTorch is set to it).
That activations are rounded, to int8 or float16, has no gradient of its own and counts as the identity ("straight
through"). A tangent of forward mode, and what a second backward pass multiplies, is rounded as ``x`` is.

This module imports torch, and is imported where a tensor needs it. A program that loads a graph from a file imports it
first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function

from qmm.arrays import View, stream_handle
from qmm.arrays.kind import check_dtype
from qmm.arrays.torch import OPERATOR
from qmm.calls import check_activations, check_input
from qmm.compiled import engine_of
from qmm.errors import ArrayError, QmmError
from qmm.tracing import outside, watched

if TYPE_CHECKING:
    from qmm.engine import Engine
    from qmm.model import Tensor

__all__ = ["graph_takes", "multiply", "product"]

CHUNK_NBYTES = 64 << 20
"""The most bytes of a weight that are dequantized at a time, unless a row has more."""

_library = torch.library.Library("qmm", "DEF")
_tags = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):  # a replay would not look at the file, and workspace may be allocated
    _tags.append(torch.Tag.cudagraph_unsafe)
for _schema in (
    "matmul(Tensor x, str engine, str tensor, str activations) -> Tensor",
    "matmul_transposed(Tensor g, str engine, str tensor, str activations) -> Tensor",
    "matmul_out(Tensor x, Tensor(a!) out, str engine, str tensor, str activations) -> ()",
):
    _library.define(_schema, tags=_tags)
_matmul = torch.ops.qmm.matmul.default
_transposed = torch.ops.qmm.matmul_transposed.default
_matmul_out = torch.ops.qmm.matmul_out.default


# From the engine to the operators -------------------------------------------------------------------------------------


def product(engine: Engine, tensor: Tensor, activations: str, x: Any, out: Any, stream: Any, why: str) -> Any:
    """:meth:`qmm.Engine.matmul` for tensors that PyTorch follows; ``why`` says what follows them.

    Raises:
        ArrayError: PyTorch cannot follow this product.
    """
    check_activations(activations)
    if OPERATOR.runs:  # another call would come here again
        raise ArrayError(why)
    try:
        with _on(engine, x, stream):
            return multiply(engine._key, tensor.name, x, out, activations)
    except QmmError as error:
        error.__suppress_context__ = True  # that a call of the operator was needed explains nothing
        raise
    except (AssertionError, NotImplementedError, TypeError) as reason:
        raise _refusal(why, reason) from reason
    except RuntimeError as reason:
        if out is None or type(reason) is not RuntimeError:  # such as torch.OutOfMemoryError
            raise
        raise _refusal(why, reason) from reason


def _refusal(why: str, reason: Exception) -> ArrayError:
    return ArrayError(f"{why} PyTorch cannot do it here: {' '.join(str(reason).split())}")


def multiply(engine: str, tensor: str, x: Any, out: Any, activations: str) -> Any:
    """The operator's result, or ``out``; all arguments are what a graph may hold."""
    if out is None:
        return _matmul(x, engine, tensor, activations)
    _matmul_out(x, out, engine, tensor, activations)
    return out


@contextmanager
def _on(engine: Engine, x: Any, stream: Any) -> Iterator[None]:
    """Make ``stream`` PyTorch's current one, for whatever the dispatcher launches too."""
    if stream is None:
        yield
        return
    if engine.gpu is None or x.device.type != "cuda":
        raise ArrayError("stream= is for arrays on the GPU; x is in host memory, where the call waits anyway")
    if torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        raise ArrayError("stream= would not be in the trace. Leave it out, and use the trace under torch.cuda.stream")
    cuda = torch.cuda
    if type(stream) is not cuda.Stream:
        handle = stream_handle(stream)
        default = handle in (0, 1)  # 1 is cudaStreamLegacy, the default stream's other handle
        stream = cuda.default_stream(x.device) if default else cuda.ExternalStream(handle, x.device)
    with cuda.stream(stream):
        yield


def graph_takes(engine: Engine, tensor: str, x: Any, out: Any, stream: Any, activations: str) -> bool:
    """Whether a graph of torch.compile can hold this product. Otherwise it is called between two graphs, as it is,
    which also gives the errors their type. Dynamo follows this function."""
    if stream is not None or not isinstance(x, torch.Tensor) or not x.shape:
        return False
    shape = _shape(engine._key, tensor, activations, str(x.device), str(x.dtype))
    if shape is None or x.shape[-1] != shape[-1]:
        return False
    if out is None:
        return True
    if not isinstance(out, torch.Tensor) or out.device != x.device:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        return False
    fits: bool = out.shape == (*x.shape[:-1], *shape[:-1])
    return fits


def _shape(key: str, tensor: str, activations: str, device: str, dtype: str) -> tuple[int, ...] | None:
    """The shape of a tensor that can be multiplied so; Dynamo calls this while it compiles, and keeps the answer."""
    try:
        engine, x = engine_of(key), torch.empty(0, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        check_activations(activations)
        found = engine._tensor(tensor)
        _check_input(engine, found, x.new_empty((1, found.k)), torch.device(device))
        return found.shape
    except QmmError:
        return None


_shape._dynamo_marked_constant = True  # type: ignore[attr-defined]


# What the operators do ------------------------------------------------------------------------------------------------


def _plainly(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of an operator: called with plain tensors, which nothing follows any more."""

    def run(*arguments: Any) -> Any:
        before, OPERATOR.runs = OPERATOR.runs, True
        try:
            with torch.no_grad():
                return compute(*(each.detach() if isinstance(each, torch.Tensor) else each for each in arguments))
        finally:
            OPERATOR.runs = before

    def kernel(*arguments: Any) -> Any:
        if watched():
            return outside(run)(*arguments)
        return run(*arguments)

    return kernel


def _compute_matmul(x: Any, engine: str, tensor: str, activations: str) -> Any:
    return engine_of(engine).matmul(tensor, x, activations=activations)


def _compute_matmul_out(x: Any, out: Any, engine: str, tensor: str, activations: str) -> None:
    engine_of(engine).matmul(tensor, x, out, activations=activations)


def _compute_transposed(g: Any, key: str, name: str, activations: str) -> Any:
    engine = engine_of(key)
    tensor = engine._tensor(name)
    _check_gradient(engine, tensor, g, g.device)
    leading = g.shape[: g.dim() - len(tensor.shape) + 1]
    values = g.reshape(math.prod(leading), tensor.m).to(torch.float32)
    total = values.new_zeros((len(values), tensor.k))
    with torch.autocast(g.device.type, enabled=False):
        for first, weights in _dequantized(engine, tensor, g.device) if total.numel() else ():
            total.addmm_(values[:, first : first + len(weights)], weights)
    return total.to(g.dtype).reshape(*leading, tensor.k)


def _dequantized(engine: Engine, tensor: Tensor, device: torch.device) -> Iterator[tuple[int, Any]]:
    """The weight as float32, some rows at a time: the first one's number, and the rows, valid until the next."""
    rows = min(tensor.m, max(1, CHUNK_NBYTES // (4 * tensor.k)))
    if device.type == "cpu":
        for first in range(0, tensor.m, rows):
            yield first, torch.from_numpy(engine.dequantize(tensor, first, min(first + rows, tensor.m)))
        return
    from qmm.direct import dequantize

    assert engine.gpu is not None
    buffer = torch.empty((rows, tensor.k), dtype=torch.float32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    for first in range(0, tensor.m, rows):
        count = min(rows, tensor.m - first)
        with engine._in_flight.now:
            residency = engine._weights[tensor]
            address = residency.lease() + first * tensor.format.row_nbytes(tensor.k)
            mapped = residency.layout().mapped
            dequantize(engine.gpu, tensor.format, address, count, tensor.k, buffer.data_ptr(), stream, mapped)
        yield first, buffer[:count]


# What they would do, for tensors without values -----------------------------------------------------------------------


def _what(names: tuple[str, ...]) -> str:
    """The file and the tensor of an operator's arguments, for messages."""
    return f"{engine_of(names[0]).model.path}: tensor {names[1]!r}"


def _check_input(engine: Engine, tensor: Tensor, x: Any, device: torch.device) -> None:
    _ = tensor.format  # an error, if there is no kernel for it
    dtype = check_dtype(str(x.dtype).removeprefix("torch."), "a PyTorch tensor")
    if device.type not in ("cpu", "cuda"):
        raise ArrayError(f"a PyTorch tensor on {device} is not supported; move it to the CPU or a CUDA device")
    number = (device.index or 0) if device.type == "cuda" else None
    check_input(tensor, View(tuple(x.shape), (), dtype, 0, number), engine.device)


def _check_gradient(engine: Engine, tensor: Tensor, g: Any, device: torch.device) -> None:
    """``g`` is as a result of the product."""
    sizes = tensor.shape[:-1]
    if g.dim() < len(sizes) or tuple(g.shape[g.dim() - len(sizes) :]) != sizes:
        raise ArrayError(
            f"{tensor.model.path}: tensor {tensor.name!r}: results, and so their gradient, have the last dimensions "
            f"{sizes}, but the gradient has shape {tuple(g.shape)}"
        )
    _check_input(engine, tensor, g.new_empty((1, tensor.k), device="meta"), device)


def _fake_matmul(x: Any, engine: str, tensor: str, activations: str) -> Any:
    live = engine_of(engine)
    check_activations(activations)
    found = live._tensor(tensor)
    _check_input(live, found, x, x.device)
    return x.new_empty((*x.shape[:-1], *found.shape[:-1]))


def _fake_matmul_out(x: Any, out: Any, engine: str, tensor: str, activations: str) -> None:
    expected = _fake_matmul(x, engine, tensor, activations)
    what = _what((engine, tensor, activations))
    if out.shape != expected.shape:
        raise ArrayError(f"{what}: out has shape {tuple(out.shape)}; this product has {tuple(expected.shape)}")
    if out.device != x.device:
        raise ArrayError(f"{what}: x is on {x.device}, but out on {out.device}; use one place")
    check_dtype(str(out.dtype).removeprefix("torch."), "a PyTorch tensor")


def _fake_transposed(g: Any, engine: str, tensor: str, activations: str) -> Any:
    live = engine_of(engine)
    found = live._tensor(tensor)
    _check_gradient(live, found, g, g.device)
    return g.new_empty((*g.shape[: g.dim() - len(found.shape) + 1], found.k))


# Gradients ------------------------------------------------------------------------------------------------------------


def _differentiated(operator: Any, gradient: Any) -> Callable[..., Any]:
    """The autograd kernel of a linear operator: its gradient is ``gradient``, and its tangent itself."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, x: Any, *names: str) -> Any:
            ctx.names = names
            with _for_lower_levels(), torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & torch._C._after_autograd_keyset, x, *names)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            found = gradient(g, *ctx.names) if ctx.needs_input_grad[1] else None
            return None, found, None, None, None

        @staticmethod
        def jvp(ctx: Any, _: Any, tangent: Any, *names: Any) -> Any:
            return None if tangent is None else operator(tangent, *ctx.names)

    Linear.__name__ = Linear.__qualname__ = f"qmm_{operator._opname}"

    def kernel(keys: Any, x: Any, *names: str) -> Any:
        with enable_single_level_autograd_function():  # each level of torch.func calls this kernel itself
            return super(torch.autograd.Function, Linear).apply(keys, x, *names)

    return kernel


@contextmanager
def _for_lower_levels() -> Iterator[None]:
    """Where transforms of torch.func are nested, an autograd function of one must leave the others' modes on."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield


def _refuse_gradients(keys: Any, x: Any, out: Any, *names: str) -> None:
    """As PyTorch's own functions with ``out=`` do."""
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ArrayError(
            f"{_what(names)}: out= has no gradient, but x or out requires grad. Leave out= out, pass x.detach() and "
            "out.detach(), or call qmm under torch.no_grad()."
        )
    for each in (x, out):
        if torch.autograd.forward_ad.unpack_dual(each).tangent is not None:
            raise ArrayError(f"{_what(names)}: out= has no tangent, but x or out has one. Leave out= out.")
    with torch._C._AutoDispatchBelowAutograd():
        _matmul_out.redispatch(keys & torch._C._after_autograd_keyset, x, out, *names)


def _negative_out(keys: Any, x: Any, out: Any, *names: str) -> None:
    """Tensors with PyTorch's negative bit; for an operator that returns nothing, PyTorch's own rule fails."""
    results = out.new_empty(out.shape) if out.is_neg() else out
    _matmul_out(x.resolve_neg(), results, *names)
    if results is not out:
        out.copy_(results)
        torch.autograd.graph.increment_version(out)


# torch.func.vmap ------------------------------------------------------------------------------------------------------


def _batched(operator: Any, trailing: Callable[[Tensor], int]) -> Callable[..., Any]:
    """The rule of an operator that takes any leading dimensions: the batch is one more."""

    def rule(info: Any, in_dims: Any, x: Any, *names: str) -> tuple[Any, int | None]:
        _check_batched(x.dim() - 1, trailing, names)
        return operator(x.movedim(in_dims[0], 0), *names), 0

    return rule


def _check_batched(dimensions: int, trailing: Callable[[Tensor], int], names: tuple[str, ...]) -> None:
    engine, name, _ = names
    needed = trailing(engine_of(engine)._tensor(name))
    if dimensions < needed:  # or the batch would be taken for values
        raise ArrayError(
            f"{_what(names)}: takes tensors of at least {needed} dimensions, but under vmap this one has {dimensions}"
        )


def _batched_out(info: Any, in_dims: Any, x: Any, out: Any, *names: str) -> tuple[None, None]:
    if in_dims[1] is None:
        raise ArrayError(f"{_what(names)}: under vmap x is batched, but out is not, and has no room. Leave out= out.")
    _check_batched(x.dim() - (in_dims[0] is not None), lambda _: 1, names)
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    _matmul_out(x, out.movedim(in_dims[1], 0), *names)
    return None, None


# Registration ---------------------------------------------------------------------------------------------------------


def _register(name: str, compute: Any, fake: Any, gradient: Any, batched: Any) -> None:
    _library.impl(name, _plainly(compute), "CompositeExplicitAutograd")
    _library.impl(name, gradient, "Autograd", with_keyset=True)
    torch.library.register_fake(f"qmm::{name}", fake, lib=_library)
    torch.library.register_vmap(f"qmm::{name}", batched, lib=_library)


_register(
    "matmul", _compute_matmul, _fake_matmul, _differentiated(_matmul, _transposed), _batched(_matmul, lambda _: 1)
)
_register(
    "matmul_transposed",
    _compute_transposed,
    _fake_transposed,
    _differentiated(_transposed, _matmul),
    _batched(_transposed, lambda tensor: len(tensor.shape) - 1),
)
_library.impl("matmul_out", _negative_out, "Negative", with_keyset=True)
_register("matmul_out", _compute_matmul_out, _fake_matmul_out, _refuse_gradients, _batched_out)
