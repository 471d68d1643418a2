"""Progress on stderr: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import re
import time

import pytest
from rich.progress import Progress

import qmm.cli.progress
from qmm.cli.progress import Bar


def test_without_a_terminal_stages_are_lines_and_silence_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(qmm.cli.progress, "SILENCE", 0.05)
    with Bar() as bar:
        bar.stage("compiling\x1b[2J")
        time.sleep(0.2)
        bar.start(3)
        bar.step("blk.0\n")
        time.sleep(0.2)
    time.sleep(0.1)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == r"compiling\x1b[2J"
    assert re.fullmatch(r"\d+ s: compiling\\x1b\[2J", lines[1])
    assert re.fullmatch(r"\d+ s: 1 of 3 done, now after blk\.0\\n", lines[-1])
    assert len(lines) <= 30


def test_on_a_terminal_there_is_no_count_before_there_is_a_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Bar() as bar:
        assert isinstance(bar._progress, Progress)
        bar.stage("compiling [red]")
        bar._progress.refresh()
        bar.start(3)
        bar.step("\x1b[31mblk.0")
        bar._progress.refresh()
    err = capsys.readouterr().err
    assert "compiling [red]" in err
    assert "?" not in err.replace("\x1b[?25", "")
    assert "1/3" in err
    assert r"\x1b[31mblk.0" in err
    assert "\x1b[31m" not in err
