"""Compiles the CUDA kernels of ``test_ptx.py`` in other processes, from the first test of this folder on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from ptx_compile import GROUPS, Compiled, Spec, compile_spec, pool


@pytest.fixture(scope="session")
def workers() -> Iterator[ProcessPoolExecutor]:
    executor = pool()
    yield executor
    executor.shutdown(cancel_futures=True)


@pytest.fixture(scope="session", autouse=True)
def compiled(workers: ProcessPoolExecutor, request: pytest.FixtureRequest) -> dict[Spec, Future[Compiled]]:
    """The kernels that the selected tests ask for, under way while other tests run (seven minutes of two CPUs)."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    groups = dict.fromkeys(
        callspec.params["group"] for callspec in callspecs if callspec and "group" in callspec.params
    )
    return {
        spec: workers.submit(compile_spec, spec, targets)
        for group in groups
        for spec, targets in GROUPS.get(group, {}).items()
    }
