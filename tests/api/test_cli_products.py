"""`qmm run` and `qmm verify`: what they say, and that they fail where a result is wrong."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from command_line import IQ1_S, SHAPES, invoke

import qmm
import qmm.verify.paranoid
from qmm.cli.app import app

# run ------------------------------------------------------------------------------------------------------------------


def test_run_takes_a_tensor_of_more_dimensions_where_there_is_no_matrix(tmp_path: Path) -> None:
    shapes = {"bias": (64,), "patches": (2, 2, 1, 3, 8)}
    tensors = {name: ("F32", shape, bytes(4 * math.prod(shape))) for name, shape in shapes.items()}
    gguf_files.write_gguf(tmp_path / "m.gguf", tensors)
    assert invoke("run", tmp_path / "m.gguf", "--device", "cpu", "--json").document["tensor"] == "patches"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [({}, "it holds none at all"), ({"a": (19, (1, 256), bytes(50))}, "no kernel for IQ1_S, or they are empty")],
)
def test_run_says_why_there_is_nothing_to_multiply_by(tmp_path: Path, tensors: dict[str, Any], says: str) -> None:
    gguf_files.write_gguf(tmp_path / "m.gguf", tensors)
    result = invoke("run", tmp_path / "m.gguf", "--device", "cpu")
    assert result.code == 3
    assert says in result.err


def test_run_takes_the_largest_matrix(model: Path) -> None:
    document = invoke("run", model, "--device", "cpu", "--repeats", "2", "--json").document
    assert document["tensor"] == "down"
    assert document["ok"] is True
    assert (document["device"], document["placement"], document["activations"]) == ("cpu", "host", "int8")
    assert document["nmse"] <= document["tolerance"] == 5e-4
    assert document["ms"] > 0
    assert document["gb_per_s"] > 0


@pytest.mark.parametrize("activations", ["int8", "f16"])
def test_run_prints_the_engines_first_results(model: Path, activations: str) -> None:
    arguments = ("up", "--n", "3", "--seed", "5", "--device", "cpu", "--repeats", "1", "--activations", activations)
    document = invoke("run", model, *arguments, "--json").document
    from qmm.verify.check import activations as random_activations

    with qmm.open(model) as opened, qmm.Engine(opened, "cpu") as engine:
        x = random_activations(opened["up"], 3, 5)
        expected = engine.matmul("up", x, activations=activations).reshape(-1)[:8]
    assert document["y"] == expected.tolist()
    assert "NMSE" in invoke("run", model, *arguments).out


def test_run_says_that_plain_tensors_know_one_kind_of_activations(model: Path) -> None:
    document = invoke("run", model, "norm", "--device", "cpu", "--repeats", "1", "--json").document
    assert (document["activations"], document["tolerance"]) == ("f16", 1e-6)
    assert document["ok"] is True


def test_run_without_a_matrix_to_take_says_so(tmp_path: Path) -> None:
    gguf_files.write_gguf(tmp_path / "none.gguf", {"exotic": (IQ1_S, (2, 256), bytes(100))})
    result = invoke("run", tmp_path / "none.gguf", "--device", "cpu")
    assert result.code == 3
    assert "qmm info" in result.err


@pytest.mark.parametrize("terminal", [True, False])
def test_without_a_thread_for_the_bar_the_work_is_done_all_the_same(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, that stderr is one
    with pytest.raises(SystemExit) as caught:
        app(["run", str(model), "up", "--device", "cpu"], prog_name="qmm")
    assert not caught.value.code
    assert "compiling and multiplying by up" in capfd.readouterr().err


# verify ---------------------------------------------------------------------------------------------------------------


def test_verify_checks_all_tensors_and_lists_those_without_a_kernel(model: Path) -> None:
    result = invoke("verify", model, "--device", "cpu", "--json")
    assert result.code == 0
    document = result.document
    assert document["n"] == [1, 2, 8]
    checks = {check["tensor"]: check for check in document["checks"]}
    assert list(checks) == ["exotic", *SHAPES]
    assert (checks["exotic"]["supported"], checks["exotic"]["bit_exact"], checks["exotic"]["ok"]) == (False, None, True)
    assert [checks[name]["bit_exact"] for name in SHAPES] == [True] * 3
    assert checks["norm"]["nmse"]["int8"] is None
    for name in ("up", "down"):
        assert 0 < checks[name]["nmse"]["int8"] <= 5e-4
        assert checks[name]["nmse"]["f16"] <= 1e-6


def test_verify_paranoid_says_what_it_proved(model: Path) -> None:
    arguments = ("verify", model, "--device", "cpu", "--n", "1", "--activations", "f16", "--paranoid")
    result = invoke(*arguments)
    assert result.code == 0
    # Three tensors with a kernel, two ends, two fillers.
    assert "Between guards: 12 products and 12 dequantizations with 3 tensors" in result.out
    assert "0 tensors failed" in result.out
    assert "between guards, host" in result.err
    guards = invoke(*arguments, "--tensors", "up", "--json").document["guards"]
    assert guards == [{"tensor": "up", "products": 4, "dequantizations": 4, "failure": None}]


def test_verify_paranoid_fails_where_a_guard_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import os; from qmm.kernels.ops.cpu import products as cpu; cpu.dequantize = lambda *rest: os.abort()"
    monkeypatch.setattr(
        qmm.verify.paranoid, "CHILD", f"{broken}; from qmm.verify.paranoid import work; sys.exit(work())"
    )
    arguments = ("verify", model, "--device", "cpu", "--n", "1", "--activations", "f16", "--tensors", "up")
    assert "guards" not in invoke(*arguments).out
    result = invoke(*arguments, "--paranoid")
    assert result.code == 1
    assert "killed by SIGABRT" in result.out
    assert "1 tensors failed" in result.out


def test_verify_table_has_every_tensor(model: Path) -> None:
    result = invoke("verify", model, "--device", "cpu", "--n", "1", "--activations", "f16")
    assert result.code == 0
    assert "3 tensors checked" in result.out
    assert all(name in result.out for name in SHAPES)
    assert "no kernel" in result.out


@pytest.mark.parametrize("wrong", [1.0, np.nan, np.inf])
def test_verify_fails_on_one_wrong_result(model: Path, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    right = qmm.Engine.matmul

    def matmul(self: qmm.Engine, tensor: Any, x: Any, *rest: Any, **options: Any) -> Any:
        y = right(self, tensor, x, *rest, **options)
        if tensor.name == "up":
            y[-1, -1] += 10 * wrong
        return y

    monkeypatch.setattr(qmm.Engine, "matmul", matmul)
    result = invoke("verify", model, "--device", "cpu", "--n", "1,2", "--json")
    assert result.code == 1
    assert {check["tensor"] for check in result.document["checks"] if not check["ok"]} == {"up"}
    assert invoke("run", model, "up", "--device", "cpu", "--repeats", "1").code == 1


@pytest.mark.parametrize("name", SHAPES)
def test_verify_fails_on_one_wrong_bit_in_the_last_weight(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = qmm.Engine.dequantize

    def dequantize(self: qmm.Engine, tensor: Any, *rows: Any) -> Any:
        weights = right(self, tensor, *rows)
        if tensor.name == name:
            weights.reshape(-1).view(np.uint32)[-1] ^= 1
        return weights

    monkeypatch.setattr(qmm.Engine, "dequantize", dequantize)
    result = invoke("verify", model, "--device", "cpu", "--n", "1", "--json")
    assert result.code == 1
    checks = {check["tensor"]: check["bit_exact"] for check in result.document["checks"]}
    assert checks == {"exotic": None, **{other: other != name for other in SHAPES}}


def test_verify_walks_a_large_tensor_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_files.random_blocks("Q8_0", (37, 64), np.random.default_rng(1))
    gguf_files.write_gguf(tmp_path / "rows.gguf", {"rows": ("Q8_0", (37, 64), data)})
    monkeypatch.setattr("qmm.verify.oracle.BLOCK_WEIGHTS", 10 * 64)
    asked: list[tuple[int, int]] = []
    right = qmm.Engine.dequantize

    def dequantize(self: qmm.Engine, tensor: Any, first: int, last: int) -> Any:
        asked.append((first, last))
        return right(self, tensor, first, last)

    monkeypatch.setattr(qmm.Engine, "dequantize", dequantize)
    assert invoke("verify", tmp_path / "rows.gguf", "--device", "cpu").code == 0
    assert asked == [(0, 10), (10, 20), (20, 30), (30, 37)]


def test_verify_takes_tensors_without_values(tmp_path: Path) -> None:
    gguf_files.write_gguf(tmp_path / "empty.gguf", {"empty": ("Q8_0", (0, 64), b""), "up": ("F32", (1, 4), bytes(16))})
    document = invoke("verify", tmp_path / "empty.gguf", "--device", "cpu", "--json").document
    assert [check["ok"] for check in document["checks"]] == [True, True]


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_verify_of_a_file_without_tensors_claims_nothing(tmp_path: Path, json_option: tuple[str, ...]) -> None:
    gguf_files.write_gguf(tmp_path / "vocab.gguf", {})
    result = invoke("verify", tmp_path / "vocab.gguf", *json_option)
    assert result.code == 3
    assert "vocab.gguf: holds no tensors: nothing to verify" in result.err
    assert invoke("info", tmp_path / "vocab.gguf").code == 0
