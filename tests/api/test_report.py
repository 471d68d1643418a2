"""Reports: every one is a table for people and a JSON document for programs, from the same values."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from qmm.cli.info import InfoReport, MetadataRow, TensorRow, TypeRow
from qmm.cli.report import DemoReport, DemoRow, Report, RunReport, SmokeReport, Step, TensorCheck, VerifyReport
from qmm.cli.tables import Facts, Table, lines_of, mark, plain, scientific, shortened, significant, worst

TOLERANCES = {"int8": 5e-4, "f16": 1e-6}
INFO = InfoReport(
    file="model.gguf",
    files=("model.gguf",),
    version=3,
    alignment=32,
    architecture=None,
    name="a [bold]name[/bold]",
    nbytes=120,
    tensor_count=1,
    metadata=(MetadataRow("tokens", "string[3]", None), MetadataRow("eps", "float32", 9.999999974752427e-07)),
    tensors=(TensorRow("a[0].weight", "Q8_0", (3, 32), 102, 64, "model.gguf", True, 510),),
    types=(TypeRow("Q8_0", True, 1, 102, 1, 510),),
)
CHECK = TensorCheck("up", "Q8_0", (3, 32), 102, True, True, {"int8": 1e-5, "f16": 1e-8}, True)
PLAIN = TensorCheck("norm", "F32", (32,), 128, True, True, {"int8": None, "f16": 0.0}, True)
WITHOUT = TensorCheck("exotic", "IQ1_S", (3, 256), 150, False, None, {"int8": None, "f16": None}, True)
WRONG = TensorCheck("down", "Q8_0", (3, 32), 102, True, False, {"int8": math.nan, "f16": math.inf}, False)
VERIFY = VerifyReport("model.gguf", "cpu", "host", "on the CPU", (1, 8), TOLERANCES, 1.5, (CHECK, PLAIN, WITHOUT))
SMOKE = SmokeReport(
    "model.gguf", (Step(1, "map", True, "mapped", 0.1), Step(2, "initialise", True, "a GPU", 2.0)), None
)
RUN = RunReport(
    file="model.gguf",
    tensor="up",
    type="Q8_0",
    shape=(3, 32),
    nbytes=102,
    device="cpu",
    placement="host",
    explanation="on the CPU",
    activations="int8",
    n=1,
    seed=0,
    y=(1.0, -2.0),
    ms=0.5,
    repeats=3,
    gb_per_s=0.2,
    nmse=1e-5,
    tolerance=5e-4,
)
DEMO = DemoReport(
    file="model.gguf",
    tensors=2,
    nbytes=204,
    open_ms=3.0,
    device="cpu",
    placement="host",
    explanation="on the CPU",
    smoke=SMOKE,
    tolerances=TOLERANCES,
    rows=(
        DemoRow("Q8_0", (3, 32), 1, 102, 0.1, 1.0, True, {"int8": 1e-5, "f16": 1e-8}, True),
        DemoRow("F32", (32,), 1, 128, 0.1, 1.0, True, {"int8": None, "f16": 2e-8}, True),
    ),
    compile_seconds=1.0,
    seconds=2.0,
    conclusion="All is well.",
)
REPORTS = [INFO, RUN, VERIFY, SMOKE, DEMO]


def shown(report: Report) -> str:
    return "\n".join(lines_of(report.blocks(), 200))


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.command)
def test_document_is_json_with_command_verdict_and_every_field(report: Report) -> None:
    document = json.loads(report.document(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["command"] == report.command
    assert document["ok"] is True
    assert {field.name for field in dataclasses.fields(report)} <= set(document)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.command)
def test_people_see_the_file_or_tensor(report: Report) -> None:
    assert "model.gguf" in shown(report) or "up" in shown(report)


def test_names_with_brackets_are_not_markup() -> None:
    text = shown(INFO)
    assert "a[0].weight" in text
    assert "string[3]" in text
    assert "[bold]name[/bold]" in text


def test_a_wrong_tensor_makes_verify_fail_and_is_named() -> None:
    report = dataclasses.replace(VERIFY, checks=(CHECK, WRONG, WITHOUT))
    assert not report.ok
    text = shown(report)
    assert "1 failed: down" in text
    assert "NO" in text
    assert "no kernel" in text
    assert json.loads(report.document())["checks"][1]["nmse"] == {"int8": "nan", "f16": "inf"}


def test_a_type_without_a_kernel_does_not_make_verify_fail() -> None:
    assert VERIFY.ok
    assert "1 without a kernel, 0 failed" in shown(VERIFY)
    assert json.loads(VERIFY.document())["checks"][2]["bit_exact"] is None


@pytest.mark.parametrize(("nmse", "ok"), [(5e-4, True), (5.1e-4, False), (math.nan, False), (math.inf, False)])
def test_run_is_right_up_to_its_tolerance_and_never_with_nan(nmse: float, ok: bool) -> None:
    assert dataclasses.replace(RUN, nmse=nmse).ok is ok


def test_a_step_that_failed_or_was_not_reached_makes_smoke_and_demo_fail() -> None:
    for last in (Step(2, "initialise", False, "no driver", 1.0), Step(2, "initialise", None, "not reached", None)):
        smoke = dataclasses.replace(SMOKE, steps=(SMOKE.steps[0], last), advice="Use the CPU.")
        assert not smoke.ok
        assert not dataclasses.replace(DEMO, smoke=smoke).ok
        assert "Use the CPU." in shown(smoke)
    assert dataclasses.replace(DEMO, smoke=None).ok


def test_the_demos_last_row_sums_up() -> None:
    (total,) = [line for line in shown(DEMO).splitlines() if line.split()[:1] == ["all"]]
    assert total.split() == ["all", "-", "2", "0.000204", "-", "-", "yes", "1.0e-05", "2.0e-08", "yes"]


def test_plain_makes_json_of_numpy_and_paths() -> None:
    value = {"a": np.arange(3), "b": np.float32(0.5), "c": (Path("x"), np.bool_(True)), "d": [-math.inf]}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "a": [0, 1, 2],
        "b": 0.5,
        "c": ["x", True],
        "d": ["-inf"],
    }
    assert plain(np.array([1.0, np.nan])) == [1.0, "nan"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], None), ([None], None), ([None, 1.0], 1.0), ([1.0, 3.0, 2.0], 3.0), ([1.0, math.inf], math.inf)],
)
def test_worst_is_the_largest_that_was_measured(values: list[float | None], expected: float | None) -> None:
    assert worst(values) == expected


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan], [math.inf, math.nan, None]])
def test_nothing_is_worse_than_not_a_number(values: list[float | None]) -> None:
    result = worst(values)
    assert result is not None
    assert math.isnan(result)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.0"),
        (1.0, "1.00"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (0.01234, "0.0123"),
        (math.nan, "nan"),
    ],
)
def test_three_significant_digits(value: float | None, text: str) -> None:
    assert significant(value) == text


def test_small_cells() -> None:
    assert [mark(value) for value in (None, True, False)] == ["-", "yes", "NO"]
    assert [scientific(value) for value in (None, 0.0, 4.96e-4)] == ["-", "0.0e+00", "5.0e-04"]


def test_long_and_many_line_values_are_one_short_line() -> None:
    assert shortened("a\n  b") == "a b"
    assert shortened(9.999999974752427e-07) == "9.99999997e-07"
    assert shortened(np.arange(1000)).startswith("[0, 1, 2")
    assert len(shortened("x" * 1000)) == 60


LONG = "blk.0.a_very_long_name_of_a_tensor.weight"
NUMBERS = Table(
    "numbers", ("~name", "type", ">bytes", ">offset"), [(LONG, "Q8_0", "1,234,567,890", 0), ("b", "F32", 8, "12,345")]
)


@pytest.mark.parametrize("width", [30, 48, 60, 80, None])
def test_numbers_and_types_are_whole_at_every_width(width: int | None) -> None:
    lines = list(lines_of([NUMBERS], width))
    assert all(len(line) <= (width or 200) for line in lines)
    text = "\n".join(lines)
    for word in ("Q8_0", "1,234,567,890", "F32", "12,345"):
        assert re.search(rf"(?m)(^|\s){word}(,|$|\s)", text), text
    (start,) = re.findall(r"(?m)^blk\S*", text)
    assert LONG.startswith(start)


def test_a_long_name_is_broken_but_whole() -> None:
    lines = list(lines_of([NUMBERS], 48))
    assert "".join(line[:19].strip() for line in lines[3:-1]) == LONG


def test_a_table_too_wide_for_its_numbers_is_a_list() -> None:
    assert list(lines_of([NUMBERS], 30)) == [
        "numbers",
        "blk.0.a_very_long_name_of_a_",
        "tensor.weight",
        "  type: Q8_0,",
        "  bytes: 1,234,567,890,",
        "  offset: 0",
        "b",
        "  type: F32, bytes: 8,",
        "  offset: 12,345",
    ]


def test_without_a_terminal_columns_are_aligned_and_nothing_else() -> None:
    far = "x" * 300
    lines = list(lines_of([Table("t", ("~name", ">n"), [("a", 1), (far, 22)]), "a sentence " * 20], None))
    assert lines == ["t", f"{'name':64}   n", f"{'a':64}   1", f"{far}  22", "", "a sentence " * 20]


def test_wide_characters_take_two_cells() -> None:
    assert list(lines_of([Table("", ("~name", ">n"), [("\u91cd\u307f", 1), ("abcd", 2)])], None)) == [
        "name  n",
        "\u91cd\u307f  1",
        "abcd  2",
    ]


def test_sentences_break_between_words_and_never_in_a_command() -> None:
    lines = list(lines_of(["The CPU can do it: `qmm run a/model.gguf --device cpu`."], 30))
    assert lines == ["The CPU can do it:", "`qmm run a/model.gguf --device cpu`."]
    assert list(lines_of([Facts([("x", "one two three")])], 10)) == ["x  one two", "   three"]


def test_control_characters_of_a_file_do_not_reach_any_line() -> None:
    bad = "\x1b[31m\x9b\x7f\u202e\u2028\n\udcff"
    info = dataclasses.replace(
        INFO,
        file=bad,
        name=bad,
        metadata=(MetadataRow(bad, bad, bad),),
        tensors=(dataclasses.replace(INFO.tensors[0], name=bad),),
    )
    for width in (20, 80, None):
        assert all(line.isprintable() for line in lines_of(info.blocks(), width))
    document = info.document()
    assert document.isascii()
    assert all(character == "\n" or character.isprintable() for character in document)
    assert json.loads(document)["tensors"][0]["name"] == bad


def test_run_shows_operations_where_there_are_several_columns() -> None:
    several = dataclasses.replace(RUN, n=8)
    assert json.loads(several.document())["gflops"] == pytest.approx(2 * 3 * 32 * 8 / 0.5e-3 / 1e9)
    assert "GFLOP/s" in shown(several)
    assert "GFLOP/s" not in shown(RUN)


def test_an_empty_table_has_its_columns() -> None:
    assert list(lines_of([Table("nothing", ("~name", ">bytes"), [])], 80)) == ["nothing", "name  bytes", "-----------"]


def test_a_word_without_a_place_to_break_is_broken_where_the_line_ends() -> None:
    rows = [("x" * 30, 1), ("a.b" + "重" * 10, 2)]
    assert list(lines_of([Table("", ("~name", ">n"), rows)], 17))[2:] == [
        "xxxxxxxxxxxxxx  1",
        "xxxxxxxxxxxxxx",
        "xx",
        "a.              2",
        "b重重重重重重",
        "重重重重",
    ]


def test_a_number_among_texts_is_not_broken_either() -> None:
    rows = [("a.key.of.some.length", "uint64", str(2**64 - 1)), ("b", "string", "some text, which may be broken")]
    for width in (34, 44, 48, 56):
        text = "\n".join(lines_of([Table("", ("~key", "type", "~value"), rows)], width))
        assert str(2**64 - 1) in text
        assert max(map(len, text.splitlines())) <= width
