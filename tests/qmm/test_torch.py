"""PyTorch's tensors and its compiler: results as without them, gradients never dropped in silence. Needs torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import K, M, write_small_model

import qmm

torch = pytest.importorskip("torch", reason="the extra `torch` brings it")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("torch") / "small.gguf"
    write_small_model(made, np.random.default_rng(3))
    return made


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[qmm.Engine]:
    with qmm.Engine(path, "cpu") as made:
        yield made


@pytest.fixture
def x(rng: np.random.Generator) -> Any:
    return torch.from_numpy(rng.standard_normal((2, K), dtype=np.float32))


def closed_plan(engine: qmm.Engine) -> qmm.Plan:
    """What is left of a plan on a GPU; to call it is an error."""
    plan = object.__new__(qmm.Plan)
    plan._closed, plan._first, plan._engine = True, None, engine
    return plan


class TestCompile:
    """``torch.compile`` calls qmm as it is, and compiles what is around the call."""

    @pytest.fixture(autouse=True)
    def _compile_anew(self) -> Iterator[None]:
        torch._dynamo.reset()
        with warnings.catch_warnings():
            # Dynamo warns of what it cannot follow, which is to be nothing of ours.
            warnings.filterwarnings("error", "(?i).*dynamo (does not know|detected)", UserWarning)
            yield
        torch._dynamo.reset()

    def agree(self, function: Callable[..., Any], *arguments: Any, backend: str = "eager") -> Any:
        """Call the function compiled, twice, and as it is; return how the compiled one was cut into graphs."""
        expected = function(*arguments)
        compiled = torch.compile(function, backend=backend)
        for _ in range(2):
            np.testing.assert_array_equal(compiled(*arguments), expected)
        torch._dynamo.reset()
        return torch._dynamo.explain(function)(*arguments)

    def test_matmul_is_called_between_two_graphs(self, engine: qmm.Engine, x: Any) -> None:
        cut = self.agree(lambda x: torch.relu(engine.matmul("a", 2 * x)), x)
        assert (cut.graph_count, cut.graph_break_count) == (2, 1)
        assert "qmm's kernels" in str(cut.break_reasons[0].reason)

    def test_matmul_itself_may_be_compiled(self, engine: qmm.Engine, x: Any) -> None:
        self.agree(engine.matmul, "a", x)

    def test_matmul_of_numpy_arrays(self, engine: qmm.Engine, x: Any) -> None:
        self.agree(lambda x: engine.matmul("a", x, out=np.empty((2, M), np.float32)) + 1, x.numpy())

    def test_one_function_for_more_tensors_than_dynamo_compiles_it_for(self, tmp_path: Path, x: Any) -> None:
        from gguf_files import random_blocks, write_gguf

        names = [f"w{i}" for i in range(torch._dynamo.config.cache_size_limit + 2)]
        random = np.random.default_rng(5)
        blocks = {name: ("Q8_0", (M, K), random_blocks("Q8_0", (M, K), random)) for name in names}
        write_gguf(tmp_path / "many.gguf", blocks)
        with qmm.Engine(tmp_path / "many.gguf", "cpu") as engine:
            compiled = torch.compile(engine.matmul, backend="eager")
            for name in names:
                assert torch.equal(compiled(name, x), engine.matmul(name, x))

    def test_a_module_learns_behind_a_product(self, engine: qmm.Engine, x: Any) -> None:
        class Block(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.engine, self.head = engine, torch.nn.Linear(M, 3)

            def forward(self, x: Any) -> Any:
                return self.head(torch.relu(self.engine.matmul("a", x)))

        block = Block()
        block(x).sum().backward()
        expected = block.head.weight.grad.clone()
        block.zero_grad()
        torch.compile(block, backend="eager")(x).sum().backward()
        assert torch.equal(block.head.weight.grad, expected)

    def test_dequantize(self, engine: qmm.Engine, x: Any) -> None:
        self.agree(lambda x: torch.from_numpy(engine.dequantize("a")) + x[0, 0], x)

    def test_plans(self, engine: qmm.Engine, x: Any) -> None:
        with pytest.raises(qmm.DeviceError, match="works on the CPU"):
            torch.compile(lambda x: engine.plan([("a", x, x)]) or x + 1, backend="eager")(x)
        with pytest.raises(qmm.ClosedError, match="plan was closed"):
            torch.compile(lambda x: closed_plan(engine)() or x + 1, backend="eager")(x)

    @pytest.mark.parametrize("call", ["matmul", "dequantize", "plan", "plan()"])
    def test_a_graph_in_one_piece_is_refused_with_the_reason(self, engine: qmm.Engine, x: Any, call: str) -> None:
        plan = closed_plan(engine)
        calls: dict[str, Callable[[Any], Any]] = {
            "matmul": lambda x: engine.matmul("a", x),
            "dequantize": lambda x: engine.dequantize("a") + x,
            "plan": lambda x: engine.plan([("a", x, x)]),
            "plan()": lambda x: plan() or x + 1,
        }
        with pytest.raises(Exception, match=r"qmm's kernels are compiled already.*without fullgraph=True"):
            torch.compile(calls[call], backend="eager", fullgraph=True)(x)

    def test_errors_come_through(self, engine: qmm.Engine, x: Any) -> None:
        with pytest.raises(qmm.ArrayError, match=f"k = {K}"):
            torch.compile(lambda x: engine.matmul("a", x[:, 1:]) + 1, backend="eager")(x)

    def test_inductor(self, engine: qmm.Engine, x: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        self.agree(lambda x: torch.relu(engine.matmul("a", 2 * x)), x, backend="inductor")
