"""Where the two sides of ``bench_matvec`` find their weights, and how each is made to multiply by them.

A weight is random blocks; of a large one PATTERN_NBYTES are made, and repeated. Each side has copies of its own, equal
to the byte, of which each product takes the next.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import gguf
import numpy as np
from gguf_files import FORMATS as FILE_FORMATS
from gguf_files import nbytes_of, random_blocks, write_gguf

import qmm
from benchmarks.support import ggml_gpu, peaks
from benchmarks.support.rounds import Side
from qmm import direct
from qmm.arrays import View
from qmm.graph import replay
from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.op import WeightLayout
from qmm.sequence import Step, queue_sequence

if TYPE_CHECKING:
    from qmm.device import Device

__all__ = ["GRAPH_PRODUCTS", "Pattern", "Placed", "Weight", "in_a_mapped_file", "in_device_memory", "links"]

PATTERN_NBYTES = 1 << 24
LEAST_PRODUCTS = 8
GRAPH_PRODUCTS = 128


class Weight(NamedTuple):
    """What a case multiplies by, apart from its columns."""

    part: str
    type: str
    m: int
    k: int
    placement: str

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.type, (self.m, self.k))

    def identity(self, n: int) -> str:
        """The case of ``n`` columns, as in ``-k`` and in the results."""
        return f"{self.type}-{self.m}x{self.k}-n{n}-{self.placement}"


class Pattern:
    """Random blocks, whole rows of them, that a weight repeats from its first row on."""

    def __init__(self, weight: Weight, most_nbytes: int = PATTERN_NBYTES) -> None:
        rng = np.random.default_rng(zlib.crc32(weight.identity(0).encode()))
        self.weight = weight
        self.rows = min(weight.m, max(1, most_nbytes // (weight.nbytes // weight.m)))
        self.data = np.frombuffer(random_blocks(weight.type, (self.rows, weight.k), rng), np.uint8)

    def whole(self) -> bytes:
        """The weight's bytes."""
        return np.resize(self.data, self.weight.nbytes).tobytes()

    def rows_as_float64(self, rows: np.ndarray) -> np.ndarray:
        """Some of the weight's rows, dequantized by gguf."""
        data = self.data.reshape(self.rows, -1)[rows % self.rows]
        kind = gguf.GGMLQuantizationType[self.weight.type]
        return gguf.quants.dequantize(data, kind).reshape(len(rows), self.weight.k).astype(np.float64)


class Placed:
    """Copies of a weight where qmm reads them, and, for the placement ``device``, where ggml does."""

    def __init__(self, weight: Weight, pattern: Pattern, gpu: Device, addresses: list[int]) -> None:
        self.weight, self.pattern, self.gpu, self.addresses = weight, pattern, gpu, addresses
        self.products = max(LEAST_PRODUCTS, len(addresses))
        self.ggml: ggml_gpu.Weights | None = None
        self.region: tuple[int, int] | None = None  # mapped: where all copies lie, and how many bytes that is

    @contextlib.contextmanager
    def qmm_sides(self, x: np.ndarray) -> Iterator[tuple[list[Side], Callable[[], np.ndarray]]]:
        """qmm's products as replays of graphs, and what reads the results of all of them.

        Of the main part there are two sides: products as a plan has them, and products that were queued one by one and
        know nothing of each other.
        """
        gpu, weight, n = self.gpu, self.weight, len(x)
        with contextlib.ExitStack() as made:
            x_address = allocated(gpu, x.nbytes, made)
            y_nbytes = -(-4 * n * weight.m // 256) * 256
            y_address = allocated(gpu, self.products * y_nbytes, made)
            gpu.copy(x_address, x.ctypes.data, x.nbytes, gpu.stream)
            x_view = View(x.shape, x.strides, "float32", x_address, gpu.number)

            def product(i: int) -> Step:
                address = self.addresses[i % len(self.addresses)]
                y_view = View((n, weight.m), (4 * weight.m, 4), "float32", y_address + i * y_nbytes, gpu.number)
                form = FORMATS[weight.type]
                layout = WeightLayout.at(address, weight.placement == "mapped")
                prepared = direct.prepare(gpu, form, layout, weight.m, weight.k, x_view, y_view, not form.plain)
                return Step(prepared, address, x_address, y_view.address)

            def as_in_a_plan(steps: Sequence[Step]) -> None:
                queue_sequence(gpu, steps, gpu.stream, share_activations=False)

            def one_by_one(steps: Sequence[Step]) -> None:
                for step in steps:
                    gpu.queue(*step, gpu.stream)

            products = [product(i) for i in range(self.products)]  # this compiles
            parts = [products[start : start + GRAPH_PRODUCTS] for start in range(0, self.products, GRAPH_PRODUCTS)]

            def side(name: str, queue_products: Callable[[Sequence[Step]], None]) -> Side:
                replays = [
                    made.enter_context(replay(gpu, functools.partial(queue_products, part), gpu.stream))
                    for part in parts
                ]

                def queue() -> None:
                    for replay in replays:
                        replay()

                return Side(name, queue, lambda: gpu.synchronize(gpu.stream), self.products)

            def results() -> np.ndarray:
                y = np.empty((self.products, y_nbytes // 4), np.float32)
                gpu.copy(y.ctypes.data, y_address, y.nbytes, gpu.stream)
                gpu.synchronize(gpu.stream)
                return y[:, : n * weight.m].reshape(self.products, n, weight.m)

            sides = [side("qmm", as_in_a_plan)]
            if weight.part == "main":
                sides.append(side("alone", one_by_one))
            yield sides, results

    @contextlib.contextmanager
    def ggml_product(self, x: np.ndarray) -> Iterator[ggml_gpu.Product | None]:
        """The same products by ggml, warmed up; None where it is no side."""
        if self.ggml is None:
            yield None
            return
        product = ggml_gpu.Product(self.ggml, x, self.products, GRAPH_PRODUCTS)
        try:
            product.warm_up()
            yield product
        finally:
            product.close()


def allocated(gpu: Device, nbytes: int, made: contextlib.ExitStack) -> int:
    """Device memory that lives as long as the stack."""
    address = gpu.allocate(nbytes, "a benchmark")
    made.callback(gpu.free, address)
    return address


def copies_of(weight: Weight, gpu: Device, least: int) -> int:
    return max(least, math.ceil(peaks.rotated_nbytes(gpu) / weight.nbytes))


@contextlib.contextmanager
def in_device_memory(weight: Weight, gpu: Device, backend: ggml_gpu.Backend | None) -> Iterator[Placed]:
    """Copies in device memory: one transfer from the host, then the device's own copies, for both sides."""
    pattern = Pattern(weight)
    copies = copies_of(weight, gpu, 2)
    pitch = -(-weight.nbytes // 256) * 256
    with contextlib.ExitStack() as made:
        source = allocated(gpu, pattern.data.nbytes, made)
        area = allocated(gpu, copies * pitch, made)
        gpu.copy(source, pattern.data.ctypes.data, pattern.data.nbytes, gpu.stream)

        def fill(address: int) -> None:
            peaks.filled(gpu, address, weight.nbytes, source, pattern.data.nbytes)

        addresses = [area + i * pitch for i in range(copies)]
        for address in addresses:
            fill(address)
        placed = Placed(weight, pattern, gpu, addresses)
        if backend is not None:
            number = FILE_FORMATS[weight.type].number
            placed.ggml = ggml_gpu.Weights(backend, number, weight.m, weight.k, copies, fill)
            made.callback(placed.ggml.close)
            assert placed.ggml.nbytes == weight.nbytes
        gpu.synchronize(gpu.stream)
        yield placed


@contextlib.contextmanager
def in_a_mapped_file(weight: Weight, gpu: Device, path: Path) -> Iterator[Placed]:
    """Copies in one GGUF file that is mapped and registered, all under names of their own."""
    pattern = Pattern(weight)
    data = pattern.whole()
    count = copies_of(weight, gpu, LEAST_PRODUCTS)
    write_gguf(path, {f"copy.{i}": (weight.type, (weight.m, weight.k), data) for i in range(count)})
    try:
        with qmm.open(path) as model, qmm.Engine(model, "cuda:0", "mapped") as engine:
            addresses = [engine.address(tensor) for tensor in model.values()]
            assert engine.gpu is not None
            placed = Placed(weight, pattern, engine.gpu, addresses)
            assert addresses == sorted(addresses) and addresses[-1] - addresses[0] < count * (weight.nbytes + 32)
            placed.region = (addresses[0], addresses[-1] + weight.nbytes - addresses[0])
            yield placed
    finally:
        path.unlink()


@contextlib.contextmanager
def links(placed: Placed) -> Iterator[list[Side]]:
    """For mapped memory: a kernel that reads all of the file's weights, and the copy engine that copies them."""
    if placed.region is None:
        yield []
        return
    gpu, (source, nbytes) = placed.gpu, placed.region
    reading = mapped_reading(gpu, source, nbytes)
    with contextlib.ExitStack() as made:
        stored = made.enter_context(peaks.target(gpu))
        copied = allocated(gpu, nbytes, made)
        yield [
            peaks.side(gpu, source, nbytes, stored, reading.ctas, reading.in_flight),
            Side("dma", lambda: gpu.copy(copied, source, nbytes, gpu.stream), lambda: gpu.synchronize(gpu.stream)),
        ]


@functools.lru_cache(maxsize=1)
def mapped_reading(gpu: Device, source: int, nbytes: int) -> peaks.Reading:
    """The best way to read these pages; tried once a file."""
    return peaks.best_reading(gpu, source, nbytes, rounds=1)
