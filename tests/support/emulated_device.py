"""The CUDA kernels' own source, run by the emulator: no GPU, no compiler.

:class:`qmm.device.GPU` prepares the launches as it does for a device; only its memory and its launches are those of
:mod:`qmm.kernels.lang.targets.emulator`. So a changed kernel, schedule or layout of arguments can be checked in a
second or so::

    PYTHONPATH=tests/support python -c 'from emulated_device import run_product; print(run_product("Q4_K", 20, 512, 3))'
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import gguf
import numpy as np
from gguf_files import random_blocks
from lanes_masks import MASKS, without

from qmm.arrays import View
from qmm.device import GPU
from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.lang.fields import FieldAccess
from qmm.kernels.lang.specialize import specialize
from qmm.kernels.lang.targets import emulator
from qmm.kernels.lang.targets.emulator import EMULATOR, Memory, Region, Settings
from qmm.kernels.ops.matvec.plan import ZERO_NBYTES, Machine, Schedule, Tiling
from qmm.kernels.runtime import launch
from qmm.kernels.runtime.launch import CUDAKernel

__all__ = ["HOPPER", "EmulatedGPU", "Outcome", "Settings", "flat", "run_dequantization", "run_product"]

HOPPER = Machine(2, 232448, True)
"""A small GPU of compute capability 9.0."""
USUAL = Settings()
TOLERANCE = {True: 5e-4, False: 1e-6}
"""NMSE of one product, by whether activations are int8: see tests/gpu/test_kernels.py."""
OF_SUMS = 1e-12
"""NMSE of one product with the activations as they are once quantized: what float32 sums may lose, and far less than
one wrong weight makes."""
WEIGHTS = 3 << 52
"""Where weights lie: far from everything else."""


@functools.lru_cache(maxsize=256)
def flat(kernel: CUDAKernel, faults: frozenset[str] = frozenset()) -> Callable[..., None]:
    """The kernel's flat source, made of the operations' meanings; without the masks that are among the faults."""
    module, _, function = kernel.key["template"].rpartition(".")
    source = without(faults & MASKS.keys(), getattr(import_module(f"qmm.kernels.ops.{module}"), function))
    return specialize(source, kernel.key["constants"], EMULATOR)


class Launch:
    """Stands in for :class:`qmm.kernels.runtime.launch.Launch`."""

    def __init__(
        self,
        gpu: EmulatedGPU,
        kernel: CUDAKernel,
        device: int,
        blocks: int,
        arguments: Sequence[int],
        shared_nbytes: int,
        early: bool,
    ) -> None:
        assert len(arguments) == kernel.arguments
        assert kernel.shared or not shared_nbytes
        assert shared_nbytes <= gpu.machine.shared_nbytes, "more shared memory than a block may have"
        self.gpu = gpu
        self.kernel = kernel
        self.blocks = blocks
        self.arguments = list(arguments)
        self.shared_nbytes = shared_nbytes
        self.early = early

    def queue(self, stream: int) -> None:
        """Run it."""
        settings = self.gpu.settings
        emulator.launch(
            flat(self.kernel, settings.faults),
            self.arguments,
            memory=self.gpu.memory,
            grid=self.blocks,
            threads=self.kernel.threads,
            shared_nbytes=self.shared_nbytes,
            fields=FieldAccess(self.kernel.key["alignment"]),
            settings=settings,
            after_predecessors=not self.early,
        )


class EmulatedGPU(GPU):
    """A GPU whose memory is :attr:`memory`, and which runs what is queued at once. Use it in a ``with`` block.

    Addresses of what it allocates are multiples of 256, as cudaMalloc's, with nothing in between.
    """

    def __init__(self, machine: Machine, settings: Settings = USUAL, mapped: bool = False) -> None:
        self.memory = Memory()
        self.settings = settings
        self.mapped = mapped
        self.device = 0
        self.machine = machine
        self.multiprocessors = machine.multiprocessors
        self.stream = 0
        self._alone = True
        self._next_nbytes = 1 << 20
        self._integrated = False
        self._thread = threading.local()
        self._thread.ready = True
        self._scratch = {}
        self._made = {}
        self._products = {}
        self.lock = threading.RLock()
        self._stopped = False
        self._zeros = self.add("zeros", bytes(ZERO_NBYTES), constant=True).start
        self._patch = mock.patch.object(launch, "Launch", functools.partial(Launch, self))

    def __enter__(self) -> EmulatedGPU:
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    def add(self, name: str, content: bytes | int, constant: bool = False, shift: int = 0) -> Region:
        """Make a region of these bytes, or of so many unwritten ones, ``shift`` bytes past a multiple of 256."""
        return self.memory.add(name, content, constant=constant, shift=shift)

    def errors(self, doing: str) -> AbstractContextManager[None]:
        return nullcontext()

    def allocate(self, nbytes: int, what: str) -> int:
        return self.add(what, nbytes).start

    def free(self, address: int) -> None:
        self.memory.regions = [region for region in self.memory.regions if region.start != address]

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        if self._ours(source):
            region = self.memory.find(source, nbytes)
            at = source - region.start
            content = bytes(region.data[at : at + nbytes])
        else:
            content = ctypes.string_at(source, nbytes)
        if self._ours(target):
            region = self.memory.find(target, nbytes)
            at = target - region.start
            region.put(at, content)
        else:
            ctypes.memmove(target, content, nbytes)

    def synchronize(self, stream: int) -> None:
        """Whatever was queued is done."""

    def _ours(self, address: int) -> bool:
        return any(region.start <= address < region.end for region in self.memory.regions)

    def _in_host_memory(self, address: int) -> bool:
        return self.mapped


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    Attributes:
        result: of the kernel.
        expected: what float64 gives of gguf's weights.
        error: the squared error over the energy (NMSE).
        of_sums: the same with the activations as they are once quantized.
        reads: how often each byte of the weights was read.
        schedule: as it was cut.
        seconds: how long the run took.
    """

    result: np.ndarray
    expected: np.ndarray
    error: float
    of_sums: float
    reads: np.ndarray
    schedule: Any
    seconds: float

    def __str__(self) -> str:
        return (
            f"NMSE {self.error:.2g} ({self.of_sums:.2g} without the quantization), weights read up to "
            f"{self.reads.max()} times, {self.seconds:.2f} s: {self.schedule}"
        )


def random_weights(block_format: Format, m: int, k: int, rng: np.random.Generator, extreme: bool = False) -> bytes:
    """Random blocks."""
    return random_blocks(block_format.name, (m, k), rng, extreme=extreme)


def dequantized(block_format: Format, data: bytes, m: int, k: int) -> np.ndarray:
    """What gguf says they are."""
    kind = gguf.GGMLQuantizationType[block_format.name]
    rows = np.frombuffer(data, np.uint8).reshape(m, -1)
    return gguf.quants.dequantize(rows, kind).reshape(m, k).astype(np.float32, copy=False)


def require_alone(memory: Memory, weights: Region, nbytes: int) -> None:
    """Memory begins with the first byte of the weights and ends with the last: nothing else is near."""
    assert weights.end - weights.start == nbytes
    assert all(other is weights or other.end < weights.start - WEIGHTS // 2 for other in memory.regions)


def expected_reads(block_format: Format, tiling: Tiling, address: int, m: int, k: int) -> np.ndarray:
    """How often each byte of a tensor is copied: once for each part of a row that has a byte in the same 16."""
    row_nbytes = block_format.row_nbytes(k)
    nbytes = tiling.chunk_blocks * block_format.block_nbytes
    reads = np.zeros(m * row_nbytes, np.int32)
    for begin in range(0, m * row_nbytes, row_nbytes):
        for start in range(begin, begin + row_nbytes, nbytes):
            stop = min(start + nbytes, begin + row_nbytes)
            first = ((address + start) & -16) - address
            last = ((address + stop + 15) & -16) - address
            reads[max(0, first) : last] += 1
    return reads


def run_product(
    name: str,
    m: int,
    k: int,
    n: int,
    *,
    int8: bool = True,
    machine: Machine = HOPPER,
    shift: int = 0,
    x_shift: int = 0,
    dtype: str = "float32",
    mapped: bool = False,
    change: Callable[[Schedule], Schedule] | None = None,
    settings: Settings = USUAL,
    seed: int = 0,
) -> Outcome:
    """Multiply random blocks by random activations, and check what can be checked.

    Args:
        name: of the format.
        m: rows.
        k: weights a row.
        n: columns.
        int8: whether activations are quantized to int8; plain formats take float16 ones anyway.
        machine: the GPU.
        shift: where the tensor starts, past a multiple of 256.
        x_shift: where the activations start, likewise; past a multiple of 16 no block quantizes them for itself.
        dtype: of activations and results.
        mapped: whether the weights lie in host memory.
        change: makes another schedule of the one that the host would take.
        settings: how kernels are run.
        seed: of weights and activations.

    Raises:
        EmulatorError: a kernel did what it must not do.
        AssertionError: the results are wrong, or a byte of the weights was read less or more often than it should.
    """
    block_format = FORMATS[name]
    int8 = int8 and not block_format.plain
    rng = np.random.default_rng(seed)
    data = random_weights(block_format, m, k, rng)
    x = _rounded(rng.standard_normal((n, k)).astype(np.float32), dtype)
    item = 4 if dtype == "float32" else 2
    schedules: list[Schedule] = []
    usual = Schedule.of

    def schedule_of(*arguments: Any) -> Schedule:
        schedule = usual(*arguments)
        schedules.append(change(schedule) if change else schedule)
        return schedules[-1]

    started = time.perf_counter()
    with EmulatedGPU(machine, settings, mapped) as gpu, mock.patch.object(Schedule, "of", schedule_of):
        weights = gpu.memory.add("weights", data, constant=True, address=WEIGHTS, shift=shift)
        source = gpu.add("x", _bytes_of(x, dtype), shift=x_shift)
        target = gpu.add("y", n * m * item)
        x_view = View((n, k), (item * k, item), dtype, source.start, 0)
        y_view = View((n, m), (item * m, item), dtype, target.start, 0)
        gpu.matmul(block_format, weights.start, m, k, x_view, y_view, int8, 0)
        require_alone(gpu.memory, weights, len(data))
    seconds = time.perf_counter() - started
    y = _floats_of(target.data, dtype).reshape(n, m)
    matrix = dequantized(block_format, data, m, k).astype(np.float64)
    error, of_sums = (_nmse(y, values, matrix) for values in (x, quantized(x, int8)))
    (schedule,) = schedules
    outcome = Outcome(y, x.astype(np.float64) @ matrix.T, error, of_sums, weights.reads, schedule, seconds)
    assert target.unwritten() == 0, f"{target.unwritten()} bytes of the results were not written"
    rounding = {"float32": 0.0, "float16": 2.0**-22, "bfloat16": 2.0**-16}[dtype]
    assert error <= TOLERANCE[int8] + rounding, f"NMSE {error}"
    assert of_sums <= OF_SUMS + rounding, f"NMSE {of_sums} beside the quantization of activations"
    launches = -(-n // schedule.activations.columns)
    reads = launches * expected_reads(block_format, schedule.tiling, weights.start, m, k)
    np.testing.assert_array_equal(weights.reads, reads, "how often each byte of the weights was read")
    return outcome


def run_dequantization(
    name: str,
    m: int,
    k: int,
    *,
    machine: Machine = HOPPER,
    shift: int = 0,
    settings: Settings = USUAL,
    seed: int = 0,
) -> Outcome:
    """Dequantize random blocks with extreme scales, and check each bit; arguments and errors as above."""
    block_format = FORMATS[name]
    data = random_weights(block_format, m, k, np.random.default_rng(seed), extreme=True)
    started = time.perf_counter()
    with EmulatedGPU(machine, settings) as gpu:
        weights = gpu.memory.add("weights", data, constant=True, address=WEIGHTS, shift=shift)
        target = gpu.add("weights as float32", 4 * m * k)
        gpu.dequantize(block_format, weights.start, m, k, target.start, 0)
        require_alone(gpu.memory, weights, len(data))
    seconds = time.perf_counter() - started
    tiling = Tiling.of_dequantization(
        block_format, launch.alignment_of(weights.start | block_format.row_nbytes(k)), machine
    )
    got = np.frombuffer(target.data, np.float32).reshape(m, k)
    expected = dequantized(block_format, data, m, k)
    outcome = Outcome(got, expected, 0.0, 0.0, weights.reads, tiling, seconds)
    assert target.unwritten() == 0, f"{target.unwritten()} bytes of the results were not written"
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    reads = expected_reads(block_format, tiling, weights.start, m, k)
    np.testing.assert_array_equal(weights.reads, reads, "how often each byte of the weights was read")
    return outcome


def quantized(x: np.ndarray, int8: bool) -> np.ndarray:
    """Activations as kernels/ops/quantize.py rounds them, as float64; no row may have a block of zeros."""
    n, k = x.shape
    blocks = np.zeros((n, -(-k // 32) * 32), np.float32)
    blocks[:, :k] = x
    blocks = blocks.reshape(n, -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    if int8:
        scale = largest * np.float32(1 / 127)
        values = np.rint(blocks.astype(np.float64) * (np.float32(1) / scale))
    else:
        scale = 2.0 ** np.floor(np.log2(largest))
        values = (blocks / scale).astype(np.float16)
    return (values.astype(np.float64) * scale).reshape(n, -1)[:, :k]


def _nmse(y: np.ndarray, x: np.ndarray, matrix: np.ndarray) -> float:
    """The squared error of a product over what its terms, or their sums, amount to."""
    x = x.astype(np.float64)
    expected = x @ matrix.T
    energy = max((expected**2).sum(), ((x**2) @ (matrix.T**2)).sum())
    return float(((y - expected) ** 2).sum() / energy)


def _bytes_of(values: np.ndarray, dtype: str) -> bytes:
    """Numbers as bytes of a dtype, which they were rounded to."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


def _floats_of(data: bytes | bytearray, dtype: str) -> np.ndarray:
    """Bytes of a dtype as float32."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype).astype(np.float32)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers that a dtype holds; bfloat16 by cutting off."""
    return _floats_of(_bytes_of(values, dtype), dtype).reshape(values.shape)
