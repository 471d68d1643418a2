"""Everything in this folder is marked `gpu`, and skipped, with the reason, where there is no CUDA device."""

from __future__ import annotations

from functools import cache

import pytest


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
