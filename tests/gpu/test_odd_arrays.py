"""Arrays that no copy or kernel can simply take: misaligned, without memory, or registered by others in part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from busy import registered
from children import run_python

import qmm

CHILD = """
import numpy as np, qmm
from busy import synchronize

engine = qmm.Engine(sys.argv[1], "cuda", "device")
values = np.random.default_rng(0).standard_normal((3, 256), np.float32)
expected = {dtype: engine.matmul("s", values.astype(dtype)) for dtype in (np.float32, np.float16)}
same = lambda y, dtype=np.float32: np.array_equal(y, expected[dtype])

def tried(label, use):
    try:
        right = use()
        synchronize()
        print(label, "right" if right is None or right() else "WRONG", flush=True)
    except qmm.ArrayError as error:
        print(label, "refused:", error, flush=True)
    except Exception as error:
        print(label, "LOST:", type(error).__name__, error, flush=True)
"""

MISALIGNED = (
    CHILD
    + """
import cupy
memory = cupy.zeros(1 << 16, cupy.uint8)
at = lambda offset, shape, dtype, strides=None: cupy.ndarray(
    shape, dtype, cupy.cuda.MemoryPointer(memory.data.mem, offset), strides)

def stored(offset, row_nbytes, rows):
    for number, row in enumerate(rows):
        start = offset + number * row_nbytes
        memory[start:start + row.nbytes] = cupy.asarray(row.view(np.uint8))

def x(offset, dtype, row_nbytes):
    rows = values.astype(dtype)
    stored(offset, row_nbytes, rows)
    y = engine.matmul("s", at(offset, rows.shape, dtype, (row_nbytes, rows.itemsize)))
    return lambda: same(cupy.asnumpy(y), dtype)

def out():
    engine.matmul("s", cupy.asarray(values), out=at(2, (3, 64), np.float32))
    return lambda: same(cupy.asnumpy(memory[2:2 + 3 * 64 * 4]).view(np.float32).reshape(3, 64))

tried("float32 at 2", lambda: x(2, np.float32, 1024))
tried("float16 at 1", lambda: x(1, np.float16, 512))
tried("a field of packed records", lambda: x(0, np.float32, 1025))
tried("out at 2", out)
tried("float32 at 4", lambda: x(4, np.float32, 1024))
"""
)


def test_misaligned_arrays_are_refused_or_right_and_cuda_still_works(model_path: Path) -> None:
    pytest.importorskip("cupy")
    done = run_python(MISALIGNED, model_path)
    assert done.returncode == 0, done.stdout + done.stderr
    *tried, aligned = done.stdout.splitlines()
    assert aligned == "float32 at 4 right"
    assert len(tried) == 4
    for line in tried:
        assert line.endswith("right") or "refused: " in line, line


WITHOUT_MEMORY = (
    CHILD
    + """
if sys.argv[2] == "cupy":
    import cupy
    there, back = cupy.asarray, cupy.asnumpy
    hollow = lambda *shape: cupy.ndarray(shape, cupy.float32, cupy.cuda.MemoryPointer(cupy.cuda.Memory(0), 0))
else:
    import torch
    there, back = lambda values: torch.from_numpy(values).cuda(), lambda array: array.cpu().numpy()
    def hollow(*shape):
        made = torch.zeros(shape, device="cuda")
        made.untyped_storage().resize_(0)
        return made

x, out = there(values), there(np.zeros((3, 64), np.float32))
engine.matmul("s", x, out=out)
engine.matmul("s", x)
engine.matmul_each(["s"], x, [out])
use = {
    "x": lambda: engine.matmul("s", hollow(3, 256)),
    "x, with out": lambda: engine.matmul("s", hollow(3, 256), out=out),
    "out": lambda: engine.matmul("s", x, out=hollow(3, 64)),
    "each": lambda: engine.matmul_each(["s"], hollow(3, 256)),
    "each, out": lambda: engine.matmul_each(["s"], x, [hollow(3, 64)]),
    "plan": lambda: engine.plan([("s", hollow(3, 256), out)]),
    "plan, out": lambda: engine.plan([("s", x, hollow(3, 64))]),
}
for label, call in use.items():
    tried(label, lambda: (call(), None)[1])
y = engine.matmul("s", x)
tried("with memory", lambda: lambda: same(back(y)))
"""
)


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_arrays_without_memory_are_refused_though_others_of_their_layout_were_used(
    model_path: Path, library: str
) -> None:
    pytest.importorskip(library)
    done = run_python(WITHOUT_MEMORY, model_path, library)
    assert done.returncode == 0, done.stdout + done.stderr
    *tried, control = done.stdout.splitlines()
    assert control == "with memory right"
    assert len(tried) == 7
    for line in tried:
        assert "refused: " in line, line


PAGE = 4096
REGISTERED = {
    "the beginning": (0, 4),
    "the middle": (8, 4),
    "the end": (60, 4),
    "two parts": (0, 4, 60, 4),
    "all": (0, 64),
}
"""Pairs of the first page that somebody registered, and how many, of 64."""


@pytest.fixture(scope="module", params=["device", "mapped"])
def other_engine(request: pytest.FixtureRequest, model_path: Path) -> Iterator[qmm.Engine]:
    with qmm.open(model_path) as model, qmm.Engine(model, "cuda", request.param) as engine:
        yield engine


@pytest.mark.parametrize("part", REGISTERED)
@pytest.mark.parametrize("side", ["x", "out"])
def test_host_arrays_that_are_registered_in_part_are_copied_all_the_same(
    other_engine: qmm.Engine, part: str, side: str, rng: np.random.Generator
) -> None:
    """One copy must not span registered memory and other."""
    name, columns = ("last", 1024) if side == "x" else ("s", 64)
    memory = np.zeros(65 * PAGE // 4, np.float32)
    start = -memory.ctypes.data % PAGE // 4
    array = memory[start : start + 64 * PAGE // 4].reshape(-1, columns)
    plain = rng.standard_normal((len(array), other_engine.model[name].k), np.float32)
    expected = other_engine.matmul(name, plain)
    places = REGISTERED[part]
    parts = [
        (array.ctypes.data + first * PAGE, count * PAGE) for first, count in zip(places[::2], places[1::2], strict=True)
    ]
    if side == "x":
        array[...] = plain
    with ExitStack() as held:
        for address, nbytes in parts:
            held.enter_context(registered(address, nbytes))
        y = other_engine.matmul(name, array) if side == "x" else other_engine.matmul(name, plain, out=array)
    np.testing.assert_array_equal(y, expected)


READ_ONLY = 1 | 2 | 8
"""cudaHostRegisterPortable, Mapped and ReadOnly: how a file that is mapped read-only can be registered."""


def test_activations_in_a_file_of_which_its_owner_registered_a_part(
    other_engine: qmm.Engine, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "x.bin"
    values = rng.standard_normal((64, 1024), np.float32)
    values.tofile(path)
    expected = other_engine.matmul("last", values)
    x = np.memmap(path, np.float32, "r", shape=values.shape)
    with registered(x.ctypes.data, 8 * PAGE, READ_ONLY):
        y = other_engine.matmul("last", x)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("neighbour", ["s", "next"])
@pytest.mark.parametrize("placement", ["device", "mapped"])
def test_activations_off_the_model_that_share_a_page_with_a_registered_tensor(
    model_path: Path, placement: str, neighbour: str
) -> None:
    with qmm.open(model_path) as model, qmm.Engine(model, "cuda", placement, tensors=[neighbour, "last"]) as engine:
        engine.matmul(neighbour, np.ones((1, 256), np.float32))
        whole = model["emb"].data.view(np.float32).reshape(-1)
        rows = whole[: 3 * 1024] if neighbour == "s" else whole[-97 * 1024 :]
        x = rows.reshape(-1, 1024)
        y = engine.matmul("last", x)
        np.testing.assert_array_equal(y, engine.matmul("last", x.copy()))
