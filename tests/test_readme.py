"""The READMEs' examples run, what they name exists, and the two commands are those that CI and the extras stand for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"{room}/README.md" for room in ("loaders", "kernels", "qmm", "tests", "benchmarks")))
WITH_EXAMPLES = PAGES[:4]
pages = pytest.mark.parametrize("page", PAGES)


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


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run(page: str, gemma_path: Path, tmp_path: Path) -> None:
    # In one namespace, in a folder where model.gguf is the demo model (blk.0.ffn_up.weight: 2048 x 640, Q5_0).
    code = python_only((ROOT / page).read_text(encoding="utf-8"))
    assert code.strip(), f"{page} has no ```python example"
    (tmp_path / "model.gguf").symlink_to(gemma_path)
    script = tmp_path / "README.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pages
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (ROOT / page).parent.joinpath(target).exists()] == []


@pages
def test_files_that_are_named_exist(page: str) -> None:
    # By their path from the root or from the page's folder, or in any folder of the page's room by their name alone.
    room = (ROOT / page).parent
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    named = re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|md)|(?:\w+/)+)`", text)
    missing = [name for name in named if not any((place / name).exists() for place in (ROOT, room))]
    missing = [name for name in missing if not any(room.rglob(name.rstrip("/")))]
    assert missing == []


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
    runs = re.findall(r"pytest\S*\s+(\S.*)", ci)
    assert runs == ["tests/api/test_torch.py tests/api/test_torch_operator.py"], (
        ".ci/run must take the test command from README.md"
    )


def test_ci_extracts_the_same_commands(readme: str) -> None:
    extract = re.search(r"^readme_command\(\) .*?^}$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE | re.DOTALL)
    assert extract, ".ci/run must define readme_command"
    for name in ("demo", "tests"):
        script = f"{extract[0]}\nreadme_command {name}"
        done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == command(readme, name)
