"""Registration with the real driver: what it hands out, shares, refuses and gives back."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmm.cli.smoke import anonymous_nbytes
from qmm.errors import ClosedError, MappingError, RegistrationError
from qmm.loaders import FileMapping, HostRegistration
from qmm.loaders.access import chunks

PAGE = mmap.PAGESIZE
FLAGS = 0x01 | 0x02 | 0x08  # cudaHostRegisterPortable, Mapped, ReadOnly


@pytest.fixture(scope="module")
def runtime() -> Any:
    from cuda.bindings import runtime

    return runtime


@pytest.fixture(scope="module")
def contents() -> bytes:
    return np.random.default_rng(0).bytes(64 * PAGE + 100)  # ends inside a page, as files do


@pytest.fixture
def mapping(tmp_path: Path, contents: bytes) -> Iterator[FileMapping]:
    path = tmp_path / "weights.gguf"
    path.write_bytes(contents)
    with FileMapping.open(path) as mapping:
        yield mapping
    assert not chunks.registered.now, "a registration was left open"


def read_back(runtime: Any, address: int, nbytes: int) -> bytes:
    """Copy from a device address of registered memory into fresh host memory."""
    out = np.empty(nbytes, dtype=np.uint8)
    (error,) = runtime.cudaMemcpy(out.ctypes.data, address, nbytes, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost)
    assert error == 0
    return out.tobytes()


def is_registered(runtime: Any, address: int) -> bool:
    error, attributes = runtime.cudaPointerGetAttributes(address)
    assert error == 0
    return bool(attributes.type == runtime.cudaMemoryType.cudaMemoryTypeHost)


def last_error(runtime: Any) -> int:
    (error,) = runtime.cudaGetLastError()
    return int(error)


def test_device_address_reads_the_bytes_of_the_file(runtime: Any, mapping: FileMapping, contents: bytes) -> None:
    with HostRegistration.of(mapping, [(100, 5 * PAGE)]) as registered:
        assert registered.nbytes_registered == 6 * PAGE
        for offset, nbytes in [(100, 5 * PAGE), (PAGE - 1, 2), (100, 1), (5 * PAGE + 99, 1)]:
            assert read_back(runtime, registered.address(offset, nbytes), nbytes) == contents[offset : offset + nbytes]
        error, pointer = runtime.cudaHostGetDevicePointer(mapping.address, 0)
        assert error == 0
        assert registered.address(100, 1) == int(pointer) + 100
        assert registered.host_address(100) == mapping.address + 100


def test_last_byte_of_a_file_that_ends_inside_a_page(runtime: Any, mapping: FileMapping, contents: bytes) -> None:
    with HostRegistration.of(mapping, [(mapping.nbytes - 10, 10)]) as registered:
        assert registered.nbytes_registered == PAGE
        assert read_back(runtime, registered.address(mapping.nbytes - 10, 10), 10) == contents[-10:]


def test_only_the_pages_of_the_ranges_are_registered(runtime: Any, mapping: FileMapping) -> None:
    with HostRegistration.of(mapping, [(10 * PAGE, 1), (20 * PAGE + 5, PAGE)]) as registered:
        assert registered.nbytes_registered == 3 * PAGE
        pages = [page for page in range(65) if is_registered(runtime, mapping.address + page * PAGE)]
        assert pages == [10, 20, 21]
        with pytest.raises(RegistrationError, match=f"{11 * PAGE} to {12 * PAGE} are not registered"):
            registered.address(10 * PAGE, 2 * PAGE)
        with pytest.raises(RegistrationError, match="are not registered"):
            registered.address(30 * PAGE, 1)
    assert not any(is_registered(runtime, mapping.address + page * PAGE) for page in range(65))


def test_chunks_are_cut_and_read_as_one(runtime: Any, mapping: FileMapping, contents: bytes) -> None:
    with HostRegistration.of(mapping, [(0, 10 * PAGE)], chunk_nbytes=4 * PAGE) as registered:
        assert [chunk.span.nbytes // PAGE for chunk in registered._chunks] == [4, 4, 2]
        if (
            len({chunk.device_address - chunk.span.start for chunk in registered._chunks}) > 1
        ):  # this driver may do that
            with pytest.raises(RegistrationError, match="do not follow each other"):
                registered.address(3 * PAGE + 7, 6 * PAGE)
            return
        address = registered.address(3 * PAGE + 7, 6 * PAGE)
        for part in range(3 * PAGE + 7, 9 * PAGE, PAGE):  # one copy must not span registrations
            nbytes = PAGE - part % PAGE
            start = address - (3 * PAGE + 7) + part
            assert read_back(runtime, start, nbytes) == contents[part : part + nbytes]


def test_two_registrations_share_pages_and_the_last_unregisters(
    runtime: Any, mapping: FileMapping, contents: bytes
) -> None:
    first = HostRegistration.of(mapping, [(0, 4 * PAGE)])
    second = HostRegistration.of(mapping, [(2 * PAGE, 6 * PAGE)])  # two pages shared, four new
    assert first.nbytes_registered == 4 * PAGE
    assert second.nbytes_registered == 8 * PAGE
    assert first.address(2 * PAGE, 1) == second.address(2 * PAGE, 1)
    first.close()
    first.close()
    assert read_back(runtime, second.address(2 * PAGE, 9), 9) == contents[2 * PAGE : 2 * PAGE + 9]
    assert is_registered(runtime, mapping.address)
    second.close()
    assert not is_registered(runtime, mapping.address)
    assert not is_registered(runtime, mapping.address + 4 * PAGE)


def test_threads_that_register_the_same_pages(runtime: Any, mapping: FileMapping, contents: bytes) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for offset in np.random.default_rng(seed).integers(0, 50 * PAGE, 20).tolist():
                with HostRegistration.of(mapping, [(offset, 3 * PAGE)]) as registered:
                    address = registered.address(offset, 3 * PAGE)
                    assert read_back(runtime, address, 1) == contents[offset : offset + 1]
        except BaseException as error:  # reported below, in the thread that pytest watches
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_pages_stay_mapped_until_they_are_unregistered(runtime: Any, tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(contents)
    mapping = FileMapping.open(path)
    registered = HostRegistration.of(mapping, [(0, PAGE)])
    mapping.close()
    assert str(path) in Path("/proc/self/maps").read_text()
    assert read_back(runtime, registered.address(0, PAGE), PAGE) == contents[:PAGE]
    registered.close()
    assert str(path) not in Path("/proc/self/maps").read_text()
    with pytest.raises(ClosedError):
        registered.address(0, 1)
    with pytest.raises(ClosedError):
        registered.host_address(0)
    assert registered.nbytes_registered == 0


def test_refused_call_is_named_cleared_and_rolled_back(runtime: Any, mapping: FileMapping, contents: bytes) -> None:
    foreign = mapping.address + 6 * PAGE
    assert runtime.cudaHostRegister(foreign, PAGE, FLAGS) == (0,)  # somebody else's, unknown to the table
    try:
        with pytest.raises(RegistrationError) as caught:
            HostRegistration.of(mapping, [(0, 10 * PAGE)], chunk_nbytes=2 * PAGE)
        assert last_error(runtime) == 0
        message = str(caught.value)
        assert f"{mapping.path}: {10 * PAGE} bytes cannot be registered on CUDA device 0" in message
        assert "cudaHostRegister returned cudaErrorHostMemoryAlreadyRegistered (712)" in message
        assert 'placement="device"' in message
        assert 'placement="host"' in message
        assert not is_registered(runtime, mapping.address), "chunks before the refused one stayed registered"
        assert not chunks.registered.now
    finally:
        assert runtime.cudaHostUnregister(foreign) == (0,)
    with HostRegistration.of(mapping, [(0, 10 * PAGE)], chunk_nbytes=2 * PAGE) as registered:
        assert read_back(runtime, registered.address(0, PAGE), PAGE) == contents[:PAGE]


def test_refusal_leaves_an_earlier_registration_alone(runtime: Any, mapping: FileMapping, contents: bytes) -> None:
    foreign = mapping.address + 6 * PAGE
    with HostRegistration.of(mapping, [(0, 2 * PAGE)]) as earlier:
        assert runtime.cudaHostRegister(foreign, PAGE, FLAGS) == (0,)
        try:
            with pytest.raises(RegistrationError):
                HostRegistration.of(mapping, [(0, 10 * PAGE)], chunk_nbytes=2 * PAGE)
        finally:
            assert runtime.cudaHostUnregister(foreign) == (0,)
        assert read_back(runtime, earlier.address(0, PAGE), PAGE) == contents[:PAGE]
        assert not is_registered(runtime, mapping.address + 2 * PAGE)


def test_absent_device_is_refused(runtime: Any, mapping: FileMapping) -> None:
    with pytest.raises(RegistrationError, match=r"device 4096: .*cudaErrorInvalidDevice \(101\)"):
        HostRegistration.of(mapping, [(0, 1)], device=4096)
    assert last_error(runtime) == 0


def test_current_device_is_what_it_was(runtime: Any, mapping: FileMapping) -> None:
    before = runtime.cudaGetDevice()
    count = runtime.cudaGetDeviceCount()[1]
    with HostRegistration.of(mapping, [(0, 1)], device=count - 1):
        assert runtime.cudaGetDevice() == before
    assert runtime.cudaGetDevice() == before


def test_a_registration_whose_mapping_was_finalized_first_still_unregisters(runtime: Any, mapping: FileMapping) -> None:
    """The collector finalizes what it finds in a cycle in any order."""
    registered = HostRegistration.of(mapping, [(0, PAGE)])
    registered._mapping.close()
    assert is_registered(runtime, mapping.address)
    registered.close()
    assert not is_registered(runtime, mapping.address)
    assert not chunks.registered.now


def test_nothing_to_register(mapping: FileMapping) -> None:
    with HostRegistration.of(mapping, []) as registered:
        assert registered.nbytes_registered == 0
        with pytest.raises(RegistrationError, match="are not registered"):
            registered.address(0, 1)


def test_addresses_outside_the_file_are_refused(mapping: FileMapping) -> None:
    with HostRegistration.of(mapping, [(0, mapping.nbytes)]) as registered:
        with pytest.raises(MappingError):
            registered.address(mapping.nbytes - 1, 2)  # in the last page, but behind the file's last byte
        with pytest.raises(MappingError):
            registered.host_address(mapping.nbytes)


def test_registering_takes_no_anonymous_memory(tmp_path: Path) -> None:
    """A private mapping would be copied page by page. Allowed is 1% of the bytes registered."""
    nbytes = 256 << 20
    path = tmp_path / "big.gguf"
    path.write_bytes(os.urandom(1 << 20) * 256)

    with FileMapping.open(path) as mapping:
        with HostRegistration.of(mapping, [(0, PAGE)]):  # whatever CUDA takes for itself, it has now
            before = anonymous_nbytes()
            with HostRegistration.of(mapping, [(0, nbytes)]) as registered:
                assert registered.nbytes_registered == nbytes
                assert anonymous_nbytes() - before < nbytes // 100
        lines = Path("/proc/self/maps").read_text().splitlines()
        assert [line.split()[1] for line in lines if line.endswith(str(path))] == ["r--s"]


def test_a_process_that_never_closes_ends_well(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(contents)
    code = f"""
import atexit
from qmm.loaders import FileMapping, HostRegistration
from cuda.bindings import runtime
kept = HostRegistration.of(FileMapping.open({str(path)!r}), [(0, 1)])
late = HostRegistration.of(FileMapping.open({str(path)!r}), [(8192, 1)])
class Late:
    def __del__(self): late.close()  # runs while modules are torn down
late_closer = Late()
atexit.register(lambda: print("exit", int(runtime.cudaDeviceReset()[0])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "exit 0\n", "")
