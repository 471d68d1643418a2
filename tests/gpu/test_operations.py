"""What each operation means in Python beside what a GPU makes of it: the same kernel, on the same bytes, on both.

That every operation is among the cases, ``tests/kernels/test_operations.py`` shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from operation_cases import CASES, Case

from qmm.device import GPU
from qmm.kernels.runtime.launch import Launch


@pytest.fixture(scope="module")
def gpu() -> Iterator[GPU]:
    gpu = GPU(0)
    yield gpu
    gpu.drain()
    gpu.close()


def on_gpu(gpu: GPU, case: Case) -> np.ndarray:
    """What the GPU makes of a case: the bytes at its target."""
    addresses = []
    with ExitStack() as stack:
        for content in (case.source, case.before()):
            addresses.append(gpu.allocate(content.nbytes, "a test"))
            stack.callback(gpu.free, addresses[-1])
            gpu.copy(addresses[-1], content.ctypes.data, content.nbytes, gpu.stream)
            gpu.synchronize(gpu.stream)
        early = case.launches > 1
        launch = Launch(case.on_gpu(), gpu.device, case.blocks, addresses, case.shared_nbytes, early)
        for _ in range(case.launches):
            launch.queue(gpu.stream)
        made = np.empty_like(case.before())
        gpu.copy(made.ctypes.data, addresses[1], made.nbytes, gpu.stream)
        gpu.synchronize(gpu.stream)
    return made


@pytest.mark.parametrize("name", CASES)
def test_the_gpu_makes_what_the_emulator_makes(name: str, gpu: GPU) -> None:
    case = CASES[name]
    if case.hopper and not gpu.machine.bulk:
        pytest.skip("below compute capability 9.0 there are no bulk copies, and no kernel starts before the last ends")
    case.compare(case, on_gpu(gpu, case), case.emulated())
