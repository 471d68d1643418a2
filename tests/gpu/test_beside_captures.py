"""Other people's captures while qmm does something else: in another thread, or because garbage is collected."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from busy import new_stream, synchronize
from captures import MODES, Captured, activations, captured_by_torch, product

import qmm


def still_right(torch: Any, engine: qmm.Engine, x: Any, right: Any) -> bool:
    return torch.equal(product(engine, x), right)


class Beside:
    """What another thread does during a capture; each is a method that returns whether it came out right.

    Arrays and streams are there before, and what is not called first is warm.
    """

    def __init__(self, engine: qmm.Engine, torch: Any, x: Any) -> None:
        self.engine, self.torch, self.x = engine, torch, x
        self.host = np.ones((3, 256), np.float32)
        self.host_right, self.weights = engine.matmul("s", self.host), engine.dequantize("s")
        self.right = product(engine, x)
        self.out, self.known, self.new = torch.zeros_like(self.right), new_stream(), new_stream()
        engine.matmul("w", x, self.out, self.known)
        synchronize()
        self.out.zero_()
        self.other = qmm.Engine(engine.model, "cuda", "device")
        self.other.matmul("s", self.host)

    def host_product(self) -> bool:
        return np.array_equal(self.engine.matmul("s", self.host), self.host_right)

    def first_product_on_a_stream(self) -> bool:
        return self.engine.matmul("w", self.x, self.out, self.new) is self.out

    def prepared_product(self) -> bool:
        return self.engine.matmul("w", self.x, self.out, self.known) is self.out

    def dequantize(self) -> bool:
        return np.array_equal(self.engine.dequantize("s"), self.weights)

    def first_use_of_a_tensor(self) -> bool:
        return bool(np.isfinite(self.other.matmul("next", self.host)).all())

    def new_engine(self) -> bool:
        with qmm.Engine(self.engine.model, "cuda", "device") as made:
            return np.array_equal(made.matmul("s", self.host), self.host_right)

    def close(self) -> bool:
        self.other.close()
        return self.other.closed


@pytest.mark.parametrize("mode", ["global", "thread_local"])
@pytest.mark.parametrize(
    "what",
    [
        "host_product",
        "first_product_on_a_stream",
        "prepared_product",
        "dequantize",
        "first_use_of_a_tensor",
        "new_engine",
        "close",
    ],
)
def test_another_thread_works_during_a_capture_and_both_survive(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator, what: str, mode: str
) -> None:
    beside = Beside(engine, torch, activations(torch, rng))
    work = getattr(beside, what)
    synchronize()
    found: list[object] = []

    def other() -> None:
        try:
            found.append(work())
        except Exception as error:  # shown below
            found.append(error)

    def thread() -> None:
        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        thread.join(60)

    captured_by_torch(torch, thread, mode)
    assert found == [True]
    if "product" in what and what != "host_product":
        assert torch.equal(beside.out, beside.right)
    beside.other.close()
    assert still_right(torch, engine, beside.x, beside.right)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["engine", "plan"])
def test_what_is_forgotten_may_be_collected_during_a_capture(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator, what: str, mode: str
) -> None:
    x = activations(torch, rng)
    right = product(engine, x)
    if what == "engine":
        forgotten: Any = qmm.Engine(engine.model, "cuda", "device")
        forgotten.matmul("s", np.ones((3, 256), np.float32))
    else:
        forgotten = engine.plan([("w", x, torch.zeros_like(right))])
        forgotten()
    cycle = [forgotten]
    cycle.append(cycle)
    held = [cycle]
    del forgotten, cycle
    synchronize()

    def collect() -> None:
        held.clear()
        gc.collect()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        captured_by_torch(torch, collect, mode)
    assert still_right(torch, engine, x, right)


def test_an_engine_that_used_the_captured_stream_is_closed_after_the_capture(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator
) -> None:
    """What it queued there before cannot be waited for, so nothing may be released."""
    x, stream = activations(torch, rng), torch.cuda.Stream()
    made = qmm.Engine(engine.model, "cuda", "device")
    made.matmul("w", x, stream=stream)
    synchronize()
    captured = Captured(torch, made.close, stream=stream)
    assert "close again once the capture has ended" in str(captured.refusal)
    assert made.gpu is not None
    assert not made.gpu.closed
    captured.check()
    made.close()
    assert made.gpu.closed
