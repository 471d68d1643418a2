"""The command line as it is called: help, `qmm info`, exit codes, and what an error looks like."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from command_line import ROOT, SHAPES, invoke, start

import qmm
import qmm.cli.smoke
from qmm.errors import DeviceError

COMMANDS = ("demo", "info", "run", "verify", "smoke")


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
