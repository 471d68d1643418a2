"""What a change costs the host: calls of another checkout and of this one, by turns.

    python -m benchmarks.turns OTHER [--turns 6]

Each turn is a new process, which imports qmm from one of the two, and times calls that queue small products and do not
wait (without a GPU: products on the CPU). A host may have two speeds, which change from one process to the next. So the
least of the processes' medians is shown. Compiled kernels are kept in a folder of their own for each checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

M, K = 640, 1024
TENSORS = 16
CALLS = 64
ROUNDS, WARM_UP = 100, 40
HERE = Path(__file__).resolve().parents[1]

Calls = tuple[str, int, Callable[[], object]]
"""What is timed, how many calls it makes, and a function that makes them."""


def calls_on_gpu(engine: Any) -> Iterator[Calls]:
    """With arrays of Numba's, and of PyTorch's where it is installed."""
    import numpy as np
    from numba import cuda

    tensors = list(engine.model.values())
    x = cuda.to_device(np.ones((1, K), np.float32))
    y, *others = [cuda.device_array((1, M), np.float32) for _ in range(3)]
    own = engine.gpu.stream

    def matmul(x: Any, out: Any, stream: Any) -> Callable[[], object]:
        return lambda: [engine.matmul(tensors[i % TENSORS], x, out, stream) for i in range(CALLS)]

    yield "matmul, Numba, the engine's stream", CALLS, matmul(x, y, own)
    yield "matmul, Numba, no stream", CALLS, matmul(x, y, None)
    yield "matmul_each of 3", 16, lambda: [engine.matmul_each(tensors[:3], x, [y, *others], own) for _ in range(16)]
    with engine.plan([(tensors[0], x, y)]) as plan:
        yield "plan of 1", CALLS, lambda: [plan() for _ in range(CALLS)]
    try:
        import torch
    except ImportError:
        return
    x, y = (torch.ones((8, n), dtype=torch.float16, device="cuda") for n in (K, M))
    other = torch.cuda.Stream()
    for out, result in ((y, "out"), (None, "new")):
        for name, stream in (("current", None), ("another", other), ("another's number", other.cuda_stream)):
            yield f"matmul, PyTorch, stream: {name}, result: {result}", CALLS, matmul(x, out, stream)


def calls_of_host_arrays(engine: Any) -> Iterator[Calls]:
    import numpy as np

    tensors, x = list(engine.model.values()), np.ones((1, K), np.float32)
    yield "matmul, NumPy", TENSORS, lambda: [engine.matmul(tensor, x) for tensor in tensors]


def timed(path: Path, rounds: int, checkout: Path) -> dict[str, float]:
    """Microseconds of a call, the median, by what it is."""
    import qmm

    if not Path(qmm.__file__).resolve().is_relative_to(checkout):
        sys.exit(f"qmm was imported from {qmm.__file__}, not from {checkout}, which is no checkout of it")
    found = {}
    with qmm.open(path) as model, qmm.Engine(model) as engine:
        kinds = [calls_of_host_arrays] if engine.gpu is None else [calls_on_gpu, calls_of_host_arrays]
        for what, count, calls in (row for kind in kinds for row in kind(engine)):
            seconds = []
            for _ in range(WARM_UP * rounds // ROUNDS + rounds):
                if engine.gpu is not None:
                    engine.gpu.drain()
                started = time.perf_counter()
                calls()
                seconds.append(time.perf_counter() - started)
            found[what] = sorted(seconds[-rounds:])[rounds // 2] / count * 1e6
    return found


def process(checkout: Path, path: Path, rounds: int, cache: Path) -> dict[str, float]:
    """The same in a new process, with qmm of that checkout."""
    arguments = [Path(__file__).resolve(), "--time", path, "--rounds", rounds, checkout]
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "QMM_CACHE_DIR": str(cache), "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {done.stderr}")
    times: dict[str, float] = json.loads(done.stdout)
    return times


def compare(other: Path, turns: int, rounds: int) -> list[str]:
    """The table's lines."""
    import numpy as np

    sys.path.append(str(HERE / "tests" / "support"))
    from gguf_files import random_blocks, write_gguf

    times: dict[Path, list[dict[str, float]]] = {other: [], HERE: []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf"
        blocks = random_blocks("Q4_K", (M, K), np.random.default_rng(0))
        write_gguf(path, {f"weight.{i}": ("Q4_K", (M, K), blocks) for i in range(TENSORS)})
        for turn in range(turns + 1):  # the first compiles
            for number, checkout in enumerate((other, HERE)):
                cache = Path(folder) / f"kernels{number}"
                cache.mkdir(exist_ok=True)
                made = process(checkout, path, rounds if turn else 1, cache)
                if turn:
                    times[checkout].append(made)
    lines = [f"{'us a call':58}   other    here  difference"]
    for what in times[HERE][0]:
        before, now = (min(made[what] for made in times[checkout]) for checkout in (other, HERE))
        lines.append(f"{what:58}{before:8.2f}{now:8.2f}{now - before:+12.2f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Times calls of another checkout and of this one, by turns.")
    parser.add_argument("other", type=Path, help="the root of another checkout of qmm")
    parser.add_argument("--turns", type=int, default=6, help="processes of each")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which the median is taken")
    parser.add_argument("--time", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    other = arguments.other.resolve()
    if arguments.time is not None:
        print(json.dumps(timed(arguments.time, arguments.rounds, other)))
    else:
        print(*compare(other, arguments.turns, arguments.rounds), sep="\n")


if __name__ == "__main__":
    main()
