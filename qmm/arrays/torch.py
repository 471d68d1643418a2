"""PyTorch tensors, and the reasons why some are refused."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from qmm.arrays.kind import ArrayKind, FollowedError, as_rows, check_dtype
from qmm.arrays.view import View
from qmm.errors import ArrayError
from qmm.kernels.ops.op import ITEM_NBYTES

__all__ = ["OPERATOR", "TorchArrays", "TorchSubclasses"]

LOW = 1 << 33
"""Little memory lies below this address, so there is time to look whether any does: a tensor whose storage was freed
has its offset as address."""


class _Operator(threading.local):
    """Whether this thread runs an operator of :mod:`qmm.torch_operator`, whose tensors nothing follows any more."""

    runs = False


OPERATOR = _Operator()


class TorchArrays(ArrayKind):
    """``torch.Tensor`` on the CPU or a CUDA device."""

    name = "PyTorch"

    def view(self, array: Any) -> View:
        torch = sys.modules["torch"]
        try:
            address, shape, strides = array.data_ptr(), tuple(array.shape), array.stride()
            absent = address < LOW and 0 not in shape and not array.untyped_storage().data_ptr()
        except (RuntimeError, ValueError) as reason:
            raise _not_in_memory(torch, array) from reason
        if absent:
            raise _not_in_memory(torch, array)
        if array.device.type not in ("cpu", "cuda"):
            raise ArrayError(
                f"a PyTorch tensor on {array.device} is not supported; move it to the CPU or a CUDA device"
            )
        if array.is_quantized:
            raise ArrayError(f"a PyTorch tensor of dtype {array.dtype} is not supported; use x.dequantize()")
        dtype = check_dtype(str(array.dtype).removeprefix("torch."), "a PyTorch tensor")
        if array.is_neg():
            raise FollowedError(
                "a PyTorch tensor stored with the other sign, as the imaginary part of a conjugate is, is not "
                "supported here; use x.resolve_neg()."
            )
        if not OPERATOR.runs:
            _check_gradients(torch, array)
            _check_traced(torch)
        device = array.device.index if array.device.type == "cuda" else None
        writable = not array.is_inference() or torch.is_inference_mode_enabled()
        return View(shape, tuple(stride * ITEM_NBYTES[dtype] for stride in strides), dtype, address, device, writable)

    def signature(self, array: Any) -> tuple[int, Hashable]:
        vars(self)["signature"] = quick = _signature_with(self.view)  # in place of this method
        return quick(array)

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def empty(self, shape: tuple[int, ...], like: Any, stream: Any = None) -> Any:
        if stream is None:
            return like.new_empty(shape)
        current, use = self._switch
        if current is None or use is None or sys.modules["torch"].cuda.current_device() != stream.device_index:
            with sys.modules["torch"].cuda.stream(stream):
                return like.new_empty(shape)
        before = current(stream.device_index)
        use(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)
        try:
            return like.new_empty(shape)
        finally:
            use(stream_id=before[0], device_index=before[1], device_type=before[2])

    def empty_bytes(self, nbytes: int, like: Any, stream: Any = None) -> Any:
        torch = sys.modules["torch"]
        with torch.cuda.stream(stream):  # None: the current one
            return torch.empty(nbytes, dtype=torch.uint8, device=like.device)

    def to_host(self, array: Any) -> npt.NDArray[np.float32]:
        torch = sys.modules["torch"]
        values: npt.NDArray[np.float32] = array.detach().to(torch.float32).contiguous().numpy()
        return as_rows(values)

    def from_host(self, values: npt.NDArray[np.float32], target: Any) -> None:
        torch = sys.modules["torch"]
        with torch.no_grad():
            target.copy_(torch.from_numpy(values.reshape(tuple(target.shape))))

    def in_place(self, array: Any, shape: tuple[int, int]) -> npt.NDArray[np.float32] | None:
        torch = sys.modules["torch"]
        if array.dtype != torch.float32 or not array.is_contiguous():
            return None
        self.written(array)
        values: npt.NDArray[np.float32] = array.detach().numpy()
        return values.reshape(shape)

    def written(self, array: Any) -> None:
        sys.modules["torch"].autograd.graph.increment_version(array)  # or a backward pass that saved it would be wrong

    @functools.cached_property
    def _current_stream(self) -> Any:
        cuda = sys.modules["torch"].cuda
        quick = getattr(sys.modules["torch"]._C, "_cuda_getCurrentRawStream", None)  # 3 us less
        return quick or (lambda device: cuda.current_stream(device).cuda_stream)

    @functools.cached_property
    def _switch(self) -> tuple[Any, Any]:
        """What torch.cuda.stream is made of, which takes 18 us; a third of that without its objects. The stream's own
        ``with`` keeps state in the stream, which other threads may use."""
        inside = sys.modules["torch"]._C
        return getattr(inside, "_cuda_getCurrentStream", None), getattr(inside, "_cuda_setStream", None)

    def stream(self, array: Any) -> int:
        return int(self._current_stream(array.get_device()))

    def owns(self, stream: Any) -> bool:
        # Not of an ExternalStream: if it is destroyed, torch would fail when it frees the tensor.
        return type(stream) is sys.modules["torch"].cuda.Stream

    def keeper(self, stream: Any) -> object:
        if type(stream) is not sys.modules["torch"].cuda.Stream or stream.stream_id == stream.cuda_stream:
            return None  # an external one: its number is its handle
        return True  # from torch's pool, whose streams stay

    def current(self, device: int) -> Any:
        return sys.modules["torch"].cuda.current_stream(device)

    def record(self, array: Any, stream: Any) -> bool:
        array.record_stream(stream)
        return True

    def release_cache(self) -> None:
        cuda = sys.modules["torch"].cuda
        if cuda.is_initialized():
            cuda.empty_cache()


class TorchSubclasses(TorchArrays):
    """Tensors of a class that keeps its values in a way of its own, or has none, such as FakeTensor."""

    name = "PyTorch (of a class of its own)"

    def view(self, array: Any) -> View:
        cls = type(array)
        raise FollowedError(
            f"{cls.__module__}.{cls.__qualname__} is a PyTorch tensor that keeps its values in a way of its own, or "
            "has none. It is not supported here: pass an ordinary tensor."
        )

    def signature(self, array: Any) -> tuple[int, Hashable]:
        return self.view(array).address, ()


def _signature_with(view: Callable[[Any], View]) -> Callable[[Any], tuple[int, Hashable]]:
    """:meth:`TorchArrays.signature`, with what it asks PyTorch bound: it is called for each product."""
    torch = sys.modules["torch"]
    forward, low = torch.autograd.forward_ad, LOW
    modes, transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
    tracing = torch._C._is_tracing

    def signature(array: Any) -> tuple[int, Hashable]:
        address = array.data_ptr()
        if (
            array.requires_grad
            or array.is_neg()
            or address < low
            or forward._current_level >= 0
            or modes()
            or transforms()
            or tracing()
        ):
            view(array)  # what is followed, or refused, may change from call to call
        return address, (array.shape, array.stride(), array.dtype, array.device)

    return signature


def _not_in_memory(torch: Any, array: Any) -> ArrayError:
    """Why a tensor has no address, and what would have one."""
    if torch._C._functorch.is_functorch_wrapped_tensor(array):
        return FollowedError(
            "a PyTorch tensor inside of torch.func (vmap, grad, jvp) stands for others, and is not supported here."
        )
    if array.is_nested:
        return ArrayError("a nested PyTorch tensor is not supported; use x.to_padded_tensor(0.0), or its parts")
    if array.layout != torch.strided:
        return ArrayError(f"a PyTorch tensor of layout {array.layout} is not supported; use x.to_dense()")
    return ArrayError(f"a PyTorch tensor on {array.device} without values is not supported; pass one with values")


def _check_traced(torch: Any) -> None:
    """What a trace, a mode or a transform of PyTorch is to see."""
    followed = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    if followed or torch._C._is_tracing():
        raise FollowedError(
            "a trace, a mode or a transform of PyTorch (torch.jit.trace, make_fx, torch.func) does not see what is "
            "done here, and would keep the result of this x. Call it outside."
        )


def _check_gradients(torch: Any, array: Any) -> None:
    """What autograd follows: the product would come back without its gradient."""
    if array.requires_grad and torch.is_grad_enabled():
        raise FollowedError(
            "a PyTorch tensor that requires grad is not supported here, for the result would have no gradient. Pass "
            "x.detach() (out.detach() as out), or call qmm under torch.no_grad()."
        )
    forward = torch.autograd.forward_ad
    if forward._current_level >= 0 and forward.unpack_dual(array).tangent is not None:
        raise FollowedError(
            "a PyTorch tensor with a tangent (forward-mode AD) is not supported here, for the result would have none. "
            "Pass x.detach()."
        )
