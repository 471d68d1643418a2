"""``qmm verify --paranoid``: a user's own tensors between guards, and surrounded by NaN bytes.

A tensor's bytes are copied to memory between guards (:mod:`qmm.verify.guards`), once to its beginning and once to its
end; so are ``x`` and ``y``. Products and dequantization run there. The rest of the memory is filled with zeros, then
with 0xFF, which is NaN as float16, bfloat16 and float32. The tensor passes if

* nothing faults;
* the results are the same bits with either filler, and the bytes around ``y`` are unchanged;
* at the beginning of the memory, aligned as in the file, the results are the engine's bits; at its end, with whatever
  alignment, the weights are too, and products up to the order of float32 sums.

A fault ends the process, or its use of the GPU: all this runs in a child process, which is started again after the
tensor that ended it.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from subprocess import PIPE
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from qmm.arrays import View
from qmm.children import ending, no_start, python
from qmm.cli.report import GuardCheck
from qmm.cuda import CudaCallError
from qmm.engine import Engine
from qmm.errors import MappingError, QmmError
from qmm.loaders.closing import Closing
from qmm.loaders.files import FileIdentity, KnownFile
from qmm.model import Tensor, open_model
from qmm.verify.check import activations, modes_of
from qmm.verify.guards import DeviceGuard, Guard, HostGuard
from qmm.verify.oracle import BLOCK_WEIGHTS, Oracle, same_bits

__all__ = ["Job", "check_guarded", "work"]

CHILD = "from qmm.verify.paranoid import work; sys.exit(work())"
SIDES = ("first", "last")
"""Where a tensor lies in its memory: from the first byte on, or up to the last."""
FILLERS = (0x00, 0xFF)
REACH = 64 << 10
"""The most filler bytes."""
OF_SUMS = 1e-10
"""The NMSE that the order of float32 sums may cause: (2**-24)**2 = 4e-15 each, and few of them."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """The job of a child process: the arguments of :func:`check_guarded`, as JSON."""

    file: str
    device: str
    placement: str
    tensors: tuple[str, ...]
    columns: tuple[int, ...]
    modes: tuple[str, ...]
    seed: int
    identities: tuple[FileIdentity, ...]
    """Of the model's files (:attr:`qmm.model.Model.known`), which must be the files that a child finds at their
    names."""


def check_guarded(job: Job, done: Callable[[str], None] = lambda tensor: None) -> list[GuardCheck]:
    """Check tensors in child processes; ``done`` is called after each.

    Raises:
        QmmError: a child could not begin at all, or a file was replaced; the message is the child's.
    """
    checks: list[GuardCheck] = []
    left = list(job.tensors)
    while left:
        for found in _run_child(replace(job, tensors=tuple(left))):
            checks.append(found)
            left.remove(found.tensor)
            done(found.tensor)
    return checks


def _run_child(job: Job) -> Iterator[GuardCheck]:
    """What one child process finds, up to the first tensor that ends it, or the last."""
    where: dict[str, Any] = {}
    with TemporaryFile("w+") as errors, _started(job.file, errors) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended; its status shows it
                child.stdin.write(json.dumps(asdict(job)))
                child.stdin.close()
            for line in child.stdout:
                said = json.loads(line)
                if "error" in said:
                    raise QmmError(said["error"])
                if "check" in said:
                    where = {}
                    yield GuardCheck(**said["check"])
                else:
                    where = said
            status = child.wait()
        finally:
            child.kill()
        if status and "tensor" not in where:
            errors.seek(0)
            said = " ".join(errors.read().split())[-1000:] or "no message"
            raise QmmError(f"{job.file}: the child process that checks it {ending(status)}: {said}")
    if where:
        failure = f"{where['step']}: {where.get('failure') or 'the process ' + ending(status)}"
        yield GuardCheck(where["tensor"], where["products"], where["dequantizations"], failure)


def _started(file: str, errors: IO[str]) -> subprocess.Popen[str]:
    """A child process. Its errors go to a file: a full pipe that nobody reads would block the child."""
    try:
        return subprocess.Popen(python(CHILD), stdin=PIPE, stdout=PIPE, stderr=errors, text=True)
    except OSError as reason:
        raise QmmError(f"{file}: the child process that checks it {no_start(reason)}") from reason


def work() -> int:
    """The child: reads a job from stdin, reports its steps and findings on stdout; returns its exit status."""
    try:
        return _check_all(Job(**json.load(sys.stdin)))
    except QmmError as reason:
        _say({"error": str(reason)})
        return 1


def _check_all(job: Job) -> int:
    """The work of the child.

    Raises:
        QmmError: it cannot begin.
    """
    with open_model(job.file) as model:
        for file, identity in zip(model.known, job.identities, strict=False):  # of another number: the first differs
            KnownFile(file.path, FileIdentity(*identity)).compare(file.identity, MappingError)
        tensors = [model[name] for name in job.tensors]
        with (
            Engine(model, job.device, job.placement, tensors=job.tensors) as engine,
            _Bench(engine, tensors, job) as bench,
        ):
            try:
                for tensor in tensors:
                    _say({"check": asdict(bench.check(tensor))})
            except (QmmError, CudaCallError) as reason:
                _say({**bench.where, "failure": str(reason)})
                os._exit(1)  # after a fault on a GPU the process cannot use the GPU: nothing can be freed
    return 0


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


class _FailedError(Exception):
    """A check did not hold."""


class _Bench(Closing):
    """The memory that tensors are checked in, and the current check: ``where`` is its progress."""

    def __init__(self, engine: Engine, tensors: Sequence[Tensor], job: Job) -> None:
        self.engine = engine
        self.job = job
        self.where: dict[str, Any] = {}
        self._resources = ExitStack()
        known = [tensor for tensor in tensors if tensor.supported]
        widest = max(job.columns)
        outputs = [max(widest * tensor.m, _rows_at_once(tensor) * tensor.k) for tensor in known]
        try:
            self.weights = self._guard(max((tensor.nbytes for tensor in known), default=0), engine.placement)
            self.x = self._guard(max((4 * widest * tensor.k for tensor in known), default=0), engine.placement, False)
            self.y = self._guard(4 * max(outputs, default=0), engine.placement, False)
        except BaseException:
            self._resources.close()
            raise

    def _guard(self, nbytes: int, placement: str, of_weights: bool = True) -> Guard:
        gpu = self.engine.gpu
        guard: Guard
        if gpu is None:
            guard = HostGuard(nbytes)
        elif placement == "mapped" and of_weights:
            guard = HostGuard(nbytes, gpu.number)
        else:
            guard = DeviceGuard(nbytes, gpu.number)
        return self._resources.enter_context(guard)

    def close(self) -> None:
        """Free the memory."""
        self._resources.close()

    def check(self, tensor: Tensor) -> GuardCheck:
        """All checks of one tensor."""
        self.where = {"tensor": tensor.name, "step": "", "products": 0, "dequantizations": 0}
        if not tensor.supported:
            return GuardCheck(tensor.name, 0, 0, None)
        failure = None
        try:
            for side in SIDES:
                self._check_side(tensor, side)
        except _FailedError as reason:
            failure = f"{self.where['step']}: {reason}"
        return GuardCheck(tensor.name, self.where["products"], self.where["dequantizations"], failure)

    def _check_side(self, tensor: Tensor, side: str) -> None:
        at = _place(self.weights, tensor.nbytes, side)
        self.weights.put(at, tensor.data)
        for n, mode in itertools.product(self.job.columns, modes_of(tensor, self.job.modes)):
            x = activations(tensor, n, self.job.seed)
            own = np.asarray(self.engine.matmul(tensor, x, activations=mode)).reshape(n, tensor.m)
            what = f"product of n = {n}, {mode}, at the {side} byte that there is"
            run = functools.partial(self._product, tensor, at, x, mode, side)
            oracle = None if side == "first" else functools.partial(Oracle, tensor, x)
            self._check(tensor, at, "products", what, run, own, oracle)
        rows = _rows_at_once(tensor)
        for first in range(0, tensor.m, rows):
            last = min(first + rows, tensor.m)
            own = self.engine.dequantize(tensor, first, last)
            what = f"dequantization of rows {first} to {last}, at the {side} byte that there is"
            run = functools.partial(self._dequantization, tensor, at, first, last, side)
            self._check(tensor, at, "dequantizations", what, run, own, None)

    def _check(
        self,
        tensor: Tensor,
        at: int,
        counted: str,
        what: str,
        run: Callable[[int], Floats],
        own: Floats,
        oracle: Callable[[], Oracle] | None,
    ) -> None:
        """Run it beside each of FILLERS; the results must be the same, and the engine's.

        To the bit; with an ``oracle``, up to the order of float32 sums.
        """
        results = []
        for filler in FILLERS:
            self.where["step"] = f"{what}, beside 0x{filler:02X}"
            self.where[counted] += 1
            _say(self.where)
            _surround(self.weights, at, tensor.nbytes, filler)
            results.append(run(filler))
        self._compare(results, own, oracle)

    def _product(self, tensor: Tensor, at: int, x: Floats, mode: str, side: str, filler: int) -> Floats:
        n, m, k = len(x), tensor.m, tensor.k
        x_at = _place(self.x, x.nbytes, side)
        self.x.put(x_at, x)
        _surround(self.x, x_at, x.nbytes, filler)
        y_at = _place(self.y, 4 * n * m, side)
        self._empty(y_at, 4 * n * m, filler)
        address = self.weights.address + at if tensor.nbytes else 0
        gpu = self.engine.gpu
        if n * m and gpu is None:
            from qmm.kernels.ops.cpu import products as cpu

            x_there, y_there = _array(self.x, x_at, (n, k)), _array(self.y, y_at, (n, m))
            cpu.matmul(tensor.format, address, m, k, x_there, y_there, mode)
        elif n * m and gpu is not None:
            x_view = View((n, k), (4 * k, 4), "float32", self.x.address + x_at, gpu.number)
            y_view = View((n, m), (4 * m, 4), "float32", self.y.address + y_at, gpu.number)
            int8 = mode == "int8" and not tensor.format.plain
            from qmm import direct

            mapped = self.engine.placement == "mapped"
            direct.matmul(gpu, tensor.format, address, m, k, x_view, y_view, int8, gpu.stream, mapped)
            gpu.synchronize(gpu.stream)
        return self._result(y_at, (n, m), filler)

    def _dequantization(self, tensor: Tensor, at: int, first: int, last: int, side: str, filler: int) -> Floats:
        rows, k = last - first, tensor.k
        y_at = _place(self.y, 4 * rows * k, side) & -16  # where the kernel stores 16 bytes at a time
        self._empty(y_at, 4 * rows * k, filler)
        address = self.weights.address + at + first * tensor.format.row_nbytes(k)
        gpu = self.engine.gpu
        if rows * k and gpu is None:
            from qmm.kernels.ops.cpu import products as cpu

            cpu.dequantize(tensor.format, address, rows, k, _array(self.y, y_at, (rows, k)))
        elif rows * k and gpu is not None:
            from qmm import direct

            mapped = self.engine.placement == "mapped"
            direct.dequantize(gpu, tensor.format, address, rows, k, self.y.address + y_at, gpu.stream, mapped)
            gpu.synchronize(gpu.stream)
        return self._result(y_at, (rows, k), filler)

    def _empty(self, y_at: int, nbytes: int, filler: int) -> None:
        """Make room for results: NaN, so that what is not stored shows, among the filler."""
        self.y.fill(y_at, nbytes, 0xFF)
        _surround(self.y, y_at, nbytes, filler)

    def _result(self, y_at: int, shape: tuple[int, int], filler: int) -> Floats:
        """What lies where the results should, once it is seen that nothing else was written."""
        nbytes = 4 * math.prod(shape)
        for start, count in _neighbours(self.y, y_at, nbytes):
            if (self.y.get(start, count) != filler).any():
                raise _FailedError("bytes beside the results were written")
        return self.y.get(y_at, nbytes).view(np.float32).reshape(shape)

    def _compare(self, results: Sequence[Floats], own: Floats, oracle: Callable[[], Oracle] | None) -> None:
        one, other = results
        own = own.reshape(one.shape)
        if not same_bits(other, one):
            raise _FailedError("the results depend on what lies beside the tensor, x or y")
        if same_bits(one, own):
            return
        if oracle is None:
            raise _FailedError("the results are not the engine's")
        with np.errstate(all="ignore"):  # the oracle is slow; it is for sums that are close to zero, or overflow
            a, b = one.astype(np.float64), own.astype(np.float64)
            close = np.sum((a - b) ** 2) <= OF_SUMS * np.sum(b**2)  # NaN is not
        if not close and not oracle().nmse(one, reference=b) <= OF_SUMS:
            raise _FailedError("the results are farther from the engine's than another order of sums explains")


def _rows_at_once(tensor: Tensor) -> int:
    """Rows that are dequantized at a time."""
    return max(1, min(tensor.m, BLOCK_WEIGHTS // max(1, tensor.k)))


def _place(guard: Guard, nbytes: int, side: str) -> int:
    """The offset of so many bytes at the beginning or at the end."""
    return 0 if side == "first" else guard.nbytes - nbytes


def _neighbours(guard: Guard, at: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Offset and size of the filler before and after some bytes, as far as it is compared."""
    before, behind = min(at, REACH), min(guard.nbytes - at - nbytes, REACH)
    if before:
        yield at - before, before
    if behind:
        yield at + nbytes, behind


def _surround(guard: Guard, at: int, nbytes: int, filler: int) -> None:
    for start, count in _neighbours(guard, at, nbytes):
        guard.fill(start, count, filler)


def _array(guard: Guard, at: int, shape: tuple[int, int]) -> Floats:
    """Host memory as a matrix of float32."""
    assert isinstance(guard, HostGuard)
    return guard.view(at, 4 * math.prod(shape)).view(np.float32).reshape(shape)
