"""Products of an engine: a call's arrays are checked, and its work prepared once for all calls with the same layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qmm.arrays import KINDS, ArrayKind, View, kind_of, stream_handle
from qmm.children import PerProcess
from qmm.copies import copy_in, copy_out
from qmm.cuda import on_device
from qmm.errors import ArrayError, OutOfMemoryError, QmmError
from qmm.in_flight import InFlight
from qmm.kernels.ops.matvec.plan import Product, plan
from qmm.kernels.ops.op import Operand, rounded
from qmm.memory.placement import Weights
from qmm.memory.residency import Residency
from qmm.model import Tensor
from qmm.sequence import Step, queue_sequence

if TYPE_CHECKING:
    from qmm.device import Device, Prepared

__all__ = [
    "ACTIVATIONS",
    "Call",
    "Calls",
    "Found",
    "check_activations",
    "check_input",
    "check_output",
    "require_memory",
]

ACTIVATIONS = ("int8", "f16")
MOST_LAUNCHES = 8192
"""Calls are kept prepared up to so many launches in all, each of which takes some 3 KiB of host memory."""


class Call(NamedTuple):
    """A prepared product for arrays of one layout, at any addresses.

    Attributes:
        prepared: what to queue; None if there are no results.
        residency: of the weight.
        shape: of the results.
        alias_range: of the product, see :class:`qmm.kernels.ops.matvec.plan.Product`.
    """

    prepared: Prepared | None
    residency: Residency
    shape: tuple[int, ...]
    alias_range: tuple[int, int] = (0, 0)


Found = tuple[Call | None, int, int]
"""A call, None if ``x`` is in host memory; the addresses of ``x`` and ``out``, the latter 0 if there is none."""


class Calls:
    """The prepared products of an engine on a GPU."""

    def __init__(self, weights: Weights, device: Device, in_flight: PerProcess[InFlight], path: object) -> None:
        """Args are the engine's; ``path`` is the model's, for messages."""
        self._weights, self._device, self._in_flight, self._path = weights, device, in_flight, path
        self._calls: dict[Hashable, Call | None] = {}
        self._launches = 0

    def find(self, tensor: Tensor, mode: str, kind: ArrayKind, x: Any, out: Any) -> Found:
        """The call for these arrays, and the addresses of both.

        Returns:
            The call, None if ``x`` is in host memory; the addresses of ``x`` and ``out``, the latter 0 if there is
            none.

        Raises:
            ArrayError: as :meth:`qmm.Engine.matmul`.
        """
        y_kind, y_address, of_y = None, 0, None
        try:
            x_address, of_x = kind.signature(x)
        except Exception:
            x_address, of_x = _described(kind, x)
        if out is not None:
            y_kind = KINDS[type(out)]
            try:
                y_address, of_y = y_kind.signature(out)
            except Exception:
                y_address, of_y = _described(y_kind, out)
        key: Hashable = (tensor, mode, kind, x_address & 15, of_x, y_kind, y_address & 3, of_y)
        call = self._calls.get(key)
        if call is None and key not in self._calls:
            call = self._new(key, tensor, mode, kind, x, out, no_alias=True)
        if call is not None:
            least, most = call.alias_range
            if least < y_address - x_address < most:
                key = (key, "overlapping")
                call = self._calls.get(key) or self._new(key, tensor, mode, kind, x, out, no_alias=False)
        return call, x_address, y_address

    def queue(self, call: Call, kind: ArrayKind, x: Any, out: Any, x_address: int, y_address: int, stream: Any) -> Any:
        """Queue a call of :meth:`find`.

        Args:
            call: the call.
            kind: of both arrays.
            x: activations.
            out: where results go; None for a new array.
            x_address: of ``x``.
            y_address: of ``out``.
            stream: where, as :meth:`qmm.Engine.matmul` takes it. A stream that is an object exists at least until the
                work is queued: the caller may have no other reference to it.

        Returns:
            ``out``, or the new array.

        Raises:
            QmmError: as :meth:`qmm.Engine.matmul`.
        """
        current = kind.stream(x)
        handle = current if stream is None else stream_handle(stream)
        if out is None:
            out = self.new(kind, kind.empty, call.shape, x, stream, handle, current)
            y_address = kind.address(out)
        else:
            kind.written(out)
        if kind.names_streams and (kind.filled_on(x) or kind.filled_on(out)):
            self.wait_for(kind, (x, out), handle)
        weights = call.residency.lease()
        if call.prepared is not None:  # if the engine is closed meanwhile, this raises ClosedError
            if not (x_address and y_address):
                require_memory(kind, x, out)
            owner = kind if handle == current else stream
            try:
                self._device.queue(call.prepared, weights, x_address, y_address, handle, 0, owner)
            except OutOfMemoryError:
                where = (stream, handle, current)
                if not kind.recycles or not self._queue_with_own_memory(
                    call, kind, x, x_address, y_address, *where, weights
                ):
                    raise
            finally:  # also after an interrupt, which may leave a part of it queued
                if handle != current and kind.recycles:
                    self.keep(kind, (x, out), stream, handle)
        return out

    def queue_each(self, found: Sequence[Found], kind: ArrayKind, x: Any, outs: list[Any], stream: Any) -> list[Any]:
        """Queue calls with the same ``x``; new arrays take the place of None among ``outs``. Arguments as for
        :meth:`queue`."""
        current = kind.stream(x)
        handle = current if stream is None else stream_handle(stream)
        steps = []
        for number, (call, x_address, y_address) in enumerate(found):
            assert call is not None
            if outs[number] is None:
                outs[number] = self.new(kind, kind.empty, call.shape, x, stream, handle, current)
                y_address = kind.address(outs[number])
            else:
                kind.written(outs[number])
            if call.prepared is not None:
                if not (x_address and y_address):
                    require_memory(kind, x, outs[number])
                steps.append(Step(call.prepared, call.residency.lease(), x_address, y_address))
        arrays = (x, *outs)
        if kind.names_streams:
            self.wait_for(kind, arrays, handle)
        owner = kind if handle == current else stream
        try:
            queue_sequence(self._device, steps, handle, True, owner)
        except OutOfMemoryError:  # nothing was queued
            for (call, x_address, _), out in zip(found, outs, strict=True):
                assert call is not None
                self.queue(call, kind, x, out, x_address, kind.address(out), stream)
        finally:  # also after an interrupt, which may leave a part of it queued
            if handle != current and kind.recycles:
                self.keep(kind, arrays, stream, handle)
        return outs

    def new(
        self, kind: ArrayKind, empty: Callable[..., Any], size: Any, x: Any, stream: Any, handle: int, current: int
    ) -> Any:
        """A new array, ``empty(size, x)``, whose memory nothing but work on the stream uses; arguments as for
        :meth:`queue`, ``handle`` of the stream and ``current`` of the one that the library would use."""
        if handle == current or not kind.recycles:
            return self._made(empty, size, x)
        if kind.owns(stream):
            return self._made(empty, size, x, stream)
        array = self._made(empty, size, x)
        self._device.order(current, handle)  # what was in this memory before may still be in use there
        return array

    def _made(self, empty: Callable[..., Any], *arguments: Any) -> Any:
        """A new array of a library's; or its error, unless the device is lost, of which ours says more."""
        try:
            return empty(*arguments)
        except Exception:
            self._device.require_usable("a new array")
            raise

    def _queue_with_own_memory(
        self, call: Call, kind: ArrayKind, x: Any, x_address: int, y_address: int, stream: Any, handle: int,
        current: int, weights: int,
    ) -> bool:  # fmt: skip
        """Queue a call whose workspace is an array of the library's, if that has memory which it merely keeps; whether
        it had."""
        assert call.prepared is not None
        nbytes = call.prepared.workspace_nbytes
        try:
            workspace = self.new(kind, kind.empty_bytes, nbytes, x, stream, handle, current)
        except QmmError:
            raise
        except Exception:  # the library's own error: ours says more
            return False
        self._device.queue(call.prepared, weights, x_address, y_address, handle, kind.address(workspace), stream)
        if handle != current:
            self.keep(kind, (workspace,), stream, handle)
        self._device.keep_for_graph(handle, workspace)
        return True

    def wait_for(self, kind: ArrayKind, arrays: Iterable[Any], handle: int) -> None:
        """Let a stream wait for those that the arrays name."""
        for array in arrays:
            named = kind.filled_on(array)
            if named and named != handle:
                self._device.order(named, handle)

    def keep(self, kind: ArrayKind, arrays: tuple[Any, ...], stream: Any, handle: int) -> None:
        """See to it that memory of arrays is not used again before the work on a stream is done, which is not the one
        that their library uses now."""
        recorded = [kind.record(array, stream) for array in arrays] if kind.owns(stream) else [False]
        if not all(recorded):
            self._device.hold(handle, arrays)

    def multiply_host(self, tensor: Tensor, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], int8: bool) -> None:
        """``y[n, m] = x[n, k] @ W^T``, both row-major in host memory, at least one result; waits for it.

        Raises:
            DeviceError: CUDA failed.
        """
        device, n = self._device, len(x)
        key = (tensor, n, int8)
        call = self._calls.get(key)
        if call is None:
            operands = Operand.contiguous(n, tensor.k), Operand.contiguous(n, tensor.m)
            prepared = self._prepare(tensor, *operands, int8, no_alias=True)
            call = self._keep(key, Call(prepared, self._weights[tensor], (n, tensor.m)))
        assert call is not None and call.prepared is not None
        results = rounded(x.nbytes)
        weights = call.residency.lease()  # not under the lock: another thread may lease, and need it
        # Threads share the staging area. The copies, too, want the device to be current: here once for all.
        with device.lock, device.undisturbed(1), device.errors("a product"), on_device(device.number):
            area, stream = device.staging(results + y.nbytes), device.stream
            copy_in(device, area, x, stream)
            device.queue(call.prepared, weights, area, area + results, stream)
            copy_out(device, y, area + results, stream)

    def _keep(self, key: Hashable, call: Call | None) -> Call | None:
        with self._device.lock:
            if key in self._calls:  # another thread prepared the same
                return self._calls[key]
            self._calls[key] = call
            self._launches += _launches(call)
            while self._launches > MOST_LAUNCHES and len(self._calls) > 1:
                oldest = next(iter(self._calls))
                self._launches -= _launches(self._calls.pop(oldest))
        return call

    def _new(
        self, key: Hashable, tensor: Tensor, mode: str, kind: ArrayKind, x: Any, out: Any, no_alias: bool
    ) -> Call | None:
        with self._in_flight.now:
            return self._keep(key, self._planned(tensor, mode, kind, x, out, no_alias))

    def _planned(self, tensor: Tensor, mode: str, kind: ArrayKind, x: Any, out: Any, no_alias: bool) -> Call | None:
        check_activations(mode)
        source = kind.view(x)
        check_input(tensor, source, f"cuda:{self._device.number}")
        if source.device is None:
            return None
        shape = (*source.shape[:-1], *tensor.shape[:-1])
        if out is None:
            target = kind.view(self._made(kind.empty, shape, x)).rows(len(source.shape) - 1)
        else:
            target = check_output(tensor, kind, source, out, shape)
        residency = self._weights[tensor]
        if not math.prod(shape):
            return Call(None, residency, shape)
        for name, view in (("x", source), ("out", target)):
            if not view.aligned:
                raise ArrayError(
                    f"{self._path}: tensor {tensor.name!r}: {name} begins at address {view.address:#x} and has "
                    f"strides {view.strides}, but a GPU reads {view.dtype} only at multiples of its size. Pass a copy."
                )
        prepared = self._prepare(tensor, source.operand(), target.operand(), mode == "int8", no_alias)
        assert isinstance(prepared.work, Product)
        return Call(prepared, residency, shape, prepared.work.alias_range)

    def _prepare(self, tensor: Tensor, x: Operand, y: Operand, int8: bool, no_alias: bool) -> Prepared:
        layout = self._weights[tensor].layout()
        architecture = self._device.architecture
        product = plan(tensor.format, tensor.m, tensor.k, layout, x, y, int8, architecture, no_alias)
        return self._device.prepare(product, f"the product with {tensor.m} x {tensor.k} {tensor.format.name}")


def _described(kind: ArrayKind, array: Any) -> tuple[int, Hashable]:
    """In place of its signature: the array's address and the rest; or an error that says why there is no address, where
    its library has one of its own."""
    view = kind.view(array)
    return view.address, view


def _launches(call: Call | None) -> int:
    """What counts towards MOST_LAUNCHES."""
    return 1 + (len(call.prepared.launches) if call is not None and call.prepared is not None else 0)


def require_memory(kind: ArrayKind, x: Any, out: Any) -> None:
    """Raise ArrayError unless each array has memory, or needs none."""
    for name, array in (("x", x), ("out", out)):
        view = kind.view(array)
        if not view.address and 0 not in view.shape:
            raise ArrayError(
                f"{name} is a {kind.name} array of shape {view.shape} without memory: its address is 0. Pass one that "
                "has values."
            )


def check_activations(activations: str) -> None:
    """Raise ArrayError unless it is one of ACTIVATIONS."""
    if activations not in ACTIVATIONS:
        raise ArrayError(f"there are no activations {activations!r}; choose one of {', '.join(ACTIVATIONS)}")


def check_input(tensor: Tensor, x: View, device: str) -> None:
    """Raise ArrayError unless a tensor can be multiplied by ``x`` on a device, ``"cpu"`` or ``"cuda:N"``."""
    what = f"{tensor.model.path}: tensor {tensor.name!r}"
    if not x.shape or x.shape[-1] != tensor.k:
        raise ArrayError(
            f"{what} has k = {tensor.k} weights a row, but x has shape {x.shape}; its last dimension must be {tensor.k}"
        )
    if x.device is not None and f"cuda:{x.device}" != device:
        raise ArrayError(
            f"{what}: x is on CUDA device {x.device}, but the engine works on {device}. "
            "Move x to host memory, or create the engine with that device."
        )


def check_output(tensor: Tensor, kind: ArrayKind, x: View, out: Any, shape: tuple[int, ...]) -> View:
    """``out`` as ``(..., m)``.

    Raises:
        ArrayError: it cannot take the product.
    """
    what = f"{tensor.model.path}: tensor {tensor.name!r}"
    if kind_of(out) is not kind:
        raise ArrayError(f"{what}: x is a {kind.name} array, but out is a {kind_of(out).name} array; use one kind")
    view = kind.view(out)
    if view.shape != shape:
        raise ArrayError(f"{what}: out has shape {view.shape}; this product has {shape}")
    if view.device != x.device:
        where = ["host memory" if device is None else f"CUDA device {device}" for device in (x.device, view.device)]
        raise ArrayError(f"{what}: x is in {where[0]}, but out in {where[1]}; use one place")
    if view.overlaps_itself:
        raise ArrayError(f"{what}: out is a broadcast array, whose elements share memory; pass a contiguous one")
    if not view.writable:
        why = "created in torch.inference_mode(), and can be written to only there"
        raise ArrayError(f"{what}: out is {why if kind.name == 'PyTorch' else 'read-only'}")
    return view.rows(len(x.shape) - 1)
