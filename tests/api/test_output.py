"""What reaches the terminal, and what becomes of a command whose stdout or stderr cannot be written to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf_files
import pytest

import qmm
from qmm.output import json_text, printable

ROOT = Path(__file__).resolve().parents[2]
BAD = "\x1b[2J\x07\x7f\x9b\u202e\u2066\u2028\r\n\t"
ESCAPED = r"\x1b[2J\x07\x7f\x9b\u202e\u2066\u2028\r\n\t"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose path, names, keys and values have control characters, markup, and bytes that are no UTF-8."""
    path = tmp_path_factory.mktemp("odd") / f"m{BAD}\udcff.gguf"
    name = b"n\xff[red]\xc3\xa9" + BAD.encode()
    row = ("F32", (1, 8), bytes(32))
    gguf_files.write_gguf(path, {name: row, "w\n": row}, metadata={f"key{BAD}": f"value{BAD}", "general.name": "[b]"})
    return path


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose table is longer than a pipe holds."""
    path = tmp_path_factory.mktemp("long") / "m.gguf"
    gguf_files.write_gguf(path, {f"{number:0200}": ("F32", (1,), bytes(4)) for number in range(1000)})
    return path


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qmm", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}  # smoke fails everywhere
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=options.pop("stderr", subprocess.PIPE), **options
    )


def test_printable_writes_what_does_not_show() -> None:
    assert printable(BAD) == ESCAPED
    assert printable("a\udcff\ud800\U000e0001") == r"a\xff\ud800\U000e0001"
    assert printable("重み é [red] \\") == "重み é [red] \\"


def test_json_is_printable_and_the_same_when_it_is_read() -> None:
    text = json_text({"a": f"{BAD}\udcff é"})
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text) == {"a": f"{BAD}\udcff é"}


@pytest.mark.parametrize("error", [qmm.QmmError, qmm.FileMissingError, qmm.TensorNotFoundError, qmm.ArrayError])
def test_errors_are_one_line_of_characters_that_show(error: type[qmm.QmmError]) -> None:
    assert str(error(f"{BAD}: 'x' is wrong")) == f"{ESCAPED}: 'x' is wrong"
    assert error(BAD).args == (BAD,)


def test_nothing_of_a_file_steers_the_terminal(odd: Path) -> None:
    commands = [
        ("info", odd),
        ("info", odd, "--json"),
        ("info", odd, "--tensors", BAD),
        ("run", odd, f"w{BAD}"),
        ("smoke", odd),
        ("info", odd, odd),
        ("info", odd, f"--device={BAD}"),
    ]
    ran = [start(*command, stdout=subprocess.PIPE) for command in commands]
    ran.append(start("info", odd, stdout=subprocess.PIPE, env={"COLUMNS": "60", "PYTHONIOENCODING": "ascii"}))
    both = [process.communicate() for process in ran]
    for out, said in both:
        for text in (out.decode(), said.decode()):
            assert all(line.isprintable() for line in text.split("\n"))
            assert "Traceback" not in text
    assert [process.returncode for process in ran] == [0, 0, 2, 3, 1, 2, 2, 0]
    table, document = both[0][0].decode(), json.loads(both[1][0])
    assert rf"n\xff[red]é{ESCAPED}" in table
    assert rf"key{ESCAPED}" in table
    assert rf"m{ESCAPED}\xff.gguf" in table
    assert document["tensors"][0]["name"] == f"n\udcff[red]é{BAD}"
    assert b"[red]\\xe9" in both[-1][0].replace(b"\n", b"")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_pipe_that_does_not_block_loses_nothing_of_stdout(long: Path, stream: str) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)  # as another program may do to a pipe that it shares with us
    os.write(write, b" " * (64 << 10))
    process = start("info", long, "--json", **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write})
    os.close(write)
    with open(read, "rb") as end:
        if stream == "stdout":
            out = end.read()
            process.communicate()
        else:
            out = process.communicate()[0]
    assert process.returncode == 0
    assert len(json.loads(out)["tensors"]) == 1000


@contextmanager
def closed_pipe() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


ASKED = [("info", "--json"), ("info", "--help"), ("run", "--device=cpu", "missing", "--json")]


def asked(command: tuple[str, ...], path: Path) -> list[object]:
    return [command[0], path, *command[1:]]


def test_a_full_stdout_is_a_sentence_and_exit_code_3(long: Path) -> None:
    with open("/dev/full", "wb") as full:
        ran = [start(*asked(command, long), stdout=full) for command in ASKED]
        said = [process.communicate()[1].decode() for process in ran]
    assert [process.returncode for process in ran] == [3] * len(ASKED)
    for text in said:
        assert text.splitlines()[-1] == "error: standard output cannot be written to: No space left on device"
        assert "Traceback" not in text
    assert "missing" in said[-1]


def test_a_closed_stdout_is_a_sentence_and_exit_code_3_before_any_work(long: Path) -> None:
    ran = [start(*asked(command, long), preexec_fn=lambda: os.close(1)) for command in ASKED]
    said = [process.communicate()[1].decode() for process in ran]
    assert [process.returncode for process in ran] == [3] * len(ASKED)
    assert all(len(text.splitlines()) == 1 and "it is closed" in text for text in said)


def test_a_closed_pipe_ends_a_command_silently_as_sigpipe_would(long: Path) -> None:
    with closed_pipe() as pipe:
        ran = [start(*asked(command, long), stdout=pipe) for command in ASKED[:-1]]
        said = [process.communicate()[1] for process in ran]
    assert [(process.returncode, text) for process, text in zip(ran, said, strict=True)] == [(141, b"")] * len(said)


def test_the_first_lines_are_enough_for_head(long: Path) -> None:
    with start("info", long, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().split() == [b"file", os.fsencode(long)]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_nothing_depends_on_stderr(long: Path) -> None:
    missing = ["info", "missing.gguf", "--json"]
    with open("/dev/full", "wb") as full, closed_pipe() as pipe:
        ran = [start(*missing, stdout=subprocess.PIPE, stderr=stream) for stream in (full, pipe)]
        for command in (missing, ["smoke", long]):
            ran.append(start(*command, stdout=subprocess.PIPE, stderr=None, preexec_fn=lambda: os.close(2)))
        out = [process.communicate()[0] for process in ran]
    assert [process.returncode for process in ran] == [3, 3, 3, 1]
    assert all(json.loads(text)["error"]["type"] == "FileMissingError" for text in out[:3])
    assert b"freed" in out[3]


def test_names_in_utf8_are_found_and_shown_in_every_encoding(tmp_path: Path) -> None:
    path = tmp_path / "é.gguf"
    gguf_files.write_gguf(path, {"重み": ("F32", (1, 8), bytes(32)), "w": ("F32", (1, 8), bytes(32))})
    no_utf8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environments = [{}, {"PYTHONIOENCODING": "ascii"}, no_utf8]
    ran = [start("info", path, "--tensors", "重*", stdout=subprocess.PIPE, env=env) for env in environments]
    out = [process.communicate()[0] for process in ran]
    assert [process.returncode for process in ran] == [0, 0, 0]
    assert "重み" in out[0].decode()
    assert all(rb"\u91cd\u307f" in text and text.isascii() for text in out[1:])
    assert not any(b"\nw " in text for text in out)


def test_a_warning_is_one_line_of_characters_that_show() -> None:
    code = "import warnings, qmm.output; qmm.output.take_streams(); warnings.warn('a\\x1b[2J\\nb', RuntimeWarning)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stderr == b"warning: a\\x1b[2J\\nb\n"


def test_a_fault_in_qmm_is_a_traceback_that_can_be_printed_and_no_failed_check(long: Path) -> None:
    code = (
        "import sys, qmm.cli.app, qmm.cli.info\ndef describe(*asked): raise ValueError('a\\x1b[2J')\n"
        f"qmm.cli.info.describe = describe; sys.argv[1:] = ['info', {str(long)!r}]; qmm.cli.app.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.startswith(b"Traceback")
    assert b"\nValueError: a\\x1b[2J\nerror: this is a fault in qmm." in done.stderr
