"""Everything in this folder is marked `gpu`, and skipped, with the reason, where there is no CUDA device.

What tests of streams, captures and memory share is here too: a model and its engine, and the optional libraries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import random_blocks, write_gguf

import qmm

ALONE = ("test_out_of_memory.py", "test_waiting.py")
"""Files that fill the card, or measure how long calls take while it is busy."""


@cache
def cuda_device() -> tuple[str, str]:
    """Name the first device, as ("cuda_device", name), or say why there is none, as ("no_cuda_device", why)."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        return "no_cuda_device", f"cuda-python is not installed ({error})"
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # the bindings find no libcuda.so.1
        return "no_cuda_device", " ".join(str(error).split())
    if status != driver.CUresult.CUDA_SUCCESS:
        return "no_cuda_device", f"cuInit: {status.name}"
    _, count = driver.cuDeviceGetCount()
    if not count:
        return "no_cuda_device", "the driver sees none (CUDA_VISIBLE_DEVICES?)"
    attributes = driver.CUdevice_attribute
    _, device = driver.cuDeviceGet(0)
    _, name = driver.cuDeviceGetName(128, device)
    _, major = driver.cuDeviceGetAttribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    _, minor = driver.cuDeviceGetAttribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    _, version = driver.cuDriverGetVersion()
    label = name.split(b"\0")[0].decode()
    return "cuda_device", f"{label} (sm_{major}{minor}, CUDA {version // 1000}.{version % 1000 // 10})"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Called for the tests of this folder only."""
    note = cuda_device()
    item.add_marker(pytest.mark.gpu)
    item.user_properties.append(note)  # tests/conftest.py sums these up
    if note[0] == "no_cuda_device":
        item.add_marker(pytest.mark.skip(reason=f"no CUDA device: {note[1]}"))
    elif "PYTEST_XDIST_WORKER" in os.environ and Path(item.path).name in ALONE:
        item.add_marker(pytest.mark.skip(reason="needs the card for itself: run this file without -n"))


SHAPES = {
    "w": ("Q8_0", (8192, 4096)),  # whose products need workspace
    "s": ("Q8_0", (64, 256)),
    "emb": ("F32", (100, 1000)),  # shares its first page and its last one with its neighbours
    "next": ("Q8_0", (64, 256)),
    "last": ("Q8_0", (64, 1024)),
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_gguf(path, {name: (*of, random_blocks(*of, rng)) for name, of in SHAPES.items()})
    return path


@pytest.fixture(scope="module")
def engine(model_path: Path) -> Iterator[qmm.Engine]:
    with qmm.open(model_path) as model, qmm.Engine(model, "cuda", "device") as engine:
        yield engine


@pytest.fixture(scope="session")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def cupy() -> Any:
    return pytest.importorskip("cupy")
