"""Compiles the CUDA kernels of ``test_ptx.py`` in other processes, from the first test of this folder on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import tiers
from ptx_compile import Compiled, compile_spec, pool
from ptx_kernels import Spec, groups


@pytest.fixture(scope="session")
def workers() -> Iterator[ProcessPoolExecutor]:
    executor = pool()
    yield executor
    executor.shutdown(cancel_futures=True)


@pytest.fixture(scope="session", autouse=True)
def compiled(workers: ProcessPoolExecutor, request: pytest.FixtureRequest) -> dict[Spec, Future[Compiled]]:
    """The kernels that the selected tests ask for, under way while other tests run."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    names = dict.fromkeys(callspec.params["group"] for callspec in callspecs if callspec and "group" in callspec.params)
    return {
        spec: workers.submit(compile_spec, spec, targets, believing=not tiers.every)
        for name in names
        for spec, targets in groups(tiers.every).get(name, {}).items()
    }
