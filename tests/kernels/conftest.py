"""Compiles the CUDA kernels of ``test_ptx.py`` in other processes, while other tests run."""

from __future__ import annotations

from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import tiers
from ptx_compile import Compiled, compile_spec, pool
from ptx_kernels import Spec, groups

WORKERS = pytest.StashKey[ProcessPoolExecutor]()
COMPILED = pytest.StashKey[dict[Spec, Future[Compiled]]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with the kernels that the selected tests ask for, whatever tests come before those."""
    if session.config.option.collectonly:
        return
    items = [item for item in session.items if isinstance(item, pytest.Function) and "workers" in item.fixturenames]
    names = dict.fromkeys(item.callspec.params.get("group") for item in items if hasattr(item, "callspec"))
    every = groups(tiers.every)
    specs = {spec: targets for name in names if name in every for spec, targets in every[name].items()}
    if items:
        workers = session.config.stash[WORKERS] = pool()
        believing = not tiers.every
        session.config.stash[COMPILED] = {
            spec: workers.submit(compile_spec, spec, targets, believing) for spec, targets in specs.items()
        }


def pytest_sessionfinish(session: pytest.Session) -> None:
    workers = session.config.stash.get(WORKERS, None)
    if workers is not None:
        workers.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def workers(request: pytest.FixtureRequest) -> ProcessPoolExecutor:
    """``submit(compile_spec, spec, targets)``, and the like."""
    return request.config.stash[WORKERS]


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest, workers: ProcessPoolExecutor) -> dict[Spec, Future[Compiled]]:
    """The kernels of the groups that parameters name."""
    return request.config.stash[COMPILED]
