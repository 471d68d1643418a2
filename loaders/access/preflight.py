"""Registering a file in a child process first, which may hang or die without harm; once, and remembered.

On some systems a registration does not return (seen with private mappings on an H200 and driver 580, which qmm never
makes; a file system whose pages the driver cannot lock may do the same). A thread in such a call cannot be stopped, but
a child can be given up.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from qmm.children import ending, no_start, python
from qmm.cuda import call
from qmm.errors import QmmError, RegistrationError
from qmm.folders import cache_folder, named_cache_folder
from qmm.loaders.access.registered import WAY_OUT, HostRegistration
from qmm.loaders.mapping import FileMapping

__all__ = ["FileSystem", "first_contact", "probe"]

PROBE_NBYTES: Final = 16 << 20
"""The most bytes of the file that the child registers: so few were enough to hang."""
PROBE_SECONDS: Final = 30.0
"""How long the child may take. Its start with CUDA takes most of that: one second, or five on a slow machine."""
REFUSED: Final = 3
"""The exit status of a child whose registration was refused."""
MOUNTS: Final = Path("/proc/self/mountinfo")

_known: set[str] = set()
"""File systems, GPUs and drivers where it worked, as :func:`first_contact` describes them."""


class FileSystem(NamedTuple):
    """A file system: its type, such as ``"ext4"``, source, such as ``"/dev/sda1"``, and mount point."""

    type: str
    source: str
    mount_point: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileSystem:
        """Look a file up in /proc/self/mountinfo; all ``"unknown"`` where there is none."""
        found = cls("unknown", "unknown", "unknown")
        real = Path(os.path.realpath(path))
        if MOUNTS.exists():
            for line in MOUNTS.read_text(errors="replace").splitlines():
                mount, _, rest = line.partition(" - ")
                point = mount.split()[4].encode().decode("unicode_escape")  # a space is \\040
                longer = found.type == "unknown" or len(point) >= len(found.mount_point)  # the last one hides others
                if longer and real.is_relative_to(point):
                    kind, source, *_ = rest.split()
                    found = cls(kind, source, point)
        return found


def first_contact(mapping: FileMapping, device: int, gpu: str) -> None:
    """Try registering a file in a child process, unless it worked before on the same file system, GPU and driver.

    A success is noted in a file beside the compiled kernels (``QMM_CACHE_DIR``), so that it costs a second only once.

    Args:
        mapping: the file.
        device: CUDA's number of the GPU.
        gpu: its name.

    Raises:
        RegistrationError: it does not return, or the child dies of it.
    """
    contact = {
        "file system": FileSystem.of(mapping.path)._asdict(),
        "gpu": gpu,
        "driver": call("cudaDriverGetVersion"),
        "kernel": platform.release(),
    }
    text = json.dumps(contact, sort_keys=True)
    folder = _folder()
    note = None if folder is None else folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if text in _known or (note is not None and note.exists()) or not probe(mapping, device):
        return
    _known.add(text)
    if note is not None:
        with suppress(OSError):  # then it is tried again next time
            note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            note.write_text(text)


def _folder() -> Path | None:
    """The folder of the notes; None where none are kept."""
    named = named_cache_folder()
    if named is not None:
        return Path(named) / "registering" if named else None
    try:
        return cache_folder() / "registering"
    except RuntimeError:  # the user has no home directory
        return None


def probe(mapping: FileMapping, device: int = 0, seconds: float = PROBE_SECONDS) -> bool:
    """Register the beginning of a file in a child process, and unregister it.

    Args:
        mapping: the file. The child maps it by its descriptor: another file may have its name by now.
        device: CUDA's number of the device.
        seconds: how long it may take; then the child is killed.

    Returns:
        Whether it worked. Where it was refused, registering in this process says why.

    Raises:
        RegistrationError: it did not return, or the child died of it, or could not be started.
    """
    path, file = mapping.path, mapping.fileno()
    what = f"{path}: registering it on CUDA device {device} was tried in a child process"
    command = python(_child_source(file, device))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=(file,))
    except OSError as reason:
        raise RegistrationError(f"{what}, which {no_start(reason)} {WAY_OUT}") from reason
    try:
        _, failed = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        file_system = FileSystem.of(path)
        raise RegistrationError(
            f"{what}, which had not ended after {seconds:g} s. The driver may be unable to lock pages of this file "
            f"system ({file_system.type} at {file_system.mount_point}). Copy the file to another one. {WAY_OUT}"
        ) from None
    finally:
        _give_up(child)
    if child.returncode not in (0, REFUSED):
        said = " ".join(failed.split())[-1000:] or "no message"
        raise RegistrationError(f"{what}, which {ending(child.returncode)}: {said}. {WAY_OUT}")
    return child.returncode == 0


def _child_source(file: int, device: int) -> str:
    """What the child runs."""
    return f"from qmm.loaders.access import preflight; sys.exit(preflight.register({file}, {device}))"


def register(file: int, device: int) -> int:
    """Run in the child: register the beginning of an open file. Returns the exit status."""
    try:
        with FileMapping.open(f"/proc/self/fd/{file}") as mapping:
            HostRegistration.of(mapping, [(0, min(mapping.nbytes, PROBE_NBYTES))], device).close()
    except QmmError:
        return REFUSED
    return 0


def _give_up(child: subprocess.Popen[str]) -> None:
    """Kill the child if it still runs. In the middle of a driver's call it may not die, so the wait is short."""
    if child.poll() is None:
        child.kill()
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=1)
    if child.stderr is not None:
        child.stderr.close()
