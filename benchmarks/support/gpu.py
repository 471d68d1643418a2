"""What the benchmarks on a GPU share: whether there is one, and which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qmm.cuda import call
from qmm.errors import DeviceError
from qmm.memory.machine import gpu_info

__all__ = ["about", "missing"]


def missing() -> str | None:
    """Why there is no GPU to measure, or None."""
    try:
        gpu_info(0)
    except DeviceError as reason:
        return str(reason)
    return None


def about() -> dict[str, Any]:
    """The head of a results file: the GPU, and the CUDA version of its driver."""
    version = call("cudaDriverGetVersion")
    return {"gpu": gpu_info(0).name, "driver": driver(), "driver_cuda": f"{version // 1000}.{version % 1000 // 10}"}


def driver() -> str:
    """The driver's own version."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "unknown"
    return found[0] if found else "unknown"
