"""The engine: which tensor, in which placement, by which kernel."""

from __future__ import annotations

import functools
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from qmm.arrays import KINDS, FollowedError, kind_of
from qmm.calls import Calls, check_activations, require_memory
from qmm.children import PerProcess, process
from qmm.compiled import add_engine, compiled_matmul, compiled_matmul_each
from qmm.errors import ArrayError, ClosedError, DeviceError
from qmm.host import HostProducts, cpu
from qmm.in_flight import InFlight
from qmm.loaders.closing import Resource
from qmm.memory.machine import Choice, GPUInfo, choose
from qmm.memory.placement import Weights
from qmm.model import Model, Tensor, open_model
from qmm.plan import Plan
from qmm.sequence import Step
from qmm.tracing import outside, untraced, watched

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["Engine"]


class Engine(Resource):
    """Multiplies by the tensors of a model, on one device, from one placement. A context manager.

    Threads may share it. Closing waits for the calls of other threads. Copying it returns itself. An engine that
    is dropped open emits a ResourceWarning and closes itself. In a forked child, an engine on the CPU still works; an
    engine on a GPU is refused, and closing it there frees nothing.

    KeyboardInterrupt, or another exception of a signal handler, may end any call. The threads of a product on the CPU
    are joined first. The interrupted thread can use the engine again and close it; if closing was interrupted, close it
    again. Until the process ends, an interrupt may leave behind a piece of GPU memory, a stream, or a registration of
    the file, whose pages then stay mapped and locked; and partly written results. While Numba is imported or compiles
    (seconds, at the first use of a format), an interrupt may be raised as another error, after which a new process may
    be needed, or be printed and dropped.

    Args:
        model: an open model. The engine has its own handles on the mappings. Or a path: the engine opens the model, and
            closes it with itself.
        device: ``"auto"`` (the first GPU if there is one, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or N.
        placement: where the GPU reads weights from. ``"mapped"``: the file's mapping, registered, over the link.
            ``"device"``: the quantized bytes, copied to the GPU at a tensor's first use, exactly ``nbytes`` of them.
            ``"host"``: no GPU. ``"auto"`` chooses; ``explanation`` gives the choice and the reason.
        activations: ``"int8"`` (blocks of 32 with one scale, as ggml has them) or ``"f16"`` (unquantized; on the CPU
            they stay float32). Tensors of F32, F16 and BF16 are always multiplied by unquantized activations.
        tensors: the names of the tensors that will be used, or one name; the default is all. Only their pages are
            registered.
        probe: whether registering (under ``"mapped"``) is tried in a child process first, for the first file on a
            file system. A registration that hangs or ends the process is then an error.

    Attributes:
        explanation: where the engine works and why, in one sentence.
        device: ``"cpu"`` or ``"cuda:N"``.
        placement: ``"mapped"``, ``"device"`` or ``"host"``.
        gpu: the engine's GPU, which can also time work on itself; None on the CPU.
        gpu_info: its description.

    Raises:
        DeviceError: the device cannot be used, or contradicts the placement.
        RegistrationError: CUDA refuses to register the mapping.
        TensorNotFoundError: one of ``tensors`` is not in the model.
        GGUFError: ``model`` is neither a model nor the path of one, or its file is damaged.
        ClosedError: the model was closed.
    """

    def __init__(
        self,
        model: Model | str | bytes | os.PathLike[str] | os.PathLike[bytes],
        device: str | SupportsIndex = "auto",
        placement: str = "auto",
        *,
        activations: str = "int8",
        tensors: str | Tensor | Iterable[str | Tensor] | None = None,
        probe: bool = False,
    ) -> None:
        self._closed = True  # until there is something to close
        check_activations(activations)
        self._own_model: Model | None = None
        if not isinstance(model, Model):
            model = self._own_model = open_model(model)
        self.model = model
        self._was_closed = f"{model.path}: the engine was closed. Create another one."
        self.activations = activations
        if isinstance(tensors, str | Tensor):
            tensors = [tensors]
        names = [tensor.name if isinstance(tensor, Tensor) else tensor for tensor in tensors or ()]
        chosen = [model[name] for name in (model if tensors is None else names)]
        choice = choose(device, placement, sum(tensor.nbytes for tensor in chosen))
        self._process = process.now
        self._in_flight = PerProcess(functools.partial(InFlight, self._was_closed))
        self._plans: weakref.WeakSet[Plan] = weakref.WeakSet()
        self.gpu: Device | None = None
        self._closing = threading.RLock()
        with ExitStack() as held:
            if self._own_model is not None:
                held.callback(self._own_model.close)
            if choice.gpu is not None:
                if probe and choice.placement == "mapped":
                    _try_registering(chosen, choice.gpu)
                from qmm.device import Device

                try:
                    self.gpu = held.enter_context(Device(choice.gpu.number))
                except DeviceError as reason:
                    if device != "auto" or placement != "auto":
                        raise
                    choice = Choice(None, "host", f"on the CPU, off the mapped file, because {reason}")
            self.gpu_info = choice.gpu
            self.placement = choice.placement
            self.device = "cpu" if choice.gpu is None else f"cuda:{choice.gpu.number}"
            self.explanation = choice.why
            self._weights = Weights(chosen, choice.placement, self.gpu)
            held.callback(self._weights.close)
            if self.gpu is None:
                self._host = HostProducts(self._weights, self.device, self._in_flight)
            else:
                self._calls = Calls(self._weights, self.gpu, self._in_flight, model.path)
                self._host = HostProducts(self._weights, self.device, self._in_flight, self._calls)
                held.callback(_close_all, self._plans)
                held.callback(self.gpu.drain)  # raises what failed
            self._held = held.pop_all()  # what close() releases, the last one first
        self._key = add_engine(self, model)
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def forked(self) -> bool:
        """Whether this is a forked child of the engine's process; CUDA's resources are the parent's."""
        return self._process != process.now

    @property
    def weights_nbytes(self) -> int:
        """Bytes that the placement holds now: registered pages, or copies on the device; 0 for the host."""
        return 0 if self._closed else self._weights.nbytes

    def matmul(
        self,
        tensor: str | Tensor,
        x: Any,
        out: Any = None,
        stream: Any = None,
        *,
        activations: str | None = None,
    ) -> Any:
        """``x @ W^T``: the product of activations with a tensor of the model.

        PyTorch may follow the call: autograd, ``torch.func``, ``torch.compile``, tracing and export. The gradient is
        that of the dequantized weight; rounding the activations has none. The graph of a trace needs this engine open.

        Args:
            tensor: its name, or a tensor of this engine's model.
            x: ``(..., k)`` float32, float16 or bfloat16, any leading shape, contiguous or not: a NumPy, CuPy, PyTorch
                or Numba array, in host memory or on the engine's GPU. It is only read.
            out: ``(..., m)`` of the same kind and device, of any of the three dtypes; results are stored into it.
                Not for PyTorch's autograd, as with its own functions.
            stream: where to queue the work, for arrays on the GPU: a stream of CuPy, PyTorch, Numba or cuda.core, or a
                handle. Without one, the stream that the array's library uses now. ``x`` must be ready there: a stream
                does not wait for others by itself. With host arrays the call waits.
            activations: as in the constructor, for this call.

        Returns:
            ``out``, or a new array ``(..., *tensor.shape[:-1])`` of ``x``'s kind, dtype and device.

        Raises:
            TensorNotFoundError, UnsupportedTypeError: there is no such tensor, or no kernel for it.
            ArrayError: ``x`` or ``out`` has the wrong kind, shape, dtype or device.
            ClosedError: the engine was closed.
            MappingError: the file changed since it was mapped.
            DeviceError: CUDA failed.
        """
        if seen := watched():
            return compiled_matmul(seen, self, tensor, x, out, stream, activations)
        tensor = self._tensor(tensor)
        mode = self.activations if activations is None else activations
        kind = KINDS[type(x)]
        if self.gpu is not None and kind.on_gpu:
            try:
                call, x_address, y_address = self._calls.find(tensor, mode, kind, x, out)
            except FollowedError as followed:
                return followed.multiply(self, tensor, mode, x, out, stream)
            if call is not None:
                return self._calls.queue(call, kind, x, out, x_address, y_address, stream)
        try:
            return self._host.matmul(tensor, mode, kind, x, out, stream)
        except FollowedError as followed:
            return followed.multiply(self, tensor, mode, x, out, stream)

    def matmul_each(
        self,
        tensors: str | Tensor | Iterable[str | Tensor],
        x: Any,
        outs: Sequence[Any] | None = None,
        stream: Any = None,
        *,
        activations: str | None = None,
    ) -> list[Any]:
        """The products of the same activations with several tensors, such as those of Q, K and V.

        ``x`` is quantized once for all tensors that need the same form; results are those of :meth:`matmul`.

        Args:
            tensors: their names, or tensors of this engine's model; a single one is a list of one.
            x: as for :meth:`matmul`.
            outs: one for each tensor, as for :meth:`matmul`; none of them shares memory with ``x``.
            stream: as for :meth:`matmul`.
            activations: as for :meth:`matmul`.

        Returns:
            ``outs``, or new arrays, in the order of ``tensors``.

        Raises:
            ArrayError: there are more or fewer ``outs`` than ``tensors``.
            QmmError: as :meth:`matmul`.
        """
        if seen := watched():
            return compiled_matmul_each(seen, self, tensors, x, outs, stream, activations)
        if isinstance(tensors, str | Tensor):
            tensors = [tensors]
        named = [self._tensor(tensor) for tensor in tensors]
        results = [None] * len(named) if outs is None else list(outs)
        if len(results) != len(named):
            raise ArrayError(f"{self.model.path}: {len(named)} products, but {len(results)} outs; pass one for each")
        mode, kind = self.activations if activations is None else activations, KINDS[type(x)]
        pairs = list(zip(named, results, strict=True))
        try:
            if self.gpu is not None and kind.on_gpu and named:
                calls = [self._calls.find(tensor, mode, kind, x, out) for tensor, out in pairs]
                if calls[0][0] is not None:
                    return self._calls.queue_each(calls, kind, x, results, stream)
            quantized: dict[bool, Any] = {}
            return [self._host.matmul(tensor, mode, kind, x, out, stream, quantized) for tensor, out in pairs]
        except FollowedError:
            return [self.matmul(tensor, x, out, stream, activations=mode) for tensor, out in pairs]

    @untraced
    def plan(self, products: Iterable[tuple[str | Tensor, Any, Any]], *, activations: str | None = None) -> Plan:
        """Prepare a sequence of products, to be run again and again at the cost of one launch.

        Args:
            products: ``(tensor, x, y)`` for each, as for ``matmul(tensor, x, out=y)``; the arrays are on the engine's
                GPU. Nothing is computed yet. PyTorch's autograd is not told each time that a plan writes ``y``.
            activations: as for :meth:`matmul`, for all of them.

        Returns:
            A :class:`qmm.Plan`. Calling it runs the products; the arrays are read and written in place each time.

        Raises:
            DeviceError: the engine works on the CPU, or CUDA failed.
            QmmError: as :meth:`matmul`.
        """
        if watched():
            plan: Plan = outside(Engine.plan)(self, products, activations=activations)
            return plan
        mode = self.activations if activations is None else activations
        listed = list(products)
        if self.gpu is None:
            raise DeviceError(f"a plan is a CUDA graph, but this engine works {self.explanation}")
        if not listed:
            raise ArrayError("a plan needs at least one product")
        with self._in_flight.now:
            return self._new_plan(self.gpu, listed, mode)

    def _new_plan(self, gpu: Device, listed: Sequence[tuple[str | Tensor, Any, Any]], mode: str) -> Plan:
        steps = []
        checks: dict[Path, Callable[[], None]] = {}
        for number, (named, x, y) in enumerate(listed):
            tensor = self._tensor(named)
            kind = kind_of(x)
            call, x_address, y_address = self._calls.find(tensor, mode, kind, x, y) if kind.on_gpu else (None, 0, 0)
            if call is None:
                raise ArrayError(
                    f"{self.model.path}: product {number} of the plan, with tensor {tensor.name!r}: x is in host "
                    f"memory. Move x and y to {self.device}."
                )
            checks.setdefault(tensor.info.path, call.residency.check)
            if call.prepared is not None:
                if not (x_address and y_address):
                    require_memory(kind, x, y)
                steps.append(Step(call.prepared, call.residency.lease(), x_address, y_address))
        kept = [(x, y) for _, x, y in listed]
        first = kind_of(kept[0][0])
        plan = Plan(gpu, steps, len(listed), [*checks.values()], first, kept, str(self.model.path))
        self._plans.add(plan)
        return plan

    @untraced
    def dequantize(
        self, tensor: str | Tensor, first_row: SupportsIndex = 0, last_row: SupportsIndex | None = None
    ) -> npt.NDArray[np.float32]:
        """The weights of a tensor as float32, bit for bit what ``gguf.quants.dequantize`` gives.

        Args:
            tensor: its name, or a tensor of this engine's model.
            first_row: the first of the tensor's ``m`` rows: any integer, also NumPy's.
            last_row: the end, exclusive; None for the last row.

        Returns:
            A new NumPy array, computed on the engine's device from the engine's placement: of the tensor's shape, or
            ``(last_row - first_row, k)`` if rows were given.

        Raises:
            ArrayError: the tensor has no such rows.
            QmmError: as :meth:`matmul`.
        """
        if watched():
            weights: npt.NDArray[np.float32] = outside(Engine.dequantize)(self, tensor, first_row, last_row)
            return weights
        tensor = self._tensor(tensor)
        try:  # before they are added to an address: with a uint64 that may be a float64, an int32 overflows
            first = operator.index(first_row)
            end = tensor.m if last_row is None else operator.index(last_row)
        except TypeError:
            first, end = -1, -1
        if not 0 <= first <= end <= tensor.m:
            asked = f"{first_row!r} to {'the end' if last_row is None else repr(last_row)}"
            raise ArrayError(
                f"{self.model.path}: tensor {tensor.name!r} has {tensor.m} rows, not rows {asked}. Ask for "
                f"integers with 0 <= first_row <= last_row <= {tensor.m}."
            )
        whole = first == 0 and last_row is None
        rows = end - first
        block_format = tensor.format
        with self._in_flight.now:
            residency = self._weights[tensor]
            address = residency.lease() + first * block_format.row_nbytes(tensor.k)
            if self.gpu is None:
                out = np.empty((rows, tensor.k), np.float32)
                if out.size:
                    cpu().dequantize(block_format, address, rows, tensor.k, out)
            else:
                from qmm.direct import dequantize_host

                mapped = residency.layout().mapped
                out = dequantize_host(self.gpu, block_format, address, rows, tensor.k, self.gpu.stream, mapped)
        return out.reshape(tensor.shape) if whole else out

    def address(self, tensor: str | Tensor) -> int:
        """Where the engine's device reads the tensor's first byte; good until the engine is closed."""
        tensor = self._tensor(tensor)
        with self._in_flight.now:
            return self._weights[tensor].lease()

    def close(self) -> None:
        """Wait for calls of other threads and for the device, then release copies, registrations and mappings.

        Closing twice is harmless. If KeyboardInterrupt ends it, call it again.

        Raises:
            DeviceError, RegistrationError: work that was still queued failed; or a stream that the engine used is being
                captured, so that it cannot be waited for. Nothing is released then: close again once the capture has
                ended.
        """
        self._closed = True
        if self.forked:
            return
        self._in_flight.now.end()
        with self._closing:
            if self.gpu is not None and not self.gpu.closed:
                self.gpu.stop(self)
            self._held.close()

    def __copy__(self) -> Engine:
        return self

    def __deepcopy__(self, memo: object) -> Engine:
        return self

    @property
    def _in_use(self) -> bool:
        """Also if a graph of the user's has products in it, whose replays need the weights."""
        if self.gpu is None or self.gpu.closed:
            return False
        if self.gpu._in_use:
            return True
        with self.gpu.lock:
            return self.gpu.streams.in_graphs

    def _why_not_copied(self) -> str:
        path = str(self.model.path)
        return f"pickled: it works with memory of this process. Create it in the worker: qmm.Engine({path!r})"

    def __repr__(self) -> str:
        return f"<Engine {self.explanation}{' (closed)' if self._closed else ''}>"

    def _tensor(self, tensor: str | Tensor) -> Tensor:
        if self._closed:
            raise ClosedError(self._was_closed)
        if self.gpu is not None and self._process != process.now:
            raise ClosedError(
                f"{self.model.path}: the engine was created in process {self._process}, and CUDA does not survive a "
                f"fork into {os.getpid()}. Create the engine in the child, or start it with the spawn method."
            )
        if isinstance(tensor, Tensor):
            if tensor.model is not self.model:
                raise ArrayError(
                    f"tensor {tensor.name!r} is of another open model, of {tensor.model.path}; this engine is for "
                    f"{self.model.path}. Pass the tensor's name to use this engine's."
                )
            return tensor
        if not isinstance(tensor, str):
            raise ArrayError(f"{self.model.path}: a tensor is its name or a qmm.Tensor, not {tensor!r}")
        return self.model[tensor]


def _try_registering(tensors: Iterable[Tensor], gpu: GPUInfo) -> None:
    """Register pages of the tensors' files in a child process.

    Raises:
        RegistrationError: it failed, or it hung.
    """
    from qmm.loaders.access.preflight import first_contact

    for mapping in {tensor.info.path: tensor.model.mapping(tensor.info.path) for tensor in tensors}.values():
        first_contact(mapping, gpu.number, gpu.name)


def _close_all(plans: Iterable[Plan]) -> None:
    for plan in list(plans):
        plan.close()
