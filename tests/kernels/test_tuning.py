"""Measured configs: whom they serve, and that the tool writes what it measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import tune
from qmm.kernels import tuning
from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.matvec.choose import choose, rule
from qmm.kernels.ops.matvec.config import Case, Config, legal
from qmm.kernels.ops.op import Architecture
from qmm.kernels.tuning import Tuning, tuning_for

FILES = sorted(tuning.FOLDER.glob("*.json"))


def measured_cases() -> list[Any]:
    found = []
    for path in FILES:
        content = json.loads(path.read_text())
        for case in content["cases"]:
            name = f"{path.stem}-{case['format']}-{case['m']}x{case['k']}-{case['columns']}"
            found.append(pytest.param(Architecture(**content["architecture"]), case, id=name))
    return found


def case_of(case: dict[str, Any], **changed: Any) -> Case:
    fields = {name: case[name] for name in ("m", "k", "int8", "alignment", "fusible", "mapped")}
    return Case(FORMATS[case["format"]], n=case["columns"], **{**fields, **changed})


def test_there_is_a_file() -> None:
    assert FILES


@pytest.mark.parametrize(("architecture", "case"), measured_cases())
def test_what_was_measured_is_legal_and_chosen_on_such_a_gpu(architecture: Architecture, case: dict[str, Any]) -> None:
    config = Config(**case["config"])
    assert legal(config, case_of(case), architecture) == ""
    assert case["us"] < case["rule us"]
    assert choose(case_of(case), architecture).config == config


@pytest.mark.parametrize(("architecture", "case"), measured_cases())
def test_it_serves_products_of_about_the_size_and_no_others(architecture: Architecture, case: dict[str, Any]) -> None:
    config, block = Config(**case["config"]), FORMATS[case["format"]].block_weights
    near, far = (
        case_of(case, m=round(case["m"] * 1.2)),
        case_of(case, m=8 * case["m"], k=4 * case["k"] // block * block),
    )
    assert choose(near, architecture).config == config
    for other in (far, case_of(case, mapped=not case["mapped"]), case_of(case, alignment=1)):
        assert choose(other, architecture).config == rule(other, architecture)


@pytest.mark.parametrize(("architecture", "case"), measured_cases())
def test_another_gpu_is_not_served(architecture: Architecture, case: dict[str, Any]) -> None:
    for changed in ({"bus_bits": 1}, {"sms": 78}, {"l2_nbytes": 0}):
        other = dataclasses.replace(architecture, **changed)
        assert tuning_for(other) is None
        assert choose(case_of(case), other).config == rule(case_of(case), other)


CASE = {
    "format": "Q8_0",
    "m": 64,
    "k": 64,
    "columns": 1,
    "int8": True,
    "alignment": 2,
    "fusible": True,
    "mapped": False,
}
CONFIG = {"warps": 8}


def test_the_tool_keeps_what_is_faster_and_replaces_what_it_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.machine, "about", lambda: {"gpu": "Made-up 1"})
    device: Any = SimpleNamespace(architecture=Architecture(1, 2, True, 3, 4))
    faster = {**CASE, "config": CONFIG, "us": 9.0, "rule us": 10.0}
    slower = {**CASE, "m": 128, "config": CONFIG, "us": 9.9, "rule us": 10.0}
    path = tune.write("made-up", [faster, slower], device, tmp_path)
    assert [case["m"] for case in json.loads(path.read_text())["cases"]] == [64]
    assert Tuning(path).architecture == device.architecture
    key = tuple(CASE[name] for name in ("format", "columns", "int8", "alignment", "fusible", "mapped"))
    found = Tuning(path).find(key, 70, 64)
    assert found is not None
    assert (found.us, found.rule_us, found.config) == (9.0, 10.0, CONFIG)
    tune.write("made-up", [{**faster, "us": 8.0}, {**slower, "us": 5.0}], device, tmp_path)
    assert [(case["m"], case["us"]) for case in json.loads(path.read_text())["cases"]] == [(128, 5.0), (64, 8.0)]
    tune.write("made-up", [{**faster, "us": 10.0}], device, tmp_path)  # the rule has caught up
    assert [case["m"] for case in json.loads(path.read_text())["cases"]] == [128]


@pytest.mark.parametrize(("text", "placement"), [("Q4_K:640x1024:8", "device"), ("F16:14336x4096:1:mapped", "mapped")])
def test_cases_are_named_on_the_command_line(text: str, placement: str) -> None:
    weight, n = tune.weight_of(text)
    assert f"{weight.type}:{weight.m}x{weight.k}:{n}" in text
    assert weight.placement == placement
