"""A GPU whose memory others hold: what is said then, what still works, and what works again afterwards.

Each test fills the whole GPU, in a process of its own.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from busy import synchronize
from children import run_python

import qmm

START = """
import numpy as np, qmm
from busy import free_nbytes, new_stream, synchronize
from cuda.bindings import runtime

model = qmm.open(sys.argv[1])
rng = np.random.default_rng(0)

def allocated(size):
    error, address = runtime.cudaMalloc(size)
    if int(error):
        runtime.cudaGetLastError()
    return None if int(error) else int(address)

def tried(label, use):
    try:
        right = use()
        synchronize()
        print(label, "WRONG" if right is False else "worked", flush=True)
    except qmm.QmmError as error:
        print(label, "refused:", error, flush=True)
    except Exception as error:
        print(label, "LOST:", type(error).__name__, error, flush=True)
"""

FULL = (
    START
    + """
from numba import cuda

values = rng.standard_normal((4096, 4096), np.float32).astype(np.float16)
big, x = cuda.to_device(values), cuda.to_device(values[:64])
out_big, out = (cuda.device_array((n, 8192), np.float16) for n in (4096, 64))
last_x, last_out = cuda.to_device(np.ones((3, 1024), np.float32)), cuda.device_array((3, 64), np.float32)
host, host_big = np.ones((3, 256), np.float32), np.ones((4096, 4096), np.float32)
stream = new_stream()

def another_engine(engine):
    with qmm.Engine(model, "cuda", "device") as other:
        other.matmul("w", x, out)
        synchronize()

USES = {
    "more rows": lambda engine: engine.matmul("w", big, out_big),
    "another stream": lambda engine: engine.matmul("w", x, out, stream),
    "the first use of a weight": lambda engine: engine.matmul("last", last_x, last_out),
    "host arrays": lambda engine: engine.matmul("w", host_big),
    "a plan": lambda engine: engine.plan([("w", big, out_big)]).close(),
    "dequantize": lambda engine: engine.dequantize("w"),
    "another engine": another_engine,
}

with qmm.Engine(model, "cuda", "device") as first:  # loads the kernels
    for use in USES.values():
        use(first)
    synchronize()
engine = qmm.Engine(model, "cuda", "device")
engine.matmul("w", x, out)
synchronize()
right, host_right = out.copy_to_host(), engine.matmul("s", host)

held, size = [], free_nbytes()
while size >= 512:
    address = allocated(size)
    if address is None:
        size //= 2
    else:
        held.append(address)
for label, use in USES.items():
    tried(label, lambda: (use(engine), None)[1])
with qmm.Engine(model) as auto:
    print("auto", np.isfinite(auto.matmul("s", host)).all(), auto.explanation, flush=True)

def again():
    out.copy_to_device(np.zeros(out.shape, np.float16))
    engine.matmul("w", x, out)
    synchronize()
    return np.array_equal(out.copy_to_host(), right)

tried("what has its memory", again)
for address in held:
    runtime.cudaFree(address)
for label, use in USES.items():
    tried(label + " afterwards", lambda: (use(engine), None)[1])
tried("rows afterwards", lambda: np.array_equal(out_big.copy_to_host()[:64], right))
tried("host arrays afterwards", lambda: np.array_equal(engine.matmul("s", host), host_right))
tried("all afterwards", again)
print("last error", int(runtime.cudaGetLastError()[0]))
engine.close()
"""
)

WAY_OUT = r"(?i)\b(free|close|use|pass|give|fewer|smaller|placement)\b"


def test_errors_on_a_full_gpu_say_how_much_and_what_to_do_and_auto_takes_the_cpu(model_path: Path) -> None:
    done = run_python(FULL, model_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    full, auto, rest = lines[:7], lines[7], lines[8:]
    assert sum("refused: " in line for line in full) >= 2, done.stdout  # the GPU was full
    for line in full:
        if not line.endswith(" worked"):
            assert "refused: " in line, line
            assert re.search(WAY_OUT, line.partition("refused: ")[2]), line
            assert line.startswith("another engine") or re.search(r"\d+ bytes", line), line
    assert auto.startswith("auto True on the CPU"), auto
    assert "memory" in auto, auto
    *worked, last_error = rest
    assert [line for line in worked if not line.endswith(" worked")] == []
    assert len(worked) == 11
    assert last_error == "last error 0"


CACHED = (
    START
    + """
import torch

x = torch.from_numpy(rng.standard_normal((16384, 4096), np.float32).astype(np.float16)).cuda()
out = torch.zeros(16384, 8192, device="cuda", dtype=torch.float16)
host = np.ones((4096, 4096), np.float32)
engine, other = (qmm.Engine(model, "cuda", "device") for _ in range(2))
right = engine.matmul("w", x[:64]).clone()
host_right, weights = engine.matmul("w", host[:64]), engine.dequantize("w")

def cached(label, use):
    out.zero_()
    synchronize()
    torch.cuda.empty_cache()
    torch.empty(free_nbytes() - (64 << 20), dtype=torch.uint8, device="cuda")  # dropped, and kept by PyTorch
    held = []
    while free_nbytes() > 24 << 20 and (address := allocated(8 << 20)) is not None:
        held.append(address)
    assert free_nbytes() < 32 << 20
    tried(label, use)
    for address in held:
        runtime.cudaFree(address)

def plan():
    with engine.plan([("w", x, out)]) as made:
        made()
        synchronize()
    return torch.equal(out[:64], right)

def product(engine, n):
    engine.matmul("w", x[:n], out[:n])
    synchronize()
    return torch.equal(out[:64], right)

cached("the first use of a weight", lambda: product(other, 64))
cached("many rows", lambda: product(engine, 16384))
cached("a plan", plan)
cached("host arrays", lambda: np.array_equal(engine.matmul("w", host)[:64], host_right))
cached("dequantize", lambda: np.array_equal(engine.dequantize("w"), weights))
other.close()
engine.close()
"""
)


def test_memory_that_torch_only_caches_is_used(model_path: Path, torch: Any) -> None:
    done = run_python(CACHED, model_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.endswith(" worked")] == []
    assert len(lines) == 5


def test_a_result_that_cupys_limit_forbids_leaves_the_engine_as_it_was(engine: qmm.Engine, cupy: Any) -> None:
    pool = cupy.get_default_memory_pool()
    gc.collect()
    pool.free_all_blocks()
    x = cupy.ones((256, 4096), cupy.float32)
    engine.matmul("w", x[:64])
    synchronize()
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes())
    try:
        with pytest.raises((MemoryError, qmm.QmmError)):  # CuPy's own OutOfMemoryError is a MemoryError
            engine.matmul("w", x)
    finally:
        pool.set_limit(size=0)
    np.testing.assert_array_equal(engine.matmul("w", x).get(), engine.matmul("w", np.ones(x.shape, np.float32)))
