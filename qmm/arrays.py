"""The kinds of array that activations come as and results go back as: NumPy, PyTorch, CuPy and Numba.

qmm imports none of the optional three: an array's own class leads to its library, which is imported by then.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qmm.cuda import call
from qmm.errors import ArrayError, DeviceError
from qmm.kernels.ops.op import DTYPES, ITEM_NBYTES, Operand, Slab

__all__ = ["DTYPES", "KINDS", "ArrayKind", "View", "kind_of", "stream_handle"]


@dataclass(frozen=True)
class View:
    """Where an array lies and how, whichever library made it.

    Attributes:
        shape: its dimensions.
        strides: bytes from one index to the next, for each dimension.
        dtype: one of DTYPES.
        address: of its first element.
        device: CUDA's number of the GPU that holds it; None for host memory.
        writable: whether results may be stored in it.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    address: int
    device: int | None
    writable: bool = True

    @property
    def contiguous(self) -> bool:
        """Whether it is row-major without gaps."""
        expected = ITEM_NBYTES[self.dtype]
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length > 1 and stride != expected:
                return False
            expected *= length
        return True

    @property
    def aligned(self) -> bool:
        """Whether each element lies at a multiple of its size."""
        steps = [stride for length, stride in zip(self.shape, self.strides, strict=True) if length > 1]
        return math.gcd(self.address, *steps) % ITEM_NBYTES[self.dtype] == 0

    @property
    def overlaps_itself(self) -> bool:
        """Whether two elements may share memory, as in a broadcast array."""
        if 0 in self.shape:  # NumPy's strides are 0 then
            return False
        axes = sorted(
            (abs(stride), length) for length, stride in zip(self.shape, self.strides, strict=True) if length > 1
        )
        reach = ITEM_NBYTES[self.dtype]
        for stride, length in axes:
            if stride < reach:
                return True
            reach = stride * (length - 1) + reach
        return False

    @property
    def reach(self) -> tuple[int, int]:
        """Its lowest byte and the one after its highest, from ``address`` on."""
        if 0 in self.shape:
            return 0, 0
        ends = [(length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True)]
        return sum(min(0, end) for end in ends), sum(max(0, end) for end in ends) + ITEM_NBYTES[self.dtype]

    def rows(self, leading: int) -> View:
        """The same memory with all dimensions after the first ``leading`` made one.

        Raises:
            ArrayError: they do not lie at one stride.
        """
        length, stride = 1, ITEM_NBYTES[self.dtype]
        for size, step in zip(reversed(self.shape[leading:]), reversed(self.strides[leading:]), strict=True):
            if length > 1 and size > 1 and step != stride * length:
                raise ArrayError(
                    f"out has strides {self.strides}: its last {len(self.shape) - leading} dimensions are not one row. "
                    "Pass a contiguous array."
                )
            if length == 1 and size > 1:
                stride = step
            length *= size
        shape, strides = (*self.shape[:leading], length), (*self.strides[:leading], stride)
        return replace(self, shape=shape, strides=strides)

    def operand(self) -> Operand:
        """The rows of its last axis, as ops have them."""
        return Operand(self.dtype, self.shape[-1], tuple(self._slabs()), self.address % 16 == 0, self.reach)

    def _slabs(self) -> Iterator[Slab]:
        """In as few two-dimensional parts as the strides allow; no copy is needed."""
        if len(self.shape) == 1:
            yield Slab(0, 1, 0, 0, self.strides[0])
            return
        *leading, _ = self.shape
        if 0 in leading:
            return
        column_stride = self.strides[-1]
        # From the inside out, take in every axis that continues the rows so far at one stride.
        count, row_stride, axis = 1, 0, len(leading)
        while axis:
            length, stride = self.shape[axis - 1], self.strides[axis - 1]
            if count == 1:
                row_stride = stride
            elif length > 1 and stride != row_stride * count:
                break
            count *= length
            axis -= 1
        for number, index in enumerate(np.ndindex(*self.shape[:axis])):
            offset = sum(i * stride for i, stride in zip(index, self.strides, strict=False))
            yield Slab(number * count, count, offset, row_stride, column_stride)


class ArrayKind:
    """What qmm needs of an array library. One instance is made for each library."""

    name: ClassVar[str]
    on_gpu: ClassVar[bool] = True
    """Whether its arrays may be in GPU memory."""

    def view(self, array: Any) -> View:
        """Where the array lies.

        Raises:
            ArrayError: its dtype is none of DTYPES, or it lies in memory that qmm cannot address.
        """
        raise NotImplementedError

    def signature(self, array: Any) -> tuple[int, Hashable]:
        """Its address, and all else that :meth:`view` would say of it in whatever form is quickest to get."""
        view = self.view(array)
        return view.address, (view.shape, view.strides, view.dtype, view.device, view.writable)

    def empty(self, shape: tuple[int, ...], like: Any) -> Any:
        """A new array of ``like``'s kind and dtype, on its device."""
        raise NotImplementedError

    def to_host(self, array: Any) -> npt.NDArray[np.float32]:
        """Its values as ``(n, k)`` float32 in host memory, row-major: the array's own memory where it is that
        already."""
        raise NotImplementedError

    def from_host(self, values: npt.NDArray[np.float32], target: Any) -> None:
        """Store ``values``, of as many elements, into a host array of this kind, rounded to its dtype."""
        raise NotImplementedError

    def in_place(self, array: Any, shape: tuple[int, int]) -> npt.NDArray[np.float32] | None:
        """The memory of a host array of this kind as a row-major float32 matrix; None if it is no such thing."""
        return None

    def written(self, array: Any) -> None:
        """Tell the library that a kernel writes to an array of its own."""

    def stream(self, array: Any) -> int:
        """The handle of the stream that the library would use now; 0 is the default stream."""
        return 0


def _check_dtype(name: str, what: str) -> str:
    if name not in DTYPES:
        raise ArrayError(f"{what} of dtype {name} is not supported; convert it to one of {', '.join(DTYPES)}")
    return name


def _rows(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """As a matrix of as many rows as leading dimensions make, each number at a multiple of its size; NumPy finds no
    number of rows where k is 0."""
    if not values.flags.aligned:
        values = values.copy()
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


class NumPyArrays(ArrayKind):
    """``numpy.ndarray``; bfloat16 is the one of the package ml_dtypes."""

    name = "NumPy"
    on_gpu = False

    def view(self, array: np.ndarray[Any, Any]) -> View:
        dtype = _check_dtype(array.dtype.name, "a NumPy array")
        if not array.dtype.isnative:
            raise ArrayError(
                "a NumPy array of foreign byte order is not supported; use x.astype(x.dtype.newbyteorder('='))"
            )
        return View(
            array.shape, array.strides, dtype, array.__array_interface__["data"][0], None, array.flags.writeable
        )

    def empty(self, shape: tuple[int, ...], like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.empty(shape, like.dtype)

    def to_host(self, array: np.ndarray[Any, Any]) -> npt.NDArray[np.float32]:
        return _rows(np.ascontiguousarray(array, np.float32))

    def from_host(self, values: npt.NDArray[np.float32], target: np.ndarray[Any, Any]) -> None:
        with np.errstate(over="ignore"):  # float16 overflows to infinity, as on the GPU
            target[...] = values.reshape(target.shape).astype(target.dtype, copy=False)

    def in_place(self, array: np.ndarray[Any, Any], shape: tuple[int, int]) -> npt.NDArray[np.float32] | None:
        flags = array.flags
        if array.dtype != np.float32 or not (flags.c_contiguous and flags.aligned):
            return None
        return np.asarray(array).reshape(shape)


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
        dtype = _check_dtype(str(array.dtype).removeprefix("torch."), "a PyTorch tensor")
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

    def empty(self, shape: tuple[int, ...], like: Any) -> Any:
        return like.new_empty(shape, requires_grad=False)

    def to_host(self, array: Any) -> npt.NDArray[np.float32]:
        torch = sys.modules["torch"]
        values: npt.NDArray[np.float32] = array.detach().to(torch.float32).contiguous().numpy()
        return _rows(values)

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

    def stream(self, array: Any) -> int:
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)


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
    return ArrayError(f"a PyTorch tensor on {array.device} without values is not supported; make one that has them")


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


class CudaInterfaceArrays(ArrayKind):
    """What CuPy's and Numba's arrays share: the CUDA array interface."""

    def view(self, array: Any) -> View:
        described = array.__cuda_array_interface__
        dtype = _check_dtype(np.dtype(array.dtype).name, f"a {self.name} array")
        shape = tuple(map(int, described["shape"]))
        strides = described.get("strides")
        if strides is None:
            strides, step = [], ITEM_NBYTES[dtype]
            for length in reversed(shape):
                strides.insert(0, step)
                step *= length
        address, read_only = described["data"]
        return View(shape, tuple(map(int, strides)), dtype, int(address or 0), self._device(array), not read_only)

    def _device(self, array: Any) -> int:
        raise NotImplementedError


class CuPyArrays(CudaInterfaceArrays):
    """``cupy.ndarray``; bfloat16 is the one of the package ml_dtypes."""

    name = "CuPy"

    def _device(self, array: Any) -> int:
        return int(array.device.id)

    def signature(self, array: Any) -> tuple[int, Hashable]:
        data = array.data
        return data.ptr, (array.shape, array.strides, array.dtype, data.device_id)

    def empty(self, shape: tuple[int, ...], like: Any) -> Any:
        with like.device:
            return sys.modules["cupy"].empty(shape, like.dtype)

    def stream(self, array: Any) -> int:
        with array.device:
            return int(sys.modules["cupy"].cuda.get_current_stream().ptr)


class NumbaArrays(CudaInterfaceArrays):
    """``numba.cuda`` device arrays; new ones are made on the current device."""

    name = "Numba"

    def _device(self, array: Any) -> int:
        address, _ = array.__cuda_array_interface__["data"]
        if not address:  # an empty array
            return int(call("cudaGetDevice"))
        return int(call("cudaPointerGetAttributes", address).device)

    def signature(self, array: Any) -> tuple[int, Hashable]:
        data = array.gpu_data
        return data.device_pointer_value or 0, (array.shape, array.strides, array.dtype, id(data.context))

    def empty(self, shape: tuple[int, ...], like: Any) -> Any:
        from numba import cuda

        return cuda.device_array(shape, like.dtype)


_NUMPY = NumPyArrays()
_TORCH = TorchArrays()
_CUPY = CuPyArrays()
_NUMBA = NumbaArrays()


class _Kinds(dict[type, ArrayKind]):
    """Found once for each class, so that a later question is no call of Python's."""

    def __missing__(self, made: type) -> ArrayKind:
        self[made] = _find_kind(made)
        return self[made]


KINDS: dict[type, ArrayKind] = _Kinds()
"""The library that made an array, by the array's class: what :func:`kind_of` says, and raises."""


def kind_of(array: Any) -> ArrayKind:
    """The library that made an array.

    Raises:
        ArrayError: none of those that qmm knows.
    """
    return KINDS[type(array)]


def _find_kind(made: type) -> ArrayKind:
    if issubclass(made, np.ndarray):
        if made is not np.ndarray and issubclass(made, np.ma.MaskedArray):
            raise ArrayError(
                "a masked NumPy array is not supported, for the result would have no mask. Pass x.filled(0), or x.data"
            )
        return _NUMPY
    for base in made.__mro__:
        root = base.__module__.partition(".")[0]
        if root == "torch" and base.__name__ == "Tensor":
            if made.__torch_dispatch__ is not base.__torch_dispatch__:  # type: ignore[attr-defined]
                raise ArrayError(
                    f"{made.__module__}.{made.__qualname__} is a PyTorch tensor that keeps its values in a way of its "
                    "own, or has none, as under torch.export. That is not supported: pass an ordinary tensor."
                )
            return _TORCH
        if root == "cupy" and base.__name__ == "ndarray":
            return _CUPY
        if root in ("numba", "numba_cuda") and hasattr(base, "__cuda_array_interface__"):
            return _NUMBA
    raise ArrayError(
        f"{made.__module__}.{made.__qualname__} is no array that qmm knows. Pass a NumPy, CuPy, PyTorch "
        "or Numba array: np.asarray makes one of a list, cupy.asarray of whatever has the CUDA array interface."
    )


def stream_handle(stream: Any) -> int:
    """The handle of a stream of any library; a handle, any whole number, is itself.

    Raises:
        DeviceError: it is no stream that qmm knows.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        described = stream.__cuda_stream__
        return int((described() if callable(described) else described)[1])
    for attribute in ("cuda_stream", "ptr", "handle"):  # PyTorch, CuPy, Numba
        value = getattr(stream, attribute, None)
        if value is not None:
            return int(getattr(value, "value", value) or 0)
    if hasattr(stream, "__index__"):
        return operator.index(stream)
    raise DeviceError(f"{stream!r} is no stream that qmm knows: pass one of PyTorch, CuPy, Numba, or its handle")
