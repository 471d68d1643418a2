"""PyTorch's tensors on a GPU: gradients, transforms, graphs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import random_blocks, write_gguf

import qmm

K, M, N = 768, 37, 3
SHAPES = {"a": ("Q6_K", (M, K)), "b": ("Q8_0", (M, K)), "experts": ("Q8_0", (3, 4, K))}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, rng = tmp_path_factory.mktemp("torch") / "small.gguf", np.random.default_rng(5)
    write_gguf(made, {name: (*shape, random_blocks(*shape, rng)) for name, shape in SHAPES.items()})
    return made


@pytest.fixture(scope="module", params=["mapped", "device"])
def engine(request: pytest.FixtureRequest, path: Path) -> Iterator[qmm.Engine]:
    with qmm.Engine(path, "cuda", request.param) as made:
        yield made


@pytest.fixture
def x(rng: np.random.Generator) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(rng.standard_normal((N, K)).astype(np.float32)).to("cuda")


def near(y: Any, terms: tuple[Any, Any], rounding: float = 2.0**-24) -> bool:
    """Whether ``y`` is the product of both, in float64, but for rounding: at most one rounding of float32 for each of
    the n products of a sum, and one of the result."""
    a, b = (each.double() for each in terms)
    bound = (a.shape[-1] + 1) * 2.0**-24 + rounding
    return bool(((y.double() - a @ b).abs() <= bound * (a.abs() @ b.abs())).all())


def weights_of(engine: qmm.Engine, name: str) -> Any:
    torch = pytest.importorskip("torch")
    weights = torch.from_numpy(engine.dequantize(name)).double()
    return weights.reshape(-1, K).to("cuda")


@pytest.mark.parametrize("place", ["cuda", "cpu"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_is_that_of_the_dequantized_weight(
    engine: qmm.Engine, x: Any, name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from qmm import torch_operator

    weights = weights_of(engine, name)
    for nbytes in (torch_operator.CHUNK_NBYTES, 4 * K * 5):
        monkeypatch.setattr(torch_operator, "CHUNK_NBYTES", nbytes)
        leaf = x.to(place).clone().requires_grad_()
        y = engine.matmul(name, leaf)
        assert torch.equal(y, engine.matmul(name, leaf.detach()))
        g = torch.randn_like(y)
        y.backward(g)
        assert leaf.grad.device == leaf.device
        assert near(leaf.grad.to("cuda"), (g.to("cuda").reshape(N, -1), weights))


@pytest.mark.parametrize("stream", ["current", "given", "default"])
def test_a_stream_of_its_own(engine: qmm.Engine, x: Any, stream: str) -> None:
    torch = pytest.importorskip("torch")
    expected, weights = engine.matmul("a", x), weights_of(engine, "a")
    leaf, out = x.clone().requires_grad_(), torch._neg_view(torch.zeros_like(expected))
    torch.cuda.synchronize()
    side = torch.cuda.default_stream() if stream == "default" else torch.cuda.Stream()
    passed = None if stream == "current" else side
    with torch.cuda.stream(side if stream == "current" else torch.cuda.current_stream()):
        y = engine.matmul("a", leaf, stream=passed)
        minus = engine.matmul("a", torch._neg_view(x), stream=passed)
        engine.matmul("a", x, out=out, stream=passed)
    side.synchronize()
    assert torch.equal(y, expected)
    assert torch.equal(minus, -expected)
    assert torch.equal(out, expected)
    y.sum().backward()
    torch.cuda.synchronize()
    assert near(leaf.grad, (torch.ones_like(y), weights))


def test_transforms(engine: qmm.Engine, x: Any) -> None:
    torch = pytest.importorskip("torch")
    func, expected, weights = torch.func, engine.matmul("a", x), weights_of(engine, "a")
    assert torch.equal(func.vmap(lambda x: engine.matmul("a", x), in_dims=1)(x.T), expected)
    gradient = func.vmap(func.grad(lambda x: engine.matmul("a", x).sum()))(x)
    assert near(gradient, (torch.ones_like(expected), weights))
    _, tangent = func.jvp(lambda x: engine.matmul("a", x), (x,), (x.flip(0),))
    assert torch.equal(tangent, engine.matmul("a", x.flip(0)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graphs_in_one_piece(engine: qmm.Engine, x: Any, backend: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = engine.model["b"]
    products: list[Callable[[Any], Any]] = [
        lambda x: torch.relu(engine.matmul("a", 2 * x)) + 1,
        lambda x: engine.matmul(tensor, x, torch.empty(N, M, device="cuda", dtype=torch.float16)) + 1,
        lambda x: torch.cat(engine.matmul_each(["a", tensor], x), -1),
    ]
    for product in products:
        torch._dynamo.reset()
        assert torch.equal(torch.compile(product, backend=backend, fullgraph=True)(x), product(x))


def test_plans_are_called_between_graphs(engine: qmm.Engine, x: Any) -> None:
    torch = pytest.importorskip("torch")
    y = torch.zeros((N, M), device="cuda")
    with engine.plan([("a", x, y)]) as plan:
        replay = torch.compile(lambda x: plan() or y + 1, backend="eager")
        assert torch.equal(replay(x), engine.matmul("a", x) + 1)


def test_traces(engine: qmm.Engine, x: Any) -> None:
    torch = pytest.importorskip("torch")
    from torch.fx.experimental.proxy_tensor import make_fx

    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return engine.matmul("a", x) + 0

    other, module = x.flip(-1), Module()
    expected = module(other)
    assert torch.equal(torch.jit.trace(module, (x,))(other), expected)
    for mode in ("real", "fake"):
        assert torch.equal(make_fx(lambda x: engine.matmul("a", x) + 0, tracing_mode=mode)(x)(other), expected)
    for strict in (False, True):
        assert torch.equal(torch.export.export(module, (x,), strict=strict).module()(other), expected)
    with pytest.raises(qmm.ArrayError, match="would not be in the trace"):
        make_fx(lambda x: engine.matmul("a", x, stream=torch.cuda.Stream()))(x)


def test_what_is_refused(engine: qmm.Engine, x: Any) -> None:
    torch = pytest.importorskip("torch")
    expected = engine.matmul("a", x)
    followed, out = x.clone().requires_grad_(), torch.zeros_like(expected, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(engine.matmul("a", followed), expected)
        assert torch.equal(engine.matmul("a", x, out=out), expected)
    for arrays in ((followed, torch.zeros_like(expected)), (x, out)):  # though prepared just now
        with pytest.raises(qmm.ArrayError, match="requires grad"):
            engine.matmul("a", *arrays)
        with pytest.raises(qmm.ArrayError, match="requires grad"):
            engine.plan([("a", *arrays)])
    with pytest.raises(qmm.ArrayError, match="resolve_neg"):
        engine.plan([("a", torch._neg_view(x), torch.zeros_like(expected))])
    freed = x.clone()
    engine.matmul("a", freed)
    freed.untyped_storage().resize_(0)
    with pytest.raises(qmm.ArrayError, match="without values"):
        engine.matmul("a", freed)


def test_autograd_notices_that_what_it_saved_is_overwritten(engine: qmm.Engine, x: Any) -> None:
    torch = pytest.importorskip("torch")
    out, factor = torch.ones_like(engine.matmul("a", x)), torch.ones((), device="cuda", requires_grad=True)
    result = (factor * out).sum()
    engine.matmul("a", x, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()
