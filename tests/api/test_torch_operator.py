"""PyTorch's gradients, transforms and traces of products: right, or refused by qmm. Needs torch."""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import random_blocks, write_gguf
from small_model import K, M

import qmm

torch = pytest.importorskip("torch", reason="the extra `torch` brings it")

EXPERTS = (3, 8, K)
FLOAT32 = 2.0**-24
"""The most that rounding to float32 changes a number, relatively."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, rng = tmp_path_factory.mktemp("operator") / "small.gguf", np.random.default_rng(3)
    shapes = {"a": ("Q4_K", (M, K)), "experts": ("Q8_0", EXPERTS), "norm": ("F32", (K,)), "hollow": ("Q8_0", (5, 0))}
    write_gguf(made, {name: (*shape, random_blocks(*shape, rng)) for name, shape in shapes.items()})
    return made


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[qmm.Engine]:
    with qmm.Engine(path, "cpu") as made:
        yield made


@pytest.fixture(scope="module")
def weights(engine: qmm.Engine) -> Any:
    return torch.from_numpy(engine.dequantize("a")).double()


@pytest.fixture
def x(rng: np.random.Generator) -> Any:
    return torch.from_numpy(rng.standard_normal((2, K), dtype=np.float32))


@pytest.fixture
def g(rng: np.random.Generator) -> Any:
    return torch.from_numpy(rng.standard_normal((2, M), dtype=np.float32))


def near(y: Any, terms: tuple[Any, Any], rounding: float = FLOAT32) -> bool:
    """Whether ``y`` is the product of both, in float64, but for rounding: a sum of n products in float32 is off by at
    most (n + 1) roundings of the sum of their magnitudes; the result is rounded once more."""
    a, b = (each.double() for each in terms)
    bound = (a.shape[-1] + 1) * FLOAT32 + rounding
    return bool(((y.double() - a @ b).abs() <= bound * (a.abs() @ b.abs())).all())


class TestGradients:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("shape", [(2,), (), (0,), (2, 1), (3, 0, 2)])
    def test_the_gradient_is_that_of_the_dequantized_weight(
        self, engine: qmm.Engine, weights: Any, shape: tuple[int, ...], dtype: str
    ) -> None:
        x = torch.randn(*shape, K).to(getattr(torch, dtype)).requires_grad_()
        y = engine.matmul("a", x)
        assert torch.equal(y, engine.matmul("a", x.detach()))
        g = torch.randn(y.shape).to(x.dtype)
        y.backward(g)
        assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
        assert near(x.grad, (g, weights), torch.finfo(x.dtype).eps)

    def test_a_weight_in_pieces(
        self, engine: qmm.Engine, weights: Any, x: Any, g: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qmm import torch_operator

        monkeypatch.setattr(torch_operator, "CHUNK_NBYTES", 4 * K * 5)  # 64 rows are no multiple of 5
        engine.matmul("a", x.requires_grad_()).backward(g)
        assert near(x.grad, (g, weights))

    @pytest.mark.parametrize("name", ["experts", "norm", "hollow"])
    def test_tensors_that_are_no_matrix(self, engine: qmm.Engine, name: str) -> None:
        weights = torch.from_numpy(engine.dequantize(name)).double()
        x = torch.randn(2, weights.shape[-1], requires_grad=True)
        y = engine.matmul(name, x)
        g = torch.randn(y.shape)
        y.backward(g)
        assert near(
            x.grad,
            (
                g.flatten(1) if g.dim() > 1 else g[:, None],
                weights.flatten(0, -2) if weights.dim() > 1 else weights[None],
            ),
        )

    def test_a_view_and_a_strided_tensor(self, engine: qmm.Engine, weights: Any, g: Any) -> None:
        whole = torch.randn(K, 5, requires_grad=True)
        engine.matmul("a", whole.T[1:4:2]).backward(g)
        assert near(whole.grad[:, 1:4:2].T, (g, weights))
        assert not whole.grad[:, ::2].any()

    def test_several_products_of_the_same_x(self, engine: qmm.Engine, weights: Any, x: Any, g: Any) -> None:
        first, second = engine.matmul_each(["a", "a"], x.requires_grad_())
        (first + 2 * second).backward(g)
        assert near(x.grad, (3 * g, weights), 2 * FLOAT32)

    @pytest.mark.parametrize("order", [1, 2])
    def test_finite_differences(self, engine: qmm.Engine, weights: Any, x: Any, g: Any, order: int) -> None:
        """The product is linear, so differences over a step of 1 have no error but rounding: activations of "f16" stay
        float32 on the CPU, where a sum is off by (K + 3) roundings of what its terms amount to, at x and one step on;
        what is summed in the second order is at most as many products."""
        largest = float(torch.cat([x, g], -1).abs().max()) + 1
        x, g = x[:1].requires_grad_(), g[:1].requires_grad_()
        atol = (K + 3) * FLOAT32 * largest * float(max(weights.abs().sum(0).max(), weights.abs().sum(1).max()))
        assert atol < 0.02 * float(weights.abs().max())  # a wrong derivative would not pass

        def product(x: Any) -> Any:
            return engine.matmul("a", x, activations="f16")

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch: x is not float64
            if order == 1:
                torch.autograd.gradcheck(
                    product, x, eps=1.0, atol=atol, rtol=0.0, check_forward_ad=True, check_batched_grad=True
                )
            else:
                torch.autograd.gradgradcheck(product, x, g, eps=1.0, atol=atol, rtol=0.0, check_batched_grad=True)

    def test_nothing_is_followed_that_needs_no_gradient(self, engine: qmm.Engine, x: Any) -> None:
        expected = engine.matmul("a", x)
        leaf = x.clone().requires_grad_()
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                y = engine.matmul("a", leaf)
            assert torch.equal(y, expected)
            assert not y.requires_grad
        assert not engine.matmul("a", torch.nn.Parameter(x, requires_grad=False)).requires_grad
        assert engine.matmul("a", torch.nn.Parameter(x)).requires_grad

    @pytest.mark.parametrize("which", ["x", "out", "both"])
    def test_out_has_no_gradient(self, engine: qmm.Engine, x: Any, which: str) -> None:
        expected = engine.matmul("a", x)
        x.requires_grad_(which != "out")
        out = torch.zeros(2, M, requires_grad=which != "x")
        with pytest.raises(qmm.ArrayError, match=r"out= has no gradient.*x\.detach\(\).*torch\.no_grad\(\)"):
            engine.matmul("a", x, out=out)
        with pytest.raises(qmm.ArrayError, match="out= has no gradient"):
            engine.matmul_each(["a"], x, [out])
        assert not out.any()
        with torch.no_grad():
            assert engine.matmul("a", x, out=out) is out
        assert torch.equal(out, expected)

    def test_what_was_saved_and_is_overwritten_is_noticed(self, engine: qmm.Engine, x: Any) -> None:
        engine.matmul("a", torch._neg_view(x))  # the operators are there from the first use on

        def by_operator(name: str, x: Any, out: Any) -> None:
            torch.ops.qmm.matmul_out(x, out, engine._key, name, "int8")

        for write in (engine.matmul, by_operator):
            out, factor = torch.ones(2, M), torch.ones((), requires_grad=True)
            result = (factor * out).sum()
            write("a", x, out=out)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.backward()

    def test_around_other_parts_of_torch(self, engine: qmm.Engine, weights: Any, x: Any, g: Any) -> None:
        def checkpointed(x: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(lambda x: engine.matmul("a", 1 * x), x, use_reentrant=False)

        def in_autocast(x: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                y = engine.matmul("a", x)
                assert y.dtype == torch.float32
                return y

        def elsewhere(x: Any) -> Any:
            with torch.device("meta"):
                return engine.matmul("a", x)

        for product in (checkpointed, in_autocast, elsewhere):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=product is in_autocast):
                product(leaf).backward(g)
            assert near(leaf.grad, (g, weights))

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_module_learns_in_front_of_a_product(self, engine: qmm.Engine, x: Any, backend: str) -> None:
        torch._dynamo.reset()
        layer = torch.nn.Linear(K, K)

        def loss(x: Any) -> Any:
            return torch.relu(engine.matmul("a", layer(x))).square().sum()

        loss(x).backward()
        expected = layer.weight.grad.clone()
        layer.zero_grad()
        torch.compile(loss, backend=backend, fullgraph=True)(x).backward()
        torch.testing.assert_close(layer.weight.grad, expected)

    def test_a_backward_pass_that_is_compiled(self, engine: qmm.Engine, weights: Any, x: Any, g: Any) -> None:
        from torch._dynamo import compiled_autograd

        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            engine.matmul("a", x.requires_grad_()).backward(g)
        assert near(x.grad, (g, weights))


class TestForwardMode:
    def test_a_tangent_is_multiplied_as_x_is(self, engine: qmm.Engine, x: Any) -> None:
        forward = torch.autograd.forward_ad
        with forward.dual_level():
            primal, tangent = forward.unpack_dual(engine.matmul("a", forward.make_dual(x, x.flip(0))))
            assert torch.equal(primal, engine.matmul("a", x))
            assert torch.equal(tangent, engine.matmul("a", x.flip(0)))
            with pytest.raises(qmm.ArrayError, match="out= has no tangent"):
                engine.matmul("a", forward.make_dual(x, x), out=torch.empty(2, M))
            assert torch.equal(engine.matmul("a", x), primal)


class TestTransforms:
    """Those of ``torch.func``."""

    def test_vmap(self, engine: qmm.Engine, x: Any) -> None:
        expected = engine.matmul("a", x)

        def product(x: Any) -> Any:
            return engine.matmul("a", x)

        assert torch.equal(torch.vmap(product)(x), expected)
        assert torch.equal(torch.vmap(product, in_dims=1, out_dims=1)(x.T), expected.T)
        assert torch.equal(torch.vmap(torch.vmap(product, in_dims=1))(x.reshape(1, 2, K).mT), expected[None])
        assert torch.equal(torch.vmap(lambda x: engine.matmul_each(["a", "a"], x)[1])(x), expected)
        written = torch.vmap(lambda x, out: engine.matmul("a", x, out=out), in_dims=(0, 1))(x, torch.empty(M, 2))
        assert torch.equal(written, expected)
        once = torch.vmap(lambda out: engine.matmul("a", x[0], out=out))(torch.empty(3, M))
        assert torch.equal(once, expected[:1].expand(3, M))

    def test_a_batch_is_not_taken_for_weights(self, engine: qmm.Engine, x: Any) -> None:
        with pytest.raises(qmm.ArrayError, match="at least 1 dimensions"):
            torch.vmap(lambda x: engine.matmul("a", x))(x[0])  # K numbers, as many as a row has
        with pytest.raises(qmm.ArrayError, match="out is not"):
            torch.vmap(lambda x: engine.matmul("a", x, out=torch.empty(M)))(x)

    def test_gradients_in_and_of_a_batch(self, engine: qmm.Engine, weights: Any, x: Any) -> None:
        func = torch.func
        ones = torch.ones(2, M)

        def total(x: Any) -> Any:
            return engine.matmul("a", x).sum()

        for gradient in (func.grad(total), func.vmap(func.grad(total)), func.grad(lambda x: func.vmap(total)(x).sum())):
            assert near(gradient(x), (ones, weights))
        jacobian = func.jacrev(lambda x: engine.matmul("experts", x))(x[0])
        assert torch.equal(jacobian, torch.from_numpy(engine.dequantize("experts")))

    def test_jvp(self, engine: qmm.Engine, weights: Any, x: Any) -> None:
        y, tangent = torch.func.jvp(lambda x: engine.matmul("a", x), (x,), (x.flip(0),))
        assert torch.equal(y, engine.matmul("a", x))
        assert torch.equal(tangent, engine.matmul("a", x.flip(0)))
        jacobian = torch.func.jacfwd(lambda x: engine.matmul("a", x, activations="f16"))(x[0])
        assert torch.equal(jacobian, weights.float())

    def test_second_derivatives_in_every_order(self, engine: qmm.Engine, weights: Any, x: Any) -> None:
        def square(x: Any) -> Any:
            return engine.matmul("a", x, activations="f16").square().sum()

        for outer, inner in itertools.product((torch.func.jacfwd, torch.func.jacrev), repeat=2):
            assert near(outer(inner(square))(x[0]), (2 * weights.T, weights), 4 * FLOAT32)

    def test_tensors_from_outside_of_a_transform(self, engine: qmm.Engine, x: Any) -> None:
        expected, zeros = engine.matmul("a", x), torch.zeros(2)
        for transform in (torch.func.grad, torch.vmap):
            out = torch.empty(2, M)
            for product in (lambda: engine.matmul("a", x), lambda out=out: engine.matmul("a", x, out=out)):
                seen: list[Any] = []
                transform(lambda v, product=product, seen=seen: seen.append(product()) or v.sum())(zeros)
                assert torch.equal(seen[0], expected)
            assert torch.equal(out, expected)
        _, tangent = torch.func.jvp(lambda v: engine.matmul("a", x) + v, (zeros[:1],), (zeros[:1] + 3,))
        assert torch.equal(tangent, torch.full((2, M), 3.0))
        ended: list[Any] = []  # what a transform leaves behind
        torch.func.grad(lambda x: ended.append(1 * x) or x.sum())(x)
        assert torch.equal(engine.matmul("a", ended[0]), expected)

    def test_linearize(self, engine: qmm.Engine, x: Any) -> None:
        y, tangent = torch.func.linearize(lambda x: engine.matmul("a", x), x)
        assert torch.equal(y, engine.matmul("a", x))
        assert torch.equal(tangent(x.flip(0)), engine.matmul("a", x.flip(0)))

    def test_functionalize(self, engine: qmm.Engine, x: Any) -> None:
        assert torch.equal(torch.func.functionalize(lambda x: engine.matmul("a", x))(x), engine.matmul("a", x))
        with pytest.raises(qmm.ArrayError, match="functionalizing"):
            torch.func.functionalize(lambda x: engine.matmul("a", x, out=torch.empty(2, M)))(x)

    @pytest.mark.parametrize("transform", ["vmap", "grad"])
    def test_compiled(self, engine: qmm.Engine, x: Any, transform: str) -> None:
        torch._dynamo.reset()
        transformed = getattr(torch.func, transform)(lambda x: engine.matmul("a", x).sum())
        compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), transformed(x))


def traced(function: Callable[[Any], Any], x: Any, by: str) -> Callable[[Any], Any]:
    from torch.fx.experimental.proxy_tensor import make_fx

    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return function(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: jit.trace is no longer its choice
        tool, _, mode = by.partition(" ")
        if tool == "jit.trace":
            return torch.jit.trace(function, (x,))
        if tool == "make_fx":
            return make_fx(function, tracing_mode=mode)(x)
        return torch.export.export(Module(), (x,), strict=mode == "strict").module()


@pytest.mark.parametrize(
    "by", ["jit.trace", "make_fx real", "make_fx fake", "make_fx symbolic", "export strict", "export not strict"]
)
class TestTraces:
    def test_another_x_has_its_own_product(self, engine: qmm.Engine, x: Any, by: str) -> None:
        other = x.flip(-1)
        functions: list[Callable[[Any], Any]] = [
            lambda x: engine.matmul("a", x) + 0,
            lambda x: engine.matmul("a", x, out=torch.empty(2, M)) + 0,
            lambda x: torch.cat(engine.matmul_each(["a", "a"], x)),
        ]
        for function in functions:
            assert torch.equal(traced(function, x, by)(other), function(other))

    def test_errors_are_those_of_a_call(self, engine: qmm.Engine, x: Any, by: str) -> None:
        dynamo = by == "export strict"  # which does not go on, and says why, as in test_torch.py
        refusal, error = r"without stream=|disable\(\) wrapped function", Exception if dynamo else qmm.ArrayError
        with pytest.raises(error, match=refusal if dynamo else f"k = {K}"):
            traced(lambda x: engine.matmul("a", x[:, 1:]), x, by)
        with pytest.raises(error, match=refusal if dynamo else "stream="):
            traced(lambda x: engine.matmul("a", x, stream=0), x, by)

    def test_a_trace_outlives_its_engine(self, path: Path, x: Any, by: str) -> None:
        engine = qmm.Engine(path, "cpu")
        product = traced(lambda x: engine.matmul("a", x), x, by)
        engine.close()
        # TorchScript's interpreter makes RuntimeErrors of all errors, with their text
        with pytest.raises(RuntimeError if by == "jit.trace" else qmm.ClosedError, match="engine was closed"):
            product(x)


class TestTensorsWithoutValues:
    @pytest.fixture
    def mode(self) -> Any:
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode()

    @pytest.mark.parametrize("name", ["a", "experts", "norm"])
    def test_shape_dtype_and_gradient(self, engine: qmm.Engine, x: Any, mode: Any, name: str) -> None:
        fake = mode.from_tensor(x.half()).requires_grad_()
        y = engine.matmul(name, fake)
        real = engine.matmul(name, x.half())
        assert isinstance(y, type(fake))
        assert (y.shape, y.dtype, y.device, y.stride()) == (real.shape, real.dtype, real.device, real.stride())
        y.sum().backward()
        assert (fake.grad.shape, fake.grad.dtype) == (x.shape, torch.float16)
        with mode:
            assert engine.matmul(name, torch.empty(5, 2, K)).shape == (5, *real.shape)

    @pytest.mark.parametrize(
        ("product", "error"),
        [
            (lambda matmul, x: matmul("a", x[:, 1:]), f"k = {K}"),
            (lambda matmul, x: matmul("a", x.double()), "float64"),
            (lambda matmul, x: matmul("a", x.to("meta")), "on meta"),
            (lambda matmul, x: matmul("a", x, activations="f8"), "no activations 'f8'"),
            (lambda matmul, x: matmul("a", x, out=x), r"out has shape \(2, 256\); this product has \(2, 64\)"),
            (lambda matmul, x: matmul("a", x, out=x[:, :M].double()), "float64"),
            (lambda matmul, x: matmul("a", x, out=x[:, :M].to("meta")), "use one place"),
            (lambda matmul, x: matmul("a", x, out=torch.empty(2, M)), "convert all Tensors to FakeTensors"),
        ],
    )
    def test_the_errors_of_a_call(
        self, engine: qmm.Engine, x: Any, mode: Any, product: Callable[..., Any], error: str
    ) -> None:
        with pytest.raises(qmm.ArrayError, match=error):
            product(engine.matmul, mode.from_tensor(x))

    def test_a_tensor_with_values_in_the_mode(self, engine: qmm.Engine, x: Any, mode: Any) -> None:
        with mode, pytest.raises(qmm.ArrayError, match="convert all Tensors to FakeTensors"):
            engine.matmul("a", x)


class TestOperators:
    def test_a_mode_sees_the_operator(self, engine: qmm.Engine, x: Any) -> None:
        seen = []

        class Log(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(str(operator))
                return operator(*args, **(kwargs or {}))

        with Log():
            y = engine.matmul("a", x)
        assert seen == ["qmm.matmul.default"]
        assert torch.equal(y, engine.matmul("a", x))

    def test_an_engine_that_is_gone(self, path: Path, x: Any) -> None:
        engine = qmm.Engine(path, "cpu")
        matmul = [engine.matmul]
        product = traced(lambda x: matmul[0]("a", x), x, "make_fx fake")
        assert torch.equal(product(x), engine.matmul("a", x))
        engine.close()
        matmul.clear()
        del engine
        gc.collect()
        with qmm.Engine(path, "cpu"), pytest.raises(qmm.ClosedError, match=r"small\.gguf.*keep the engine open"):
            product(x)

    @pytest.mark.parametrize("operator", ["matmul", "matmul_transposed", "matmul_out"])
    def test_what_torch_checks_of_operators(self, engine: qmm.Engine, x: Any, g: Any, operator: str) -> None:
        engine.matmul("a", x.clone().requires_grad_())  # the operators are there from the first use on
        arrays = {"matmul": (x,), "matmul_transposed": (g,), "matmul_out": (x, g)}
        for array in arrays[operator] if operator != "matmul_out" else ():
            array.requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = torch.library.opcheck(
                getattr(torch.ops.qmm, operator).default, (*arrays[operator], engine._key, "a", "f16")
            )
        assert set(outcome.values()) == {"SUCCESS"}
