"""``qmm smoke``: the eight steps from a file's bytes to a kernel, each shown with its result and time.

The whole file is registered here, its first page too (an engine registers the pages of tensors only), so that step 7
can read the magic ``GGUF`` where the file begins.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from qmm.cli.report import SmokeReport, Step
from qmm.cuda import CudaCallError, call
from qmm.errors import MappingError, QmmError, RegistrationError
from qmm.loaders.access.preflight import first_contact
from qmm.loaders.access.registered import HostRegistration
from qmm.loaders.files import OpenFile
from qmm.loaders.gguf.index import GGUFIndex, read_model
from qmm.loaders.mapping import FileMapping
from qmm.memory.machine import GPUInfo, gpu_info, require_compiler
from qmm.model import Model
from qmm.verify.check import usable

__all__ = ["smoke"]

MAGIC = b"GGUF"
NOTHING = "No other way was tried: the file has no tensor that qmm can multiply by. See `qmm info {file}`."
ON_CPU = "On the CPU a product was tried, and worked: `qmm run {file} {tensor} --device cpu`."
NOT_ON_CPU = "On the CPU a product by {tensor} was tried too, and failed: {reason}"
COPY = "Not tried: `qmm run {file} {tensor} --placement device`, which copies the weights and needs no registering."


class _Smoke:
    """The state that the steps share. Each step returns its result as text, or raises."""

    def __init__(self, index: GGUFIndex, file: OpenFile, device: int) -> None:
        self.index = index
        self.file = file
        self.device = device
        self.cleanup = ExitStack()
        self.mapping: FileMapping
        self.mapped: str | None = None
        self.registration: HostRegistration
        self.gpu: Any = None
        self.gpu_info: GPUInfo
        self.address = 0

    def map(self) -> str:
        self.mapping = FileMapping.of(self.file)
        self.mapped = mapped_file(self.mapping.address)
        self.cleanup.callback(self.mapping.close)
        return f"{self.mapping.nbytes:,} bytes, read-only and shared, at 0x{self.mapping.address:x}"

    def initialise(self) -> str:
        info = self.gpu_info = gpu_info(self.device)
        require_compiler()
        from qmm.device import Device

        self.gpu = self.cleanup.enter_context(Device(self.device))
        capability = ".".join(map(str, info.capability))
        reads = "can" if info.maps_read_only else "cannot"
        return f"{info.name}, compute capability {capability}, {reads} register read-only memory"

    def register(self) -> str:
        first_contact(self.mapping, self.device, self.gpu_info.name)
        before = anonymous_nbytes()
        self.registration = HostRegistration.of(self.mapping, [(0, self.mapping.nbytes)], self.device)
        self.cleanup.callback(self.registration.close)
        after = anonymous_nbytes()
        grown = "an unknown number of" if before is None or after is None else f"{after - before:,}"
        return f"{self.registration.nbytes_registered:,} bytes of pages; anonymous memory grew by {grown} bytes"

    def locate(self) -> str:
        self.address = self.registration.address(0, self.mapping.nbytes)
        return f"the device reads the file at 0x{self.address:x}"

    def compare(self) -> str:
        host = self.registration.host_address(0)
        if host == self.address:
            return "yes: one address for both"
        return f"no: the host has it at 0x{host:x}, so only the device's address may go to a kernel"

    def size(self) -> str:
        on_disk = os.fstat(self.file.fileno()).st_size
        if on_disk != self.mapping.nbytes:
            raise MappingError(f"the mapping has {self.mapping.nbytes} bytes, the file {on_disk}")
        end = max((t.offset + t.nbytes for t in self.index.tensors.values() if t.path == self.index.path), default=0)
        return f"{on_disk:,} bytes, as on disk; the last tensor ends at byte {end:,}"

    def read(self) -> str:
        from qmm.direct import read_bytes

        found = read_bytes(self.gpu, self.address, len(MAGIC), self.gpu.stream)
        if found != MAGIC:
            raise RegistrationError(f"a kernel read {found!r} at 0x{self.address:x}, where the file has {MAGIC!r}")
        return f"a kernel read {found!r} at 0x{self.address:x}"

    def free(self) -> str:
        host = self.mapping.address
        self.registration.close()
        try:
            attributes = call("cudaPointerGetAttributes", host)
        except CudaCallError as reason:
            raise RegistrationError(f"asking what is left at 0x{host:x}: {reason}") from reason
        if int(attributes.type) != 0:  # cudaMemoryTypeUnregistered
            raise RegistrationError(f"0x{host:x} still belongs to CUDA, as memory of type {attributes.type.name}")
        with HostRegistration.of(self.mapping, [(0, self.mapping.nbytes)], self.device):
            pass  # this would be refused if a registration were left
        self.mapping.close()
        if self.mapped is not None and self.mapped in map(file_of, mapped_lines()):
            raise MappingError("the file is still mapped")
        return "unregistered, registered once more and unregistered, unmapped"


def anonymous_nbytes() -> int | None:
    """Anonymous memory of this process (RssAnon); None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"(?m)^RssAnon:\s*(\d+) kB$", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def mapped_lines() -> list[str]:
    """What is mapped into this process, as proc(5) has it; nothing where the system does not say."""
    maps = Path("/proc/self/maps")
    return maps.read_text(errors="replace").splitlines() if maps.exists() else []


def file_of(line: str) -> str:
    """Device and inode of a line's file: its name may be another one by now."""
    return " ".join(line.split()[3:5])


def mapped_file(address: int) -> str | None:
    """Device and inode of the file that is mapped at an address; None where the system does not say."""
    return next((file_of(line) for line in mapped_lines() if line.startswith(f"{address:08x}-")), None)


def other_ways(index: GGUFIndex, path: Path, registering_failed: bool) -> str:
    """What works without the steps that failed; a product on the CPU is tried, with the smallest tensor."""
    file = shlex.quote(str(path))
    with Model(index) as model:
        tensor = min(usable(model), key=lambda tensor: tensor.nbytes, default=None)
        if tensor is None:
            return NOTHING.format(file=file)
        found = {"file": file, "tensor": shlex.quote(tensor.name)}
        try:
            from qmm.engine import Engine

            with Engine(model, "cpu", tensors=tensor.name) as engine:
                engine.matmul(tensor, np.ones((1, tensor.k), np.float32))
        except Exception as reason:  # any error, also of a compiler or the lack of one, is the finding
            said = [NOT_ON_CPU.format(**found, reason=" ".join(f"{type(reason).__name__}: {reason}".split())[:500])]
        else:
            said = [ON_CPU.format(**found)]
    if registering_failed:
        said.append(COPY.format(**found))
    return " ".join(said)


def smoke(path: Path, device: int = 0) -> SmokeReport:
    """Walk the eight steps; after a failed step, the steps that depend on it are not reached.

    The last one wants to see the file unmapped, so nothing else in the process may have it open.

    Raises:
        GGUFError: ``path`` is not a GGUF file that can be used.
    """
    index, files = read_model(path)
    walk = _Smoke(index, next(file for file in files if file.path == index.path), device)
    steps: list[tuple[str, Callable[[], str]]] = [
        ("map", walk.map),
        ("initialise", walk.initialise),
        ("register", walk.register),
        ("address", walk.locate),
        ("host == device?", walk.compare),
        ("size", walk.size),
        ("read by a kernel", walk.read),
        ("freed", walk.free),
    ]
    shown: list[Step] = []
    failed = False
    for number, (name, action) in enumerate(steps, 1):
        if failed and (name != "size" or not shown[0].ok):  # size needs the mapping alone
            shown.append(Step(number, name, None, "not reached", None))
            continue
        started = time.perf_counter()
        try:
            result = action()
        except QmmError as reason:
            failed, right, result = True, False, str(reason)
        else:
            right = True
        shown.append(Step(number, name, right, result, (time.perf_counter() - started) * 1e3))
    with suppress(QmmError) if failed else nullcontext():  # the failed step has reported the reason
        walk.cleanup.close()
    advice = other_ways(index, path, registering_failed=shown[1].ok is True) if failed else None
    return SmokeReport(file=str(path), steps=tuple(shown), advice=advice)
