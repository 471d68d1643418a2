"""The README's examples run, and its two commands are the ones that CI and the extras stand for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def python_only(markdown: str) -> str:
    """Blank every line outside ```python blocks, so that a traceback's line numbers are the README's."""
    lines, inside = [], False
    for line in markdown.splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines) + "\n"


def command(markdown: str, name: str) -> str:
    """Return the bash block that follows `<!-- command: name -->`; .ci/run does the same with sed."""
    found = re.findall(rf"^<!-- command: {name} -->\n+```bash\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"README.md must have one bash block after <!-- command: {name} -->, has {len(found)}"
    return str(found[0])


def test_python_blocks_keep_their_lines() -> None:
    markdown = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = x\n```\n"
    assert python_only(markdown).splitlines() == ["", "", "x = 1", "", "", "", "", "", "y = x", ""]


def test_readme_examples_run(readme: str, gemma_path: Path, tmp_path: Path) -> None:
    # In one namespace, in a folder where model.gguf is the demo model (blk.0.ffn_up.weight: 2048 x 640, Q5_0).
    code = python_only(readme)
    assert code.strip(), "README.md has no ```python example"
    (tmp_path / "model.gguf").symlink_to(gemma_path)
    script = tmp_path / "README.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_demo_command_is_whole(readme: str) -> None:
    block = command(readme, "demo")
    assert "[demo]" in block or "[demo," in block or ",demo]" in block
    assert re.search(r"qmm demo\s*$", block)


def test_tests_command_is_whole_and_the_one_that_ci_runs(readme: str) -> None:
    block = command(readme, "tests")
    assert "[test]" in block
    assert re.search(r"pytest\s*$", block)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "readme_command tests" in ci
    runs = re.findall(r"pytest\S*\s+(\S+)", ci)
    assert runs == ["tests/api/test_torch.py"], ".ci/run must take the test command from README.md"


def test_ci_extracts_the_same_commands(readme: str) -> None:
    extract = re.search(r"^readme_command\(\) .*?^}$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE | re.DOTALL)
    assert extract, ".ci/run must define readme_command"
    for name in ("demo", "tests"):
        script = f"{extract[0]}\nreadme_command {name}"
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == command(readme, name)
