"""What qmm needs of an array library."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from qmm.arrays.view import View
from qmm.errors import ArrayError
from qmm.kernels.ops.op import DTYPES

if TYPE_CHECKING:
    from qmm.engine import Engine
    from qmm.model import Tensor

__all__ = ["ArrayKind", "FollowedError", "as_rows", "check_dtype"]


class FollowedError(ArrayError):
    """The array's library follows what is done with it, so a product by its address would be wrong. ``Engine.matmul``
    catches this, and has the library do it; anywhere else it is an error."""

    def multiply(self, engine: Engine, tensor: Tensor, mode: str, x: Any, out: Any, stream: Any) -> Any:
        """The product, by the library's own means; arguments as for :meth:`qmm.Engine.matmul`."""
        from qmm.torch_operator import product  # only PyTorch follows its arrays

        return product(engine, tensor, mode, x, out, stream, str(self))


class ArrayKind:
    """What qmm needs of an array library, of which there is one instance each."""

    name: ClassVar[str]
    on_gpu: ClassVar[bool] = True
    """Whether its arrays may be in GPU memory."""
    recycles: ClassVar[bool] = True
    """Whether it may use the GPU memory of a dropped array again while the device still works on that array."""
    names_streams: ClassVar[bool] = False
    """Whether its arrays say which stream fills them: :meth:`filled_on`."""

    def view(self, array: Any) -> View:
        """Where the array lies.

        Raises:
            FollowedError: its library follows what is done with it.
            ArrayError: its dtype is none of DTYPES, or it lies in memory that qmm cannot address.
        """
        raise NotImplementedError

    def signature(self, array: Any) -> tuple[int, Hashable]:
        """Its address, and the rest of what :meth:`view` says, in whatever form is quickest to get. Equal
        signatures mean equal views."""
        view = self.view(array)
        return view.address, (view.shape, view.strides, view.dtype, view.device, view.writable)

    def address(self, array: Any) -> int:
        """The address of its first element; 0 if it has no memory."""
        return self.signature(array)[0]

    def empty(self, shape: tuple[int, ...], like: Any, stream: Any = None) -> Any:
        """A new array of ``like``'s kind and dtype, on its device, for the library's current stream or for ``stream``,
        which is one of its own (:meth:`owns`)."""
        raise NotImplementedError

    def empty_bytes(self, nbytes: int, like: Any, stream: Any = None) -> Any:
        """A new array of bytes, otherwise as :meth:`empty`."""
        raise NotImplementedError

    def to_host(self, array: Any) -> npt.NDArray[np.float32]:
        """Its values as ``(n, k)`` float32 in host memory, row-major: the array's own memory if it has that layout."""
        raise NotImplementedError

    def from_host(self, values: npt.NDArray[np.float32], target: Any) -> None:
        """Store ``values`` into a host array of this kind with as many elements, rounded to its dtype."""
        raise NotImplementedError

    def in_place(self, array: Any, shape: tuple[int, int]) -> npt.NDArray[np.float32] | None:
        """A host array's memory as a row-major float32 matrix; None if it has another dtype or layout."""
        return None

    def written(self, array: Any) -> None:
        """Tell the library that a kernel writes to an array of its own."""

    def stream(self, array: Any) -> int:
        """The handle of the stream that the library would use now; 0 is the default stream."""
        return 0

    def owns(self, stream: Any) -> bool:
        """Whether a stream is an object of this library's, for which it can allocate."""
        return False

    def keeper(self, stream: Any) -> object:
        """What keeps a stream of this library's from being destroyed: True if nothing destroys it, the object that does
        when it is dropped, or None for a stream that somebody else may destroy."""
        return None

    def current(self, device: int) -> Any:
        """The stream that the library would use now, as its own object; None if it has none."""
        return None

    def record(self, array: Any, stream: Any) -> bool:
        """Tell the library that one of its own streams uses an array; whether it then keeps the memory of a dropped
        array until that is done."""
        return False

    def filled_on(self, array: Any) -> int:
        """The handle of the stream that fills the array; 0 if the array names none."""
        return 0

    def release_cache(self) -> None:
        """Give the device back the memory that the library merely keeps for arrays to come."""


def check_dtype(name: str, what: str) -> str:
    """The dtype's name.

    Raises:
        ArrayError: it is none of DTYPES.
    """
    if name not in DTYPES:
        raise ArrayError(f"{what} of dtype {name} is not supported; convert it to one of {', '.join(DTYPES)}")
    return name


def as_rows(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A matrix ``(n, k)``: the leading dimensions joined, each element aligned to its size. ``reshape(-1, k)`` would
    fail where k is 0."""
    if not values.flags.aligned:
        values = values.copy()
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
