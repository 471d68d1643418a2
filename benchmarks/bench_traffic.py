"""How many bytes of a weight a product moves, as Nsight Compute counts them: each should be read once.

    pytest benchmarks/bench_traffic.py [--save-results]

``ncu`` runs this file as a program, which makes one product for each case, and counts in the kernels named ``matvec``:
what is read from device memory, with empty caches (its default), and the 32-byte sectors that are asked of host memory.
The activations are in the first count too, once.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf_files import nbytes_of, random_blocks, write_gguf

import qmm
from benchmarks.support import gpu as machine

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

NCU = shutil.which("ncu")
pytestmark = [
    pytest.mark.skipif(machine.missing() is not None, reason=f"no GPU: {machine.missing()}"),
    pytest.mark.skipif(NCU is None, reason="no ncu on PATH: it comes with the CUDA toolkit, as Nsight Compute"),
]

TYPES = ("Q8_0", "Q4_K", "Q6_K")
M, K = 4096, 4096
COLUMNS = (1, 8)
PLACEMENTS = ("device", "mapped")
FROM_DEVICE = "dram__bytes_read.sum"
FROM_HOST = "lts__t_sectors_srcunit_tex_aperture_sysmem_op_read.sum"
SECTOR_NBYTES = 32
TOLERANCE = 0.02
KEY = ("type", "m", "k", "n", "placement")
CASES = [(name, placement, n) for placement in PLACEMENTS for name in TYPES for n in COLUMNS]


def write(folder: Path) -> Path:
    path = folder / "traffic.gguf"
    rng = np.random.default_rng(0)
    write_gguf(path, {name: (name, (M, K), random_blocks(name, (M, K), rng)) for name in TYPES})
    return path


def products(path: Path) -> None:
    """What ncu looks at: a product for each case, in their order."""
    from numba import cuda

    for placement in PLACEMENTS:
        with qmm.open(path) as model, qmm.Engine(model, "cuda", placement) as engine:
            for name, n in [case[::2] for case in CASES if case[1] == placement]:
                x = cuda.to_device(np.ones((n, K), np.float32))
                engine.matmul(name, x, out=cuda.device_array((n, M), np.float32))
                cuda.synchronize()


def counted(path: Path) -> list[dict[str, float]]:
    """What ncu counts of each product, by the names of the metrics."""
    assert NCU is not None
    command = [NCU, "--csv", "--print-units", "base", "--kernel-name", "regex:matvec"]
    command += ["--metrics", f"{FROM_DEVICE},{FROM_HOST}", sys.executable, __file__, str(path)]
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "tests"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    start = done.stdout.find('"ID"')
    assert start >= 0, done.stdout + done.stderr
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO(done.stdout[start:])):
        found.setdefault(row["ID"], {})[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def test_each_byte_is_read_once(benchmark: BenchmarkFixture, tmp_path: Path, record: Callable[..., Any]) -> None:
    benchmark.group = "traffic"
    path = write(tmp_path)
    found = benchmark.pedantic(counted, (path,), rounds=1)
    assert len(found) == len(CASES)
    for (name, placement, n), counts in zip(CASES, found, strict=True):
        nbytes = nbytes_of(name, (M, K))
        read = counts[FROM_DEVICE] if placement == "device" else counts[FROM_HOST] * SECTOR_NBYTES
        row = {"type": name, "m": M, "k": K, "n": n, "placement": placement, "bytes": nbytes, "bytes read": int(read)}
        record({**row, "read / bytes": read / nbytes}, **machine.about())
        assert abs(read / nbytes - 1) <= TOLERANCE, row


if __name__ == "__main__":
    products(Path(sys.argv[1]))
