"""Who may import whom, read from the sources; and that `import qmm` is light, measured in fresh processes."""

from __future__ import annotations

import ast
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"kernels": "qmm.kernels", "loaders": "qmm.loaders"}
SHARED = ("qmm.children", "qmm.cuda", "qmm.errors", "qmm.folders")
HEAVY = ("numba", "llvmlite", "cuda", "gguf", "typer", "rich")


def sources() -> list[Path]:
    # rglob does not follow the links qmm/kernels and qmm/loaders.
    return sorted(path for room in ("qmm", *ROOMS) for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> list[tuple[int, str]]:
    """List (line, dotted name) of all imports; `from a import b` counts as a and as a.b, for b may be a module."""
    names: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return names


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def forbidden_to_room(name: str, room: str) -> bool:
    if inside(name, "qmm"):
        return not any(inside(name, package) for package in (ROOMS[room], *SHARED))
    return any(inside(name, top) for top in ROOMS)  # `kernels`, `loaders` alone: found only from the repository's root


def offences(room: str, path: Path) -> list[str]:
    found = [(line, name) for line, name in imported(path) if forbidden_to_room(name, room)]
    return [f"{path.relative_to(ROOT)}:{line}: imports {name}" for line, name in found]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_itself_and_what_is_shared(room: str) -> None:
    assert [o for path in (ROOT / room).rglob("*.py") for o in offences(room, path)] == []


@pytest.mark.parametrize(
    ("name", "room", "forbidden"),
    [
        ("qmm.kernels.lang.ptx", "loaders", True),
        ("qmm.loaders", "kernels", True),
        ("qmm.engine", "kernels", True),
        ("qmm", "loaders", True),
        ("kernels.formats", "kernels", True),
        ("qmm.errors.GGUFError", "loaders", False),
        ("qmm.children", "kernels", False),
        ("qmm.kernels.formats.q4_k", "kernels", False),
        ("numba.cuda", "kernels", False),
    ],
)
def test_the_rule_tells_right_from_wrong(name: str, room: str, forbidden: bool) -> None:
    assert forbidden_to_room(name, room) == forbidden


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("lang", ("qmm.kernels.runtime", "qmm.kernels.ops", "qmm.kernels.tuning")),
        ("runtime", ("qmm.kernels.ops", "qmm.kernels.tuning")),
    ],
)
def test_a_folder_of_kernels_imports_nothing_above_it(folder: str, above: tuple[str, ...]) -> None:
    kernel = "qmm.kernels.runtime.kernel"  # a description, which the emulator's types name
    found = [(path, name) for path in (ROOT / "kernels" / folder).rglob("*.py") for _, name in imported(path)]
    bad = [(path, name) for path, name in found if any(inside(name, package) for package in above)]
    assert [f"{path.relative_to(ROOT)}: {name}" for path, name in bad if not inside(name, kernel)] == []


def test_imports_are_absolute_and_name_what_they_take() -> None:
    found = [(path, line, name) for path in sources() for line, name in imported(path)]
    assert [f"{p.relative_to(ROOT)}:{n}: {m}" for p, n, m in found if m.startswith(".") or m.endswith(".*")] == []


def calls_at_import(path: Path) -> list[tuple[int, str]]:
    """List the calls that importing the file makes: all but those in the bodies of functions and lambdas."""
    calls: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for outside in [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]:
                visit(outside)
            return
        if isinstance(node, ast.Lambda):
            return
        if isinstance(node, ast.Call):
            calls.append((node.lineno, ast.unparse(node.func)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return calls


def test_nothing_asks_for_a_device_at_import() -> None:
    # Declaring a kernel (cuda.jit, intrinsics) needs no device. These do, or compile for one.
    starts_work = (
        "cuInit", "cudaFree", "cudaMalloc", "cudaHostRegister", "cudaGetDevice", "cudaSetDevice", "cuCtx", "cuDevice",
        "cuda.current_context", "cuda.get_current_device", "cuda.is_available", "cuda.detect", "cuda.to_device",
        "cuda.device_array", "cuda.stream", "cuda.select_device", "cuda.compile", "Stream", "is_available",
    )  # fmt: skip
    found = [(path, line, name) for path in sources() for line, name in calls_at_import(path)]
    assert [f"{p.relative_to(ROOT)}:{n}: {m}()" for p, n, m in found if any(w in m for w in starts_work)] == []


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["tests", "tests/support", "benchmarks", "benchmarks/support"])
def test_the_package_is_found_whatever_folder_of_the_repository_comes_first(folder: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import qmm; print(qmm.__file__)"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / folder), str(ROOT)])}
    found = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)
    assert found.strip() == str(ROOT / "qmm" / "__init__.py")


def test_import_qmm_loads_neither_numba_nor_cuda() -> None:
    code = f"import json, sys, qmm; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(run_python(code)) == []


def test_import_qmm_takes_under_50_ms_beyond_numpy() -> None:
    code = "import numpy, time; t = time.perf_counter(); import qmm; print(time.perf_counter() - t)"
    assert statistics.median(float(run_python(code)) for _ in range(7)) < 0.050


def test_every_name_resolves_and_unknown_ones_are_refused() -> None:
    import qmm

    assert set(qmm.__all__) <= set(dir(qmm))
    assert all(hasattr(qmm, name) for name in qmm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = qmm.nonesuch
