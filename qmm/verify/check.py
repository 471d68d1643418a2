"""Tensors against an oracle: dequantization bit for bit, and products against float64.

The oracle is ``gguf.quants.dequantize`` of the very bytes in the file. A product is right if its NMSE, the mean of
``(y - reference)^2 / sum(w^2)``, is within TOLERANCES, and if non-finite values are those of float64
(:mod:`qmm.verify.oracle` has the rules). The tolerances follow from how activations are stored
(:mod:`qmm.kernels.ops.quantize`), for everything after that is exact integers or float32:

``int8``
    A block of 32 values has one scale ``d = max|x| / 127``, and rounding moves a value by at most ``d / 2``. So the
    block's error has at most ``32 / (4 * 127^2) = 4.96e-4`` of its energy; for normal values it is about 3e-5.
``f16``
    Rounding to float16 moves a value by at most ``2^-11`` of itself, so the error has at most ``2^-22 = 2.4e-7`` of the
    energy. The rest of 1e-6 is for float32 sums. (On the CPU these activations stay float32.)

A weight with independent values treats the error as it treats ``x``, so the ratio passes on to ``y``, if enough results
are averaged. Hence there are at least RESULTS of them for each tensor and number of columns, from several batches of
activations where ``m * n`` is smaller.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qmm.cli.info import matching
from qmm.cli.report import RunReport, TensorCheck, VerifyReport
from qmm.cli.tables import worst
from qmm.errors import TensorNotFoundError, UnsupportedTypeError
from qmm.model import Model, Tensor
from qmm.verify.oracle import Oracle, same_bits

if TYPE_CHECKING:
    from qmm.engine import Engine

__all__ = ["TOLERANCES", "check", "checkable", "largest", "median_ms", "modes_of", "run", "usable", "verify"]

TOLERANCES = {"int8": 5e-4, "f16": 1e-6}
RESULTS = 64

Floats = npt.NDArray[np.float32]


def modes_of(tensor: Tensor, modes: Sequence[str]) -> tuple[str, ...]:
    """The ``modes`` that the tensor is checked with; always ``f16`` for plain types."""
    return ("f16",) if tensor.format.plain else tuple(modes)


def activations(tensor: Tensor, count: int, seed: int) -> Floats:
    """``(count, k)`` standard normal float32, always the same for a seed and a tensor's name."""
    random = np.random.default_rng([seed, zlib.crc32(tensor.name.encode(errors="surrogateescape"))])
    return random.standard_normal((count, tensor.k), dtype=np.float32)


def batches_for(tensor: Tensor, n: int) -> int:
    """Products of ``n`` columns that give at least RESULTS results."""
    return -(-RESULTS // max(1, tensor.m * n))


def check(
    engine: Engine, tensor: Tensor, columns: Sequence[int], modes: Sequence[str], seed: int = 0, exact: bool = True
) -> TensorCheck:
    """Check one tensor.

    Args:
        engine: whose results are checked.
        tensor: of its model.
        columns: numbers of columns ``n`` to multiply by, each on its own.
        modes: activations, of TOLERANCES.
        seed: of the activations.
        exact: whether to compare the dequantized weights too.
    """
    nmse: dict[str, float | None] = dict.fromkeys(TOLERANCES)
    if not tensor.supported:
        return TensorCheck(tensor.name, tensor.type, tensor.shape, tensor.nbytes, False, None, nmse, True)
    same = True

    def seen(first: int, last: int, weights: Floats) -> None:
        nonlocal same
        if exact and same:
            same = same_bits(engine.dequantize(tensor, first, last).reshape(weights.shape), weights)

    x = activations(tensor, max(n * batches_for(tensor, n) for n in columns), seed)
    oracle = Oracle(tensor, x, seen)
    used = modes_of(tensor, modes)
    for mode in used:
        nmse[mode] = worst(_nmse(engine, tensor, n, mode, x, oracle) for n in columns)
    right = all((nmse[mode] or 0.0) <= TOLERANCES[mode] for mode in used)  # NaN is not
    return TensorCheck(
        tensor=tensor.name,
        type=tensor.type,
        shape=tensor.shape,
        nbytes=tensor.nbytes,
        supported=True,
        bit_exact=same if exact else None,
        nmse=nmse,
        ok=right and same,
    )


def _nmse(engine: Engine, tensor: Tensor, n: int, mode: str, x: Floats, oracle: Oracle) -> float:
    """The NMSE of products of ``n`` columns, over as many batches of ``x`` as give RESULTS results."""
    rows = batches_for(tensor, n) * n
    batches = (x[first : first + n] for first in range(0, rows, n))
    y = [np.asarray(engine.matmul(tensor, batch, activations=mode)).reshape(n, tensor.m) for batch in batches]
    return oracle.nmse(np.concatenate(y), slice(0, rows))


def checkable(model: Model, pattern: str) -> list[Tensor]:
    """The tensors that match a pattern, as :func:`qmm.cli.info.matching` has it.

    Raises:
        PatternError: none does.
        TensorNotFoundError: the model has no tensors at all.
        UnsupportedTypeError: qmm can multiply by none of those that match.
    """
    if not model:
        raise TensorNotFoundError(f"{model.path}: holds no tensors: nothing to verify.")
    chosen = matching(model, pattern)
    if not any(tensor.supported for tensor in chosen):
        types = ", ".join(dict.fromkeys(tensor.type for tensor in chosen))
        raise UnsupportedTypeError(
            f"{model.path}: has {len(chosen)} tensors that match {pattern!r}, none of a type that qmm has a kernel for "
            f"({types}): nothing to verify."
        )
    return chosen


def verify(
    engine: Engine,
    model: Model,
    tensors: Sequence[Tensor],
    columns: Sequence[int],
    modes: Sequence[str],
    seed: int = 0,
    done: Callable[[Tensor], None] = lambda tensor: None,
) -> VerifyReport:
    """Check ``tensors``; ``done`` is called after each."""
    started = time.perf_counter()
    checks = []
    for tensor in tensors:
        checks.append(check(engine, tensor, columns, modes, seed))
        done(tensor)
    return VerifyReport(
        file=str(model.path),
        device=engine.device,
        placement=engine.placement,
        explanation=engine.explanation,
        n=tuple(columns),
        tolerances=TOLERANCES,
        seconds=time.perf_counter() - started,
        checks=tuple(checks),
    )


def median_ms(engine: Engine, tensor: Tensor, n: int, mode: str, repeats: int, seed: int = 0) -> float:
    """Median milliseconds of a product: device time with arrays on the GPU, wall time on the CPU. Compiles first."""
    x = activations(tensor, n, seed)
    if engine.device == "cpu":
        out = np.empty((n, tensor.m), np.float32).reshape(n, *tensor.shape[:-1])
        times = [_wall_ms(engine, tensor, x, out, mode) for _ in range(repeats + 1)]
        return statistics.median(times[1:])
    from numba import cuda

    gpu = engine.gpu
    assert gpu is not None
    from qmm.graph import time_ms

    with cuda.gpus[gpu.number]:
        x_device = cuda.to_device(x)
        out_device = cuda.device_array((n, *tensor.shape[:-1]), np.float32)
        work = functools.partial(engine.matmul, tensor, x_device, out_device, gpu.stream, activations=mode)
        work()
        gpu.synchronize(gpu.stream)
        return statistics.median(time_ms(gpu, work, gpu.stream, repeats))


def _wall_ms(engine: Engine, tensor: Tensor, x: Floats, out: Floats, mode: str) -> float:
    started = time.perf_counter()
    engine.matmul(tensor, x, out, activations=mode)
    return (time.perf_counter() - started) * 1e3


def run(engine: Engine, tensor: Tensor, n: int, mode: str, seed: int, repeats: int) -> RunReport:
    """Multiply random activations by one tensor, time it and check it.

    Raises:
        UnsupportedTypeError: there is no kernel for its type.
    """
    (mode,) = modes_of(tensor, (mode,))
    x = activations(tensor, n, seed)
    y = np.asarray(engine.matmul(tensor, x, activations=mode))
    ms = median_ms(engine, tensor, n, mode, repeats, seed)
    nmse = check(engine, tensor, (n,), (mode,), seed, exact=False).nmse[mode]
    return RunReport(
        file=str(engine.model.path),
        tensor=tensor.name,
        type=tensor.type,
        shape=tensor.shape,
        nbytes=tensor.nbytes,
        device=engine.device,
        placement=engine.placement,
        explanation=engine.explanation,
        activations=mode,
        n=n,
        seed=seed,
        y=tuple(y.reshape(-1)[:8].tolist()),
        ms=ms,
        repeats=repeats,
        gb_per_s=tensor.nbytes / ms / 1e6 if ms else math.nan,
        nmse=math.nan if nmse is None else nmse,
        tolerance=TOLERANCES[mode],
    )


def usable(model: Model) -> list[Tensor]:
    """The tensors that qmm can multiply by, empty ones left out."""
    return [tensor for tensor in model.values() if tensor.supported and tensor.nbytes]


def largest(model: Model) -> Tensor | None:
    """The tensor with the most bytes that qmm can multiply by, a matrix if there is one."""
    return max(usable(model), key=lambda tensor: (len(tensor.shape) == 2, tensor.nbytes), default=None)
