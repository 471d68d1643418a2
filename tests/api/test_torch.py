"""PyTorch's tensors and its compiler: results as without them. Needs torch. test_torch_operator.py has gradients,
transforms and traces."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_model import K, M, Products, write_small_model

import qmm
from qmm.arrays import FollowedError, kind_of

torch = pytest.importorskip("torch", reason="the extra `torch` brings it")

REFUSAL = r"qmm's kernels are compiled already.*without fullgraph=True.*error is qmm's own|disable\(\) wrapped function"
"""Why Dynamo does not go on; torch 2.6 does not give the reason that a function has."""


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
    plan._closed, plan._name, plan._length, plan._device = True, str(engine.model.path), 1, SimpleNamespace(number=0)
    return plan


class TestCompile:
    """``torch.compile`` has a product as one operator in its graph. All else it calls as it is, between two graphs."""

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

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("by", ["name", "tensor"])
    def test_a_product_is_an_operator_in_one_graph(self, engine: qmm.Engine, x: Any, by: str, backend: str) -> None:
        named = engine.model["a"] if by == "tensor" else "a"
        products: list[Callable[[Any], Any]] = [
            lambda x: torch.relu(engine.matmul(named, 2 * x)),
            lambda x: engine.matmul(named, x, activations="f16") + 1,
            lambda x: engine.matmul(named, x, out=torch.empty(2, M, dtype=torch.float16)) + 1,
            lambda x: torch.cat(engine.matmul_each([named, "b"], x), -1),
        ]
        for product in products:
            assert torch.equal(torch.compile(product, backend=backend, fullgraph=True)(x), product(x))
        cut = self.agree(products[0], x)
        assert (cut.graph_count, cut.graph_break_count) == (1, 0)
        assert "qmm.matmul" in str(cut.ops_per_graph)

    def test_a_graph_for_any_number_of_rows(self, engine: qmm.Engine, x: Any) -> None:
        compiled = torch.compile(lambda x: engine.matmul("a", x), backend="eager", fullgraph=True, dynamic=True)
        for rows in (x, x.expand(3, 2, K), x[0]):
            assert torch.equal(compiled(rows), engine.matmul("a", rows))

    def test_one_function_for_two_engines(self, engine: qmm.Engine, path: Path, x: Any) -> None:
        compiled = torch.compile(lambda engine, x: engine.matmul("a", x), backend="eager", fullgraph=True)
        with qmm.Engine(path, "cpu", activations="f16") as other:
            expected = [each.matmul("a", x) for each in (engine, other)]
            assert not torch.equal(*expected)
            for _ in range(2):
                for each, right in zip((engine, other), expected, strict=True):
                    assert torch.equal(compiled(each, x), right)

    def test_matmul_itself_may_be_compiled(self, engine: qmm.Engine, x: Any) -> None:
        self.agree(engine.matmul, "a", x)
        assert torch.equal(torch.compile(engine.matmul, backend="eager", fullgraph=True)("a", x), engine.matmul("a", x))

    def test_an_engine_that_is_closed_before_the_graph_runs(self, path: Path, x: Any) -> None:
        engine = qmm.Engine(path, "cpu")
        compiled = torch.compile(lambda x: engine.matmul("a", x), backend="eager", fullgraph=True)
        compiled(x)
        engine.close()
        with pytest.raises(qmm.ClosedError, match="engine was closed"):
            compiled(x)

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

    def test_opening(self, path: Path, x: Any) -> None:
        def opened(x: Any) -> Any:
            with qmm.open(path) as model:
                return x + len(model)

        with qmm.open(path) as model:
            assert torch.equal(torch.compile(opened, backend="eager")(x), x + len(model))

    def test_dequantize(self, engine: qmm.Engine, x: Any) -> None:
        self.agree(lambda x: torch.from_numpy(engine.dequantize("a")) + x[0, 0], x)

    def test_plans(self, engine: qmm.Engine, x: Any) -> None:
        with pytest.raises(qmm.DeviceError, match="works on the CPU"):
            torch.compile(lambda x: engine.plan([("a", x, x)]) or x + 1, backend="eager")(x)
        plan = closed_plan(engine)
        with pytest.raises(qmm.ClosedError, match="plan was closed"):
            torch.compile(lambda x: plan() or x + 1, backend="eager")(x)

    @pytest.mark.parametrize("call", ["NumPy", "stream", "wrong k", "out has grad", "dequantize", "plan", "plan()"])
    def test_a_graph_in_one_piece_is_refused_with_the_reason(self, engine: qmm.Engine, x: Any, call: str) -> None:
        plan, leaf = closed_plan(engine), torch.empty(2, M, requires_grad=True)
        calls: dict[str, Callable[[Any], Any]] = {
            "NumPy": lambda x: torch.from_numpy(engine.matmul("a", x.numpy())),
            "stream": lambda x: engine.matmul("a", x, stream=0),
            "wrong k": lambda x: engine.matmul("a", x[:, 1:]),
            "out has grad": lambda x: engine.matmul("a", x, out=leaf),
            "dequantize": lambda x: engine.dequantize("a") + x,
            "plan": lambda x: engine.plan([("a", x, x)]),
            "plan()": lambda x: plan() or x + 1,
        }
        with pytest.raises(Exception, match=REFUSAL):
            torch.compile(calls[call], backend="eager", fullgraph=True)(x)

    @pytest.mark.parametrize(
        ("call", "error"),
        [
            (lambda engine, x: engine.matmul("a", x[:, 1:]) + 1, rf"k = {K} weights a row.*\(2, {K - 1}\)"),
            (lambda engine, x: engine.matmul("a", x.double()) + 1, "float64"),
            (lambda engine, x: engine.matmul("c", x) + 1, "no tensor 'c'"),
            (lambda engine, x: engine.matmul("a", x, activations="f8") + 1, "no activations 'f8'"),
            (lambda engine, x: engine.matmul("a", x, out=torch.empty(3, M)) + 1, r"out has shape \(3, 64\)"),
            (lambda engine, x: engine.matmul("a", x, out=torch.empty(1, M).expand(2, M)) + 1, "share memory"),
            (lambda engine, x: engine.matmul("a", x.requires_grad_(), out=torch.empty(2, M)) + 1, "requires grad"),
            (lambda engine, x: engine.matmul_each(["a", "a"], x, [None])[0], "2 products, but 1 outs"),
        ],
    )
    def test_errors_come_through(self, engine: qmm.Engine, x: Any, call: Callable[..., Any], error: str) -> None:
        with pytest.raises(qmm.QmmError, match=error):
            torch.compile(call, backend="eager")(engine, x)

    def test_a_backend_that_traces_gradients_too(self, engine: qmm.Engine, x: Any) -> None:
        self.agree(lambda x: torch.relu(engine.matmul("a", 2 * x)), x, backend="aot_eager")


def freed(x: Any) -> Any:
    x.untyped_storage().resize_(0)
    return x


class TestKinds:
    """Tensors of every kind: used as they are, or refused by a sentence with the way out."""

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_the_three_dtypes_come_back(self, engine: qmm.Engine, x: Any, dtype: str) -> None:
        x = x.to(getattr(torch, dtype))
        y = engine.matmul("a", x)
        assert y.dtype == x.dtype
        assert torch.equal(y, engine.matmul("a", x.float()).to(x.dtype))

    @pytest.mark.parametrize(
        ("made", "way_out"),
        [
            (lambda x: torch.complex(x, x).conj(), "complex64.*float32, float16, bfloat16"),
            (lambda x: x.double(), "float64.*float32, float16, bfloat16"),
            (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"qint8.*dequantize\(\)"),
            (lambda x: x.to_sparse(), r"sparse_coo.*x\.to_dense\(\)"),
            (lambda x: x.to_sparse_csr(), r"sparse_csr.*x\.to_dense\(\)"),
            (lambda x: torch.nested.nested_tensor([x, x]), "to_padded_tensor"),
            (lambda x: x.to("meta"), "on meta without values"),
            (lambda x: freed(x.clone()), "without values"),
            (lambda x: freed(torch.cat([x, x])[2:]), "without values"),  # whose address is not 0
            (lambda x: torch.masked.masked_tensor(x, x > 0), "MaskedTensor.*way of its own"),
            (lambda x: torch.nn.UninitializedParameter(), "without values"),
            (lambda x: torch.tensor(1.0), f"k = {K}"),
        ],
    )
    def test_what_has_no_values_in_place_is_refused(
        self, engine: qmm.Engine, x: Any, made: Callable[[Any], Any], way_out: str
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of features that it calls a prototype
            refused = made(x)
            with torch.no_grad(), pytest.raises(qmm.ArrayError, match=way_out):
                engine.matmul("a", refused)

    def test_tensors_stored_with_the_other_sign(self, engine: qmm.Engine, x: Any) -> None:
        expected = engine.matmul("a", x)
        for stored in (torch._neg_view(-x), torch.complex(x, -x).conj().imag):
            assert stored.is_neg()
            assert torch.equal(engine.matmul("a", stored), expected)
            assert torch.equal(engine.matmul_each(["b", "a"], stored)[1], expected)
            assert torch.equal(engine.matmul("a", stored.resolve_neg()), expected)
        for dtype in (torch.float32, torch.float16):
            values = torch.zeros(2, M, dtype=dtype)
            out = torch._neg_view(values)
            version = out._version
            assert engine.matmul("a", x, out=out) is out
            assert torch.equal(out, expected.to(dtype))
            assert torch.equal(values, -expected.to(dtype))
            assert out._version > version
        assert torch.equal(engine.matmul("a", torch._neg_view(-x), out=torch._neg_view(torch.zeros(2, M))), expected)

    def test_a_subclass_of_ordinary_values_is_used(self, engine: qmm.Engine, x: Any) -> None:
        class Named(torch.Tensor):
            pass

        expected = engine.matmul("a", x)
        assert torch.equal(engine.matmul("a", x.as_subclass(Named)).as_subclass(torch.Tensor), expected)

    def test_an_out_without_values_is_refused(self, engine: qmm.Engine, x: Any) -> None:
        with pytest.raises(qmm.ArrayError, match="without values"):
            engine.matmul("a", x, out=freed(torch.zeros(2, M)))

    def test_a_call_that_was_prepared_looks_again(self, x: Any) -> None:
        """Arrays on a GPU are prepared by their signature; the next call with the same one may be another matter."""
        kind, leaf = kind_of(x), x.clone().requires_grad_()
        with torch.no_grad():
            assert kind.signature(leaf)[1] == kind.signature(x)[1]
        for followed in (leaf, torch._neg_view(x)):
            with pytest.raises(FollowedError):
                kind.signature(followed)
        with pytest.raises(qmm.ArrayError, match="without values"):
            kind.signature(freed(x.clone()))

    def test_no_rows(self, engine: qmm.Engine, x: Any) -> None:
        assert engine.matmul("a", x[:0]).shape == (0, M)

    def test_numbers_at_odd_addresses(self, engine: qmm.Engine, x: Any) -> None:
        odd = torch.frombuffer(bytearray(b"\0" + x.numpy().tobytes()), dtype=torch.float32, offset=1).reshape(2, K)
        assert odd.data_ptr() % 4
        assert torch.equal(engine.matmul("a", odd), engine.matmul("a", x))

    def test_out_where_it_may_be_written_only(self, engine: qmm.Engine, x: Any) -> None:
        expected = engine.matmul("a", x)
        with torch.inference_mode():
            inference = torch.zeros(2, M)
            assert torch.equal(engine.matmul("a", x, out=inference), expected)
        with pytest.raises(qmm.ArrayError, match=r"created in torch\.inference_mode"):
            engine.matmul("a", x, out=inference)
        with pytest.raises(qmm.ArrayError, match="share memory"):
            engine.matmul("a", x, out=torch.zeros(1, M).expand(2, M))
        within = x.clone()
        assert torch.equal(engine.matmul("a", within, out=within[:, 3 : 3 + M]), expected)
        assert torch.equal(within[:, 3 : 3 + M], expected)
        with pytest.raises(qmm.ArrayError, match="use one kind"):
            engine.matmul("a", x, out=np.zeros((2, M), np.float32))


class TestCopies:
    """Modules and datasets that hold an engine, where PyTorch copies or sends them."""

    def module(self, engine: qmm.Engine) -> Any:
        made = torch.nn.Linear(M, 3)
        made.engine, made.tensor = engine, engine.model["a"]
        return made

    def test_an_average_of_a_module_shares_its_engine(self, engine: qmm.Engine) -> None:
        average = torch.optim.swa_utils.AveragedModel(self.module(engine)).module
        assert average.engine is engine
        assert average.tensor == engine.model["a"]

    def test_saving_says_where_to_make_it(self, engine: qmm.Engine, path: Path, tmp_path: Path) -> None:
        module = self.module(engine)
        with pytest.raises(qmm.CopyError, match=rf"Create it in the worker: qmm\.Engine.*{path.name}"):
            torch.save(module, tmp_path / "module.pt")
        torch.save(module.state_dict(), tmp_path / "state.pt")
        assert set(torch.load(tmp_path / "state.pt")) == {"weight", "bias"}

    @pytest.mark.parametrize("start", ["fork", "spawn"])
    def test_workers_of_a_data_loader(self, engine: qmm.Engine, path: Path, start: str) -> None:
        dataset = Products(path, 3)
        expected = [dataset[number] for number in range(3)]
        load = functools.partial(
            torch.utils.data.DataLoader, batch_size=None, num_workers=1, multiprocessing_context=start
        )
        if start == "spawn":
            with pytest.raises(qmm.CopyError, match="Create it in the worker"):
                next(iter(load(dataset)))
            dataset.close()
        for y, right in zip(load(dataset), expected, strict=True):
            np.testing.assert_array_equal(y, right)
        dataset.close()
