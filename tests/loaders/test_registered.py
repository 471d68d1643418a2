"""What of registration needs no GPU: arguments, bounds, refusals. CUDA itself is in tests/gpu/test_registered.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qmm.errors import ClosedError, MappingError, RegistrationError
from qmm.loaders import FileMapping, HostRegistration
from qmm.loaders.access import chunks


def has_gpu() -> bool:
    try:
        from cuda.bindings import runtime
    except ImportError:
        return False
    error, count = runtime.cudaGetDeviceCount()
    return int(error) == 0 and count > 0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(bytes(10_000))
    return path


@pytest.mark.skipif(has_gpu(), reason="there is a GPU, which refuses nothing")
def test_refusal_names_file_bytes_call_number_and_a_way_out(file: Path) -> None:
    with FileMapping.open(file) as mapping:
        with pytest.raises(RegistrationError) as caught:
            HostRegistration.of(mapping, [(0, 100), (5000, 10)])
        message = str(caught.value)
        assert str(file) in message
        assert "8192 bytes cannot be registered on CUDA device 0" in message
        assert 'placement="device"' in message
        assert 'placement="host"' in message
        assert not chunks.registered.now
    assert str(file) not in Path("/proc/self/maps").read_text()  # no handle was left behind


def test_range_outside_the_file_is_refused_before_cuda_is_asked(file: Path) -> None:
    with FileMapping.open(file) as mapping, pytest.raises(MappingError, match=r"bytes 9999 to 10001.* has 10000"):
        HostRegistration.of(mapping, [(0, 1), (9999, 2)])


def test_closed_mapping_is_refused(file: Path) -> None:
    mapping = FileMapping.open(file)
    mapping.close()
    with pytest.raises(ClosedError):
        HostRegistration.of(mapping, [(0, 1)])


def test_changed_file_is_refused(file: Path) -> None:
    with FileMapping.open(file) as mapping:
        file.write_bytes(bytes(100))
        with pytest.raises(MappingError, match="changed since it was opened"):
            HostRegistration.of(mapping, [(0, 1)])


def test_no_other_mapping_can_be_registered(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FileMapping makes shared ones only; a private one would be copied page by page, or hang."""
    monkeypatch.setattr(chunks, "call", lambda *arguments: pytest.fail("CUDA was asked"))
    private = np.memmap(file, mode="c")
    for other in (private, private.base):
        with pytest.raises(AttributeError):
            HostRegistration.of(other, [(0, 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_nbytes", [0, -4096, 1000])
def test_chunks_must_be_pages(file: Path, chunk_nbytes: int) -> None:
    with FileMapping.open(file) as mapping, pytest.raises(ValueError, match="multiple of"):
        HostRegistration.of(mapping, [(0, 1)], chunk_nbytes=chunk_nbytes)


def test_importing_loaders_imports_neither_cuda_nor_numba_nor_gguf() -> None:
    code = "import sys, qmm.loaders; print([m for m in ('cuda', 'numba', 'gguf', 'qmm.kernels') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
