"""``qmm verify --paranoid`` on the CPU: what it runs, and that it finds what it is for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import random_blocks, write_gguf

from qmm.errors import QmmError
from qmm.model import open_model
from qmm.verify import paranoid
from qmm.verify.paranoid import Job, check_guarded

IQ1_S = 19  # a type without a kernel


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(5)
    shapes = {
        "first": ("Q8_0", (5, 96)),
        "none": ("Q8_0", (0, 64)),
        "half": ("F16", (3, 37)),
        "last": ("Q8_0", (2, 32)),
    }
    tensors: dict = {name: (kind, shape, random_blocks(kind, shape, rng)) for name, (kind, shape) in shapes.items()}
    tensors["exotic"] = (IQ1_S, (1, 256), bytes(50))
    path = tmp_path_factory.mktemp("paranoid") / "model.gguf"
    write_gguf(path, tensors)
    return path


def job(path: Path, *tensors: str, columns: tuple[int, ...] = (1,), modes: tuple[str, ...] = ("f16",)) -> Job:
    return Job(str(path), "cpu", "host", tensors, columns, modes, 0, ())


def with_child(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Breaks something in the child processes, and only there."""
    code = f"{change}\nfrom qmm.verify.paranoid import work; sys.exit(work())"
    monkeypatch.setattr(paranoid, "CHILD", f"exec({code!r})")


def test_every_tensor_is_checked_at_both_ends_beside_both_fillers(path: Path) -> None:
    seen: list[str] = []
    checks = check_guarded(
        job(path, "first", "none", "half", "exotic", "last", columns=(1, 3), modes=("int8", "f16")), seen.append
    )
    assert seen == ["first", "none", "half", "exotic", "last"]
    assert [check.failure for check in checks] == [None] * 5
    # Two ends, two fillers; by columns and activations, of which F16 knows one kind.
    assert [check.products for check in checks] == [16, 16, 8, 0, 16]
    assert [check.dequantizations for check in checks] == [4, 0, 4, 0, 4]


SHIFTED = (
    "from qmm.kernels.ops.cpu import products as cpu; kept = cpu.{name}; "
    "cpu.{name} = lambda f, a, *rest: kept(f, a + ({by}), *rest)"
)


@pytest.mark.parametrize("name", ["matmul", "dequantize"])
@pytest.mark.parametrize(("by", "place", "side"), [(1, 4096 - 510, "last"), (-1, 0, "first")])
def test_a_kernel_that_reads_one_byte_too_far_is_named_and_the_others_are_still_checked(
    path: Path, name: str, by: int, place: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is spared, and the open side, where poison would tell before the guard does."""
    with_child(monkeypatch, SHIFTED.format(name=name, by=f"{by} if rest[0] == 5 and a % 4096 == {place} else 0"))
    first, last = check_guarded(job(path, "first", "last"))
    assert first.failure is not None
    assert "the process was killed by SIGSEGV" in first.failure
    assert f"at the {side} byte that there is" in first.failure
    assert ("product" if name == "matmul" else "dequantization") in first.failure
    assert last.failure is None


SPOILED = """
import ctypes
from qmm.kernels.ops.cpu import products as cpu

dequantize, matmul = cpu.dequantize, cpu.matmul

def reads_beside(form, address, m, k, out):
    dequantize(form, address, m, k, out)
    if address % 4096 == 0:
        out[0, 0] += ctypes.string_at(address + m * form.row_nbytes(k), 1)[0]

def writes_beside(form, address, m, k, x, out, *mode):
    matmul(form, address, m, k, x, out, *mode)
    if out.ctypes.data % 4096 == 0:
        ctypes.memset(out.ctypes.data + out.nbytes, 1, 1)

def differs(form, address, m, k, x, out, *mode):
    matmul(form, address, m, k, x, out, *mode)
    out *= 1 + 2**-20 if address % 4096 in (0, 4096 - 510) else 1

"""


@pytest.mark.parametrize(
    ("change", "step", "says"),
    [
        ("cpu.dequantize = reads_beside", "dequantization of rows 0 to 5", "depend on what lies beside"),
        ("cpu.matmul = writes_beside", "product of n = 1", "bytes beside the results were written"),
        ("cpu.matmul = differs", "product of n = 1", "not the engine's"),
    ],
)
def test_what_does_not_fault_is_noticed_too(
    path: Path, change: str, step: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_child(monkeypatch, SPOILED + change)
    (check,) = check_guarded(job(path, "first"))
    assert check.failure is not None
    assert step in check.failure
    assert says in check.failure


def test_a_child_that_cannot_begin_says_why(path: Path) -> None:
    with pytest.raises(QmmError, match=r"gone\.gguf.*No such file"):
        check_guarded(job(path.with_name("gone.gguf"), "first"))


def test_a_child_does_not_check_a_file_that_was_put_in_the_place_of_the_models(tmp_path: Path) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    for name in (path, other):
        write_gguf(name, {"one": ("F32", (2, 3), bytes(24))})
    with open_model(path) as model:
        same = replace(job(path, "one"), identities=tuple(file.identity for file in model.known))
    assert [check.failure for check in check_guarded(same)] == [None]
    other.replace(path)
    with pytest.raises(
        QmmError, match=r"model\.gguf: was written or replaced since it was opened: inode was"
    ) as caught:
        check_guarded(same)
    assert "Traceback" not in str(caught.value)


def test_sums_that_cancel_or_overflow_may_come_in_another_order(tmp_path: Path) -> None:
    """Where the weights end their memory they are not aligned, and summed in another order."""
    weights = np.random.default_rng(1).standard_normal((3, 1001)).astype(np.float32)
    lowest = np.full((3, 1001), np.finfo(np.float32).min)
    cancel = np.tile(np.array([[1e8, -1e8, 1e-8]], np.float32), (3, 333))
    made = {"weights": weights, "lowest": lowest, "cancel": cancel}
    path = tmp_path / "model.gguf"
    write_gguf(path, {name: ("F32", values.shape, values.tobytes()) for name, values in made.items()})
    assert [check.failure for check in check_guarded(job(path, *made, columns=(1, 3)))] == [None] * 3


def test_a_child_that_cannot_start_is_an_error_that_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/python")
    with pytest.raises(QmmError, match=rf"^{path}: .*could not be started .*No such file"):
        check_guarded(job(path, "first"))
