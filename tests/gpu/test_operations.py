"""What each operation means in Python beside what a GPU makes of it: the same kernel, on the same bytes, on both.

That every operation is among the cases, ``tests/kernels/test_operations.py`` shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from operation_cases import CASES, Case

from qmm.device import Device
from qmm.kernels.runtime.launch import Launch


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with closing(Device(0)) as device:
        yield device


def on_gpu(device: Device, case: Case) -> np.ndarray:
    """What the GPU makes of a case: the bytes at its target."""
    arguments = {}
    with ExitStack() as stack:
        for name, content in (("source", case.source), ("target", case.before())):
            address = arguments[name] = stack.enter_context(device.temporary_buffer(content.nbytes, "a test"))
            device.copy(address, content.ctypes.data, content.nbytes, device.stream)
            device.synchronize(device.stream)
        with device.current("a test"):
            launch = Launch(case.kernel, 0, case.ctas, arguments, case.shared_nbytes, early=case.launches > 1)
            for _ in range(case.launches):
                launch.queue(device.stream)
        made = np.empty_like(case.before())
        device.copy(made.ctypes.data, arguments["target"], made.nbytes, device.stream)
        device.synchronize(device.stream)
    return made


@pytest.mark.parametrize("name", CASES)
def test_the_gpu_makes_what_the_emulator_makes(name: str, device: Device) -> None:
    case = CASES[name]
    if case.hopper and not device.architecture.bulk:
        pytest.skip("below compute capability 9.0 there are no bulk copies, and no kernel starts before the last ends")
    case.compare(case, on_gpu(device, case), case.emulated())
