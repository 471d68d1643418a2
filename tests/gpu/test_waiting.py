"""What waits for whom: nothing that a call does not need, and closing for all that the engine itself has queued."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from busy import checked, is_busy, keep_busy, new_stream, seconds_of, stream_of_its_own, synchronize
from cuda.bindings import runtime
from numba import cuda

import qmm

N, K, M = 64, 4096, 8192


class Case:
    """An engine of its own, whose kernels are loaded, with arrays on the device and in host memory."""

    def __init__(self, model: qmm.Model, rng: np.random.Generator, placement: str = "device") -> None:
        self.x = cuda.to_device(rng.standard_normal((N, K), np.float32).astype(np.float16))
        self.out = cuda.device_array((N, M), np.float16)
        self.host = np.ones((3, 256), np.float32)
        self.small, self.small_out = cuda.to_device(self.host), cuda.device_array((3, 64), np.float32)
        self.new = new_stream()
        self.engine: qmm.Engine | None = None
        engine = self.engine = qmm.Engine(model, "cuda", placement)
        engine.matmul("w", self.x, self.out)
        engine.matmul("s", self.small, self.small_out)
        engine.matmul("s", self.host)
        engine.dequantize("s")
        with engine.plan([("w", self.x, self.out), ("s", self.small, self.small_out)]) as plan:
            plan()
        synchronize()
        self.right = self.out.copy_to_host()

    def close(self) -> None:
        synchronize()
        if self.engine is not None:
            self.engine.close()
        checked(runtime.cudaStreamDestroy(self.new))


@pytest.fixture
def case(engine: qmm.Engine, rng: np.random.Generator) -> Iterator[Case]:
    case = Case(engine.model, rng)
    yield case
    case.close()


def seconds_beside_others(work: Callable[[], object]) -> float:
    """How long a call takes while others keep a stream busy for half a second."""
    gc.collect()
    with stream_of_its_own() as others, cuda.defer_cleanup():  # Numba's own freeing would wait
        synchronize()
        keep_busy(others, 0.5)
        seconds = seconds_of(work)
        assert is_busy(others), f"it waited: {seconds:.2f} s"
    return seconds


def create_and_close(case: Case) -> None:
    qmm.Engine(case.engine.model, "cuda", "device").close()


def plan_and_close(case: Case) -> None:
    case.engine.plan([("w", case.x, case.out)]).close()


def plan_run_and_close(case: Case) -> None:
    with case.engine.plan([("s", case.small, case.small_out)]) as plan:
        plan(case.new)


USES: dict[str, Callable[[Case], object]] = {
    "a product of host arrays": lambda case: case.engine.matmul("s", case.host),
    "products of host arrays": lambda case: case.engine.matmul_each(["s", "s"], case.host),
    "dequantize": lambda case: case.engine.dequantize("s"),
    "the first use of a tensor": lambda case: case.engine.matmul("next", case.small, case.small_out),
    "the first use of a tensor, host arrays": lambda case: case.engine.matmul("next", case.host),
    "the first call on a stream": lambda case: case.engine.matmul("w", case.x, case.out, case.new),
    "the first calls on a stream": lambda case: case.engine.matmul_each(["w"], case.x, [case.out], case.new),
    "creating and closing an engine": create_and_close,
    "closing an engine": lambda case: case.engine.close(),
    "creating and closing a plan": plan_and_close,
    "closing a plan that ran on another stream": plan_run_and_close,
}


@pytest.mark.parametrize("use", USES)
def test_what_others_do_on_their_streams_is_not_waited_for(case: Case, use: str) -> None:
    assert seconds_beside_others(lambda: USES[use](case)) < 0.25


def test_creating_an_engine_does_not_wait_for_others(case: Case) -> None:
    made: list[qmm.Engine] = []
    model = case.engine.model
    assert seconds_beside_others(lambda: made.append(qmm.Engine(model, "cuda", "device"))) < 0.25
    made[0].close()


def close(case: Case, held: list[qmm.Plan]) -> None:
    case.engine.close()


def close_the_plan(case: Case, held: list[qmm.Plan]) -> None:
    held[0].close()


def drop(case: Case, held: list[qmm.Plan]) -> None:
    """Forget the engine and the plan, which then close themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        held.clear()
        case.engine = None
        gc.collect()


QUEUED: dict[str, Callable[[Case, qmm.Plan, int], object]] = {
    "matmul": lambda case, plan, stream: case.engine.matmul("w", case.x, case.out, stream),
    "matmul_each": lambda case, plan, stream: case.engine.matmul_each(["w"], case.x, [case.out], stream),
    "plan": lambda case, plan, stream: plan(stream),
}


@pytest.mark.parametrize("placement", ["device", "mapped"])
@pytest.mark.parametrize("end", [close, close_the_plan, drop], ids=lambda end: end.__name__)
@pytest.mark.parametrize("queued", QUEUED)
def test_what_is_queued_is_done_before_what_it_reads_is_released(
    engine: qmm.Engine, rng: np.random.Generator, placement: str, end: Callable[..., None], queued: str
) -> None:
    case = Case(engine.model, rng, placement)
    held = [case.engine.plan([("w", case.x, case.out)])]
    with stream_of_its_own() as stream:
        case.out.copy_to_device(np.zeros((N, M), np.float16))
        synchronize()
        keep_busy(stream, 0.3)
        QUEUED[queued](case, held[0], stream)
        end(case, held)
        if end is close:
            assert not is_busy(stream)
        synchronize()
        np.testing.assert_array_equal(case.out.copy_to_host(), case.right)
    case.close()
