"""Products inside other people's captures: what is captured is right, and what cannot be breaks no capture."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from busy import pool_nbytes, stream_of_its_own, synchronize
from captures import MODES, Captured, activations, captured_by_torch, product, replayed
from children import run_python
from numba import cuda

import qmm

N, K, M = 256, 4096, 8192


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, N])
def test_products_are_captured_after_a_warm_up_on_another_stream(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator, mode: str, n: int
) -> None:
    """As PyTorch's documentation says."""
    dtype = torch.float32 if n == 1 else torch.float16
    x, other = activations(torch, rng, n, dtype), activations(torch, rng, n, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            engine.matmul("w", x)
    torch.cuda.current_stream().wait_stream(side)
    right = product(engine, other)
    graph, y = captured_by_torch(torch, lambda: engine.matmul("w", x), mode)
    x.copy_(other)
    graph.replay()
    synchronize()
    assert torch.equal(y, right)


@pytest.mark.parametrize("mode", MODES)
def test_products_with_the_same_activations_are_captured(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator, mode: str
) -> None:
    x, other = activations(torch, rng), activations(torch, rng)
    engine.matmul_each(["w", "w"], x)
    right = product(engine, other)
    graph, results = captured_by_torch(torch, lambda: engine.matmul_each(["w", "w"], x), mode)
    x.copy_(other)
    graph.replay()
    synchronize()
    assert all(torch.equal(y, right) for y in results)


COLD = """
import qmm, torch
from captures import Captured
from busy import synchronize

model = qmm.open(sys.argv[1])
for n, dtype in ((256, torch.float16), (1, torch.float32)):
    x, other = (torch.randn(n, 4096, device="cuda").to(dtype) for _ in range(2))
    with qmm.Engine(model, "cuda", "device") as engine:
        captured = Captured(torch, lambda: engine.matmul("w", x))
        captured.check()
        x.copy_(other)
        captured.graph.replay()
        synchronize()
        right = torch.equal(engine.matmul("w", other), engine.matmul("w", x))
        if captured.refusal is None:
            right = right and torch.equal(captured.value, engine.matmul("w", x))
        print(n, "right" if right else "WRONG", captured.refusal or "captured", flush=True)
"""


def test_the_very_first_call_of_a_process_in_a_capture_is_right_or_refused(model_path: Path, torch: Any) -> None:
    done = run_python(COLD, model_path)
    assert done.returncode == 0, done.stdout + done.stderr
    many, one = done.stdout.splitlines()
    assert many.startswith("256 right")
    assert one.startswith("1 right")


def test_two_graphs_of_one_stream_are_replayed_at_once(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator
) -> None:
    xs, stream = [activations(torch, rng), activations(torch, rng)], torch.cuda.Stream()
    rights = [product(engine, x) for x in xs]
    captured = [captured_by_torch(torch, lambda x=x: engine.matmul("w", x), stream=stream) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(10):
        for (graph, y), other in zip(captured, streams, strict=True):
            with torch.cuda.stream(other):
                y.zero_()
                graph.replay()
        synchronize()
        for (_, y), right in zip(captured, rights, strict=True):
            assert torch.equal(y, right)


def test_a_graph_is_replayed_beside_calls_on_the_stream_that_it_was_captured_on(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator
) -> None:
    x, eager, stream, other = activations(torch, rng), activations(torch, rng), torch.cuda.Stream(), torch.cuda.Stream()
    right, right_eager = product(engine, x), product(engine, eager)
    graph, y = captured_by_torch(torch, lambda: engine.matmul("w", x), stream=stream)
    out = torch.empty_like(right_eager)
    for _ in range(10):
        y.zero_()
        synchronize()
        with torch.cuda.stream(other):
            graph.replay()
        engine.matmul("w", eager, out, stream)
        synchronize()
        assert torch.equal(y, right)
        assert torch.equal(out, right_eager)
    engine.matmul("w", activations(torch, rng, 4096), stream=stream)  # which needs more workspace
    synchronize()
    y.zero_()
    graph.replay()
    synchronize()
    assert torch.equal(y, right)


def test_two_streams_of_one_capture_have_products_each(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator
) -> None:
    xs, side = [activations(torch, rng), activations(torch, rng)], torch.cuda.Stream()
    rights = [product(engine, x) for x in xs]
    outs = [torch.empty_like(right) for right in rights for _ in range(4)]

    def forked() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        for number in range(4):
            engine.matmul("w", xs[0], outs[number])
            engine.matmul("w", xs[1], outs[4 + number], side)
        main.wait_stream(side)

    graph, _ = captured_by_torch(torch, forked)
    for _ in range(5):
        for out in outs:
            out.zero_()
        graph.replay()
        synchronize()
        for number, out in enumerate(outs):
            assert torch.equal(out, rights[number // 4])


def test_a_plan_is_called_in_a_capture_and_beside_it(engine: qmm.Engine, torch: Any, rng: np.random.Generator) -> None:
    x, other = activations(torch, rng), activations(torch, rng)
    right = product(engine, other)
    y = torch.empty_like(right)
    with engine.plan([("w", x, y)]) as plan:
        plan()
        (y * 2).zero_()

        def twice() -> Any:
            plan()
            doubled = y * 2
            plan()
            return doubled

        graph, doubled = captured_by_torch(torch, twice)
        x.copy_(other)
        graph.replay()
        synchronize()
        assert torch.equal(y, right)
        assert torch.equal(doubled, right * 2)
        streams = [torch.cuda.Stream() for _ in range(2)]
        for _ in range(10):
            y.zero_()
            synchronize()
            with torch.cuda.stream(streams[0]):
                graph.replay()
            plan(streams[1])
            synchronize()
            assert torch.equal(y, right)


def test_a_plan_may_be_created_in_a_capture_or_is_refused(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator
) -> None:
    x = activations(torch, rng)
    right = product(engine, x)
    y = torch.zeros_like(right)
    made: list[qmm.Plan] = []

    def create_and_call() -> None:
        made.append(engine.plan([("w", x, y)]))
        made[0]()

    captured = Captured(torch, create_and_call)
    captured.check()
    if captured.refusal is None:
        assert torch.equal(y, right)
    plan = made[0] if made else engine.plan([("w", x, y)])
    y.zero_()
    plan()
    synchronize()
    assert torch.equal(y, right)
    plan.close()


HOST: dict[str, Callable[[qmm.Engine], np.ndarray]] = {
    "product": lambda engine: engine.matmul("s", np.ones((3, 256), np.float32)),
    "products": lambda engine: engine.matmul_each(["s"], np.ones((3, 256), np.float32))[0],
    "dequantize": lambda engine: engine.dequantize("s"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", HOST)
def test_what_waits_for_its_result_works_in_a_capture_or_is_refused(
    engine: qmm.Engine, torch: Any, what: str, mode: str
) -> None:
    expected = HOST[what](engine)
    captured = Captured(torch, lambda: HOST[what](engine), mode)
    captured.check()
    found = HOST[what](engine) if captured.value is None else captured.value
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("non_blocking", [False, True], ids=["blocking", "non-blocking"])
@pytest.mark.parametrize("warm", [False, True], ids=["another stream", "that stream"])
def test_products_are_captured_by_cupy_after_a_warm_up(
    engine: qmm.Engine, cupy: Any, rng: np.random.Generator, warm: bool, non_blocking: bool
) -> None:
    """While a blocking stream is captured, CUDA refuses questions about the default stream, which was used before."""
    values = [rng.standard_normal((N, K), np.float32).astype(np.float16) for _ in range(2)]
    x, stream = cupy.asarray(values[0]), cupy.cuda.Stream(non_blocking=non_blocking)
    right, out = engine.matmul("w", cupy.asarray(values[1])).get(), engine.matmul("w", x)
    synchronize()
    with stream:
        if warm:
            engine.matmul("w", x, out)
            stream.synchronize()
        stream.begin_capture()
        try:
            engine.matmul("w", x, out)
        finally:
            graph = stream.end_capture()
        x.set(values[1])
        out.fill(0)
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_array_equal(out.get(), right)


def test_graphs_give_their_workspace_back(engine: qmm.Engine, rng: np.random.Generator) -> None:
    """Each has 2.4 MB of it, for as long as the graph can be launched."""
    values = [rng.standard_normal((64, K), np.float32).astype(np.float16) for _ in range(2)]
    x, other = map(cuda.to_device, values)
    out, out_other = (cuda.device_array((64, M), np.float16) for _ in range(2))
    synchronize()
    expected = [engine.matmul("w", array).copy_to_host() for array in (x, other)]
    before = 0
    with stream_of_its_own() as stream:
        for number in range(52):
            with replayed(stream, lambda: engine.matmul("w", x, out, stream)) as replay:
                replay()
                engine.matmul("w", other, out_other, 0)
                synchronize()
            if number % 10 == 0:
                np.testing.assert_array_equal(out.copy_to_host(), expected[0])
                np.testing.assert_array_equal(out_other.copy_to_host(), expected[1])
            if number == 1:
                before = pool_nbytes(engine)
        lost = pool_nbytes(engine) - before
    assert lost < 16 << 20, f"{lost >> 20} MiB"


def test_a_graph_works_after_the_last_reference_to_its_engine_is_gone(
    engine: qmm.Engine, torch: Any, rng: np.random.Generator
) -> None:
    x = activations(torch, rng)
    right, made = product(engine, x), [qmm.Engine(engine.model, "cuda", "device")]
    device = made[0].gpu
    assert device is not None
    graph, y = captured_by_torch(torch, lambda: made[0].matmul("w", x))
    with pytest.warns(ResourceWarning, match="dropped before it was closed"):
        made.clear()
    gc.collect()
    y.zero_()
    graph.replay()
    synchronize()
    assert torch.equal(y, right)
    assert not device.closed
    del graph, y
    gc.collect()  # destroys the graph
    gc.collect()
    assert device.closed
