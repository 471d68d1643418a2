"""GPUs, what they can do with host memory, and the placement that follows."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import SupportsIndex

from qmm import extras
from qmm.cuda import CudaCallError, attribute, call, current_device
from qmm.errors import DeviceError
from qmm.loaders.access.registered import REQUIRED_ATTRIBUTES

__all__ = ["PLACEMENTS", "Choice", "GPUInfo", "choose", "gpu_info"]

PLACEMENTS = ("auto", "mapped", "device", "host")
MINIMUM_CAPABILITY = (8, 0)
ROOM = 0.9
"""The part of the GPU's free memory that a copy of the weights may take under ``auto``; the rest is the user's."""


@dataclass(frozen=True)
class GPUInfo:
    """One GPU.

    Attributes:
        number: CUDA's number of it.
        name: as the driver gives it.
        capability: compute capability.
        integrated: whether it has no memory but the host's.
        maps_read_only: whether it can register read-only mappings, which the placement ``mapped`` needs.
        free_nbytes: memory that is free now.
        total_nbytes: memory altogether.
    """

    number: int
    name: str
    capability: tuple[int, int]
    integrated: bool
    maps_read_only: bool
    free_nbytes: int
    total_nbytes: int


@dataclass(frozen=True)
class Choice:
    """Where an engine works (``gpu`` None: the CPU), where the weights lie, and why, in one sentence."""

    gpu: GPUInfo | None
    placement: str
    why: str


def gpu_info(number: int) -> GPUInfo:
    """Describe a GPU.

    Raises:
        DeviceError: there is no such GPU, or no driver, or cuda-python is not installed.
    """
    try:
        count = call("cudaGetDeviceCount")
        if not 0 <= number < count:
            raise DeviceError(f"there is no CUDA device {number}: the driver sees {count}, numbered from 0")
        with current_device(number):
            properties = call("cudaGetDeviceProperties", number)
            free_nbytes, total_nbytes = call("cudaMemGetInfo")
            read_only = all(attribute(name, number) for name in REQUIRED_ATTRIBUTES)
    except (CudaCallError, RuntimeError) as reason:  # the bindings raise RuntimeError where there is no driver
        raise DeviceError(f"CUDA cannot be used: {' '.join(str(reason).split())}") from reason
    return GPUInfo(
        number=number,
        name=properties.name.rstrip(b"\0").decode(),
        capability=(properties.major, properties.minor),
        integrated=bool(properties.integrated),
        maps_read_only=read_only,
        free_nbytes=free_nbytes,
        total_nbytes=total_nbytes,
    )


def choose(device: str | SupportsIndex, placement: str, nbytes: int) -> Choice:
    """Where to work, and where to keep ``nbytes`` of weights.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or N.
        placement: one of PLACEMENTS.
        nbytes: of the tensors that will be used.

    Raises:
        DeviceError: the two contradict each other, or the requested GPU cannot be used.
    """
    if placement not in PLACEMENTS:
        raise DeviceError(f"there is no placement {placement!r}; choose one of {', '.join(PLACEMENTS)}")
    number = _number(device)
    if number is None:
        if placement in ("mapped", "device"):
            raise DeviceError(
                f"placement={placement!r} is for a GPU, but device is {device!r}. Leave one of them to auto, or use "
                'placement="host".'
            )
        return Choice(None, "host", "on the CPU, off the mapped file, because device is 'cpu'")
    if placement == "host":
        if device != "auto":
            raise DeviceError(f'placement="host" is for the CPU, but device is {device!r}. Leave one of them to auto.')
        return Choice(None, "host", "on the CPU, off the mapped file, because placement is 'host'")
    try:
        gpu = gpu_info(number)
        if gpu.capability < MINIMUM_CAPABILITY:
            raise DeviceError(
                f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}; the kernels copy "
                f"asynchronously and need {MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]}"
            )
        require_compiler()
    except DeviceError as reason:
        if device == "auto" and placement == "auto":
            return Choice(None, "host", f"on the CPU, off the mapped file, because {reason}")
        raise DeviceError(f'{reason}. device="cpu" works without a GPU.') from reason
    if placement != "auto":
        return Choice(gpu, placement, f"on {gpu.name}, because placement is {placement!r}")
    return _placed(gpu, nbytes)


def _placed(gpu: GPUInfo, nbytes: int) -> Choice:
    """The placement that ``auto`` stands for on a GPU."""
    gigabytes, free = nbytes / 1e9, gpu.free_nbytes / 1e9
    if gpu.integrated and gpu.maps_read_only:
        return Choice(
            gpu, "mapped", f"on {gpu.name}, mapped, because it shares the host's memory: a copy would be waste"
        )
    if nbytes <= ROOM * gpu.free_nbytes:
        why = f"on {gpu.name}, copied to it, because {gigabytes:.2f} GB of weights fit its {free:.2f} GB free"
        return Choice(gpu, "device", why + " and its own memory is faster than the link")
    if gpu.maps_read_only:
        why = f"on {gpu.name}, mapped, because {gigabytes:.2f} GB of weights do not fit its {free:.2f} GB free"
        return Choice(gpu, "mapped", why)
    why = (
        f"on the CPU, off the mapped file, because {gpu.name} has {free:.2f} GB free for {gigabytes:.2f} GB of weights"
    )
    return Choice(None, "host", why + " and cannot register read-only memory")


def _number(device: str | SupportsIndex) -> int | None:
    """CUDA's number of the named device; None for the CPU.

    Raises:
        DeviceError: ``device`` names none.
    """
    if not isinstance(device, str | bool) and hasattr(device, "__index__"):
        return operator.index(device)
    if device == "cpu":
        return None
    if device in ("auto", "cuda"):
        return 0
    name, _, number = str(device).partition(":")
    if name == "cuda" and number.isdecimal():
        return int(number)
    raise DeviceError(f"there is no device {device!r}; say 'auto', 'cpu', 'cuda', 'cuda:1' or a number")


def require_compiler() -> None:
    """Raise DeviceError unless numba-cuda is installed."""
    from importlib.util import find_spec

    if find_spec("numba_cuda") is None:
        raise DeviceError(f"numba-cuda is not installed; {extras.for_gpu()}")
