"""The first contact with a file system: registering is tried in a child process, once, and the outcome remembered."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path

from qmm.cuda import call
from qmm.kernels.runtime.cache import cache_folder
from qmm.loaders.access.preflight import FileSystem, probe
from qmm.loaders.mapping import FileMapping
from qmm.memory.machine import GPUInfo

__all__ = ["first_contact"]

_known: set[str] = set()


def first_contact(mapping: FileMapping, gpu: GPUInfo) -> None:
    """Try registering a file in a child process, unless it worked before on the same file system, GPU and driver.

    That it worked is kept in a file beside the compiled kernels (``QMM_CACHE_DIR``), so that it costs a second once.

    Raises:
        RegistrationError: it does not return, or the child dies of it.
    """
    contact = {
        "file system": FileSystem.of(mapping.path)._asdict(),
        "gpu": gpu.name,
        "driver": call("cudaDriverGetVersion"),
        "kernel": platform.release(),
    }
    text = json.dumps(contact, sort_keys=True)
    folder = _folder()
    note = None if folder is None else folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if text in _known or (note is not None and note.exists()):
        return
    if not probe(mapping, gpu.number):
        return
    _known.add(text)
    if note is not None:
        with suppress(OSError):  # then it is tried again next time
            note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            note.write_text(text)


def _folder() -> Path | None:
    named = os.environ.get("QMM_CACHE_DIR")
    return None if named == "" else Path(named or cache_folder()) / "registering"
