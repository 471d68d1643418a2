"""Which device and placement are chosen, without any GPU: what the GPU says is made up here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from qmm.errors import DeviceError
from qmm.loaders.access.registered import REQUIRED_ATTRIBUTES
from qmm.memory import machine as platform
from qmm.memory.machine import GPUInfo, choose, gpu_info

GB = 10**9


def gpu(
    number: int = 0,
    capability: tuple[int, int] = (9, 0),
    integrated: bool = False,
    maps_read_only: bool = True,
    free: int = 10 * GB,
) -> GPUInfo:
    return GPUInfo(number, "Test GPU", capability, integrated, maps_read_only, free, 2 * free)


Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Give the machine a GPU of the properties that are passed, and a compiler for it."""

    def set_up(**properties: object) -> None:
        monkeypatch.setattr(platform, "gpu_info", lambda number: gpu(number=number, **properties))  # type: ignore[arg-type]
        monkeypatch.setattr(platform, "require_compiler", lambda: None)

    return set_up


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> GPUInfo:
        raise DeviceError("CUDA cannot be used: no driver")

    monkeypatch.setattr(platform, "gpu_info", refuse)


def test_weights_that_fit_are_copied(pretend: Pretend) -> None:
    pretend()
    choice = choose("auto", "auto", 5 * GB)
    assert choice.gpu is not None
    assert choice.placement == "device"
    assert "5.00 GB of weights fit its 10.00 GB free" in choice.why


def test_weights_that_fill_nine_tenths_are_copied_and_a_byte_more_is_mapped(pretend: Pretend) -> None:
    pretend()
    assert choose("auto", "auto", 9 * GB).placement == "device"
    choice = choose("auto", "auto", 9 * GB + 1)
    assert choice.placement == "mapped"
    assert "do not fit" in choice.why


def test_a_gpu_that_shares_the_hosts_memory_maps_even_what_fits(pretend: Pretend) -> None:
    pretend(integrated=True)
    assert choose("auto", "auto", 1).placement == "mapped"
    pretend(integrated=True, maps_read_only=False)
    assert choose("auto", "auto", 1).placement == "device"


def test_too_large_for_a_gpu_that_cannot_map_is_for_the_cpu(pretend: Pretend) -> None:
    pretend(maps_read_only=False)
    choice = choose("auto", "auto", 20 * GB)
    assert choice.gpu is None
    assert choice.placement == "host"
    assert "cannot register read-only memory" in choice.why


@pytest.mark.parametrize("placement", ["mapped", "device"])
def test_a_placement_asked_for_is_taken(pretend: Pretend, placement: str) -> None:
    pretend()
    assert choose("auto", placement, 100 * GB).placement == placement
    assert choose("cuda", placement, 100 * GB).placement == placement


@pytest.mark.parametrize(("device", "number"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:3", 3), (2, 2)])
def test_devices_have_numbers(pretend: Pretend, device: str | int, number: int) -> None:
    pretend()
    chosen = choose(device, "auto", 1).gpu
    assert chosen is not None
    assert chosen.number == number


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "3", "", True])
def test_other_devices_are_refused_with_those_that_there_are(device: str) -> None:
    with pytest.raises(DeviceError, match="'auto', 'cpu', 'cuda'"):
        choose(device, "auto", 1)


def test_an_unknown_placement_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(DeviceError, match="auto, mapped, device, host"):
        choose("auto", "vram", 1)


def test_the_cpu_is_taken_when_it_is_asked_for(pretend: Pretend) -> None:
    pretend()
    for device, placement in [("cpu", "auto"), ("cpu", "host"), ("auto", "host")]:
        choice = choose(device, placement, 1)
        assert (choice.gpu, choice.placement) == (None, "host")
        assert choice.why.startswith("on the CPU")


@pytest.mark.parametrize(("device", "placement"), [("cpu", "mapped"), ("cpu", "device"), ("cuda", "host"), (0, "host")])
def test_device_and_placement_that_contradict_each_other_are_refused(device: str | int, placement: str) -> None:
    with pytest.raises(DeviceError, match=r"Leave one of them to auto"):
        choose(device, placement, 1)


@pytest.mark.usefixtures("no_gpu")
def test_auto_falls_back_to_the_cpu_and_says_why() -> None:
    choice = choose("auto", "auto", 1)
    assert (choice.gpu, choice.placement) == (None, "host")
    assert choice.why == "on the CPU, off the mapped file, because CUDA cannot be used: no driver"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("device", "placement"), [("cuda", "auto"), ("auto", "mapped"), ("auto", "device"), (0, "auto")]
)
def test_a_gpu_that_was_asked_for_is_not_replaced(device: str | int, placement: str) -> None:
    with pytest.raises(DeviceError, match=r'no driver.*device="cpu"'):
        choose(device, placement, 1)


def test_a_gpu_older_than_the_kernels_is_not_used(pretend: Pretend) -> None:
    pretend(capability=(7, 5))
    assert "7.5" in choose("auto", "auto", 1).why
    with pytest.raises(DeviceError, match=r"7\.5.*8\.0"):
        choose("cuda", "auto", 1)
    pretend(capability=(8, 0))
    assert choose("cuda", "auto", 1).gpu is not None


def test_without_numba_cuda_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "gpu_info", lambda number: gpu())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'numba-cuda[cu13]" in choose("auto", "auto", 1).why
    with pytest.raises(DeviceError, match=r"numba-cuda\[cu13\].*numba-cuda\[cu12\]"):
        choose("cuda", "auto", 1)


@pytest.mark.parametrize("missing", [None, *REQUIRED_ATTRIBUTES])
def test_a_gpu_maps_read_only_if_it_has_every_attribute_that_registering_needs(
    monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    answers = {
        "cudaGetDeviceCount": 1,
        "cudaGetDeviceProperties": SimpleNamespace(name=b"Test GPU\0\0", major=9, minor=0, integrated=0),
        "cudaMemGetInfo": (3 * GB, 4 * GB),
    }
    monkeypatch.setattr(platform, "call", lambda function, *arguments: answers[function])
    monkeypatch.setattr(platform, "current_device", lambda number: nullcontext())
    monkeypatch.setattr(platform, "attribute", lambda name, number: int(name != missing))
    assert gpu_info(0) == GPUInfo(0, "Test GPU", (9, 0), False, missing is None, 3 * GB, 4 * GB)
