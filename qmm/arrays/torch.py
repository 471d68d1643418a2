"""PyTorch tensors, and the reasons why some are refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from qmm.arrays.kind import ArrayKind, as_rows, check_dtype
from qmm.arrays.view import View
from qmm.errors import ArrayError
from qmm.kernels.ops.op import ITEM_NBYTES

__all__ = ["TorchArrays"]


class TorchArrays(ArrayKind):
    """``torch.Tensor`` on the CPU or a CUDA device."""

    name = "PyTorch"

    @functools.cached_property
    def _forward(self) -> Any:
        return sys.modules["torch"].autograd.forward_ad

    @functools.cached_property
    def _traces(self) -> Any:
        return sys.modules["torch"]._C._get_tracing_state

    @functools.cached_property
    def _modes(self) -> Any:
        return sys.modules["torch"]._C._len_torch_dispatch_stack

    def view(self, array: Any) -> View:
        torch = sys.modules["torch"]
        try:
            address, shape, strides = array.data_ptr(), tuple(array.shape), array.stride()
        except (RuntimeError, ValueError) as reason:
            raise _not_in_memory(torch, array) from reason
        if not address and 0 not in shape:
            raise _not_in_memory(torch, array)
        if array.device.type not in ("cpu", "cuda"):
            raise ArrayError(
                f"a PyTorch tensor on {array.device} is not supported; move it to the CPU or a CUDA device"
            )
        if array.is_quantized:
            raise ArrayError(f"a PyTorch tensor of dtype {array.dtype} is not supported; use x.dequantize()")
        dtype = check_dtype(str(array.dtype).removeprefix("torch."), "a PyTorch tensor")
        if array.is_neg():
            raise ArrayError(
                "a PyTorch tensor stored with the other sign, as the imaginary part of a conjugate is, "
                "is not supported; use x.resolve_neg()"
            )
        _check_gradients(torch, array)
        _check_traced(torch)
        device = array.device.index if array.device.type == "cuda" else None
        writable = not array.is_inference() or torch.is_inference_mode_enabled()
        return View(shape, tuple(stride * ITEM_NBYTES[dtype] for stride in strides), dtype, address, device, writable)

    def signature(self, array: Any) -> tuple[int, Hashable]:
        changing = array.requires_grad or array.is_neg() or self._forward._current_level >= 0
        if changing or self._modes() or self._traces() is not None:
            self.view(array)  # what is refused, or not, may change from call to call
        return array.data_ptr(), (array.shape, array.stride(), array.dtype, array.device)

    def address(self, array: Any) -> int:
        return int(array.data_ptr())

    def empty(self, shape: tuple[int, ...], like: Any, stream: Any = None) -> Any:
        if stream is None:
            return like.new_empty(shape)
        with sys.modules["torch"].cuda.stream(stream):
            return like.new_empty(shape)

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


def _not_in_memory(torch: Any, array: Any) -> ArrayError:
    """Why a tensor has no address, and what would have one."""
    if torch._C._functorch.is_functorch_wrapped_tensor(array):
        return ArrayError(
            "a PyTorch tensor inside of torch.func (vmap, grad, jvp) is not supported: it stands for others, which qmm "
            "does not see. Call qmm outside; matmul takes any leading dimensions at once, and computes no gradients."
        )
    if array.is_nested:
        return ArrayError("a nested PyTorch tensor is not supported; use x.to_padded_tensor(0.0), or its parts")
    if array.layout != torch.strided:
        return ArrayError(f"a PyTorch tensor of layout {array.layout} is not supported; use x.to_dense()")
    return ArrayError(f"a PyTorch tensor on {array.device} without values is not supported; pass one with values")


def _check_traced(torch: Any) -> None:
    """Refuse to be traced: the trace would have the result of this x, whatever x it is run with."""
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    if proxies is not None or torch._C._get_tracing_state() is not None:
        raise ArrayError(
            "tracing (torch.jit.trace, make_fx) does not see what qmm does, and would keep the result of this x as a "
            "constant. Use torch.compile, which calls qmm as it is."
        )


def _check_gradients(torch: Any, array: Any) -> None:
    """Refuse what autograd follows: the product would come back without its gradient."""
    if array.requires_grad and torch.is_grad_enabled():
        raise ArrayError(
            "a PyTorch tensor that requires grad is not supported: qmm computes no gradients, and the result would "
            "have none. Pass x.detach() (out.detach() as out), or call qmm under torch.no_grad()."
        )
    forward = torch.autograd.forward_ad
    if forward._current_level >= 0 and forward.unpack_dual(array).tangent is not None:
        raise ArrayError(
            "a PyTorch tensor with a tangent (forward-mode AD) is not supported: qmm computes no gradients, and the "
            "result would have none. Pass x.detach()."
        )
