"""Guards on a GPU: memory that faults right before a tensor's first byte and right behind its last."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from children import run_python
from gguf_files import FORMATS as SIZES
from gguf_files import random_blocks, write_gguf

import qmm
from qmm.cuda import call
from qmm.kernels.formats import FORMATS
from qmm.verify.guards import DeviceGuard, Guard, HostGuard
from qmm.verify.paranoid import Job, check_guarded

PAGE = mmap.PAGESIZE
PLACEMENTS = ("mapped", "device")

TOUCH = """
from qmm.direct import read_bytes
from qmm.errors import DeviceError
from qmm.device import Device
from qmm.verify.guards import DeviceGuard, HostGuard

kind, at = sys.argv[1:]
gpu = Device(0)
guard = HostGuard(5000, 0) if kind == "mapped" else DeviceGuard(5000, 0)
guard.fill(0, guard.nbytes, 7)
start, nbytes = {"all": (0, guard.nbytes), "below": (-1, 1), "behind": (guard.nbytes, 1)}[at]
try:
    print(set(read_bytes(gpu, guard.address + start, nbytes, gpu.stream)), flush=True)
except DeviceError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("at", ["below", "all", "behind"])
def test_a_kernel_that_reads_one_byte_on_either_side_faults(kind: str, at: str) -> None:
    """What all tests below rest on."""
    done = run_python(TOUCH, kind, at)
    if at == "all":
        assert done.stdout == "{7}\n", done.stderr
    else:
        assert "cudaErrorIllegalAddress (700)" in done.stdout, done.stderr


@pytest.mark.parametrize("make", [lambda: DeviceGuard(5000, 0), lambda: HostGuard(5000, 0)], ids=["device", "mapped"])
def test_bytes_come_back_and_closing_gives_the_memory_back(make) -> None:
    make().close()
    free_nbytes, _ = call("cudaMemGetInfo")
    for _ in range(20):
        guard: Guard = make()
        guard.fill(0, guard.nbytes, 9)
        guard.put(guard.nbytes - 8, np.array([1.5, -2.0], np.float32))
        assert guard.get(guard.nbytes - 8, 8).view(np.float32).tolist() == [1.5, -2.0]
        assert set(guard.get(0, guard.nbytes - 8)) == {9}
        guard.close()
        guard.close()
    if "PYTEST_XDIST_WORKER" not in os.environ:  # otherwise other processes take and give memory too
        assert call("cudaMemGetInfo")[0] >= free_nbytes


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format, each tensor from the beginning of a page to the end of one, the last one's the file's."""
    rng = np.random.default_rng(2)
    tensors = {}
    for name, size in SIZES.items():
        k = 3 * size.values if size.values > 1 else 37
        row_nbytes = k // size.values * size.nbytes
        shape = (PAGE // math.gcd(PAGE, row_nbytes), k)
        tensors[name] = (name, shape, random_blocks(name, shape, rng))
    path = tmp_path_factory.mktemp("paged") / "pages.gguf"
    write_gguf(path, tensors, alignment=PAGE)
    return path


def kind_of(address: int) -> str:
    return str(call("cudaPointerGetAttributes", address).type.name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_tensor_that_fills_its_pages_is_registered_with_nothing_beside_it(
    paged: Path, name: str, rng: np.random.Generator
) -> None:
    """The engine's own way: other tensors lie on the next pages of the file, which the GPU cannot read."""
    with qmm.open(paged) as model:
        tensor = model[name]
        assert tensor.nbytes % PAGE == tensor.info.offset % PAGE == 0
        with (
            qmm.Engine(model, "cuda", "mapped", tensors=[name]) as mapped,
            qmm.Engine(model, "cuda", "device", tensors=[name]) as device,
        ):
            assert mapped.weights_nbytes == tensor.nbytes
            address = mapped.address(name)
            places = (address - 1, address, address + tensor.nbytes - 1, address + tensor.nbytes)
            host, nothing = "cudaMemoryTypeHost", "cudaMemoryTypeUnregistered"
            assert [kind_of(place) for place in places] == [nothing, host, host, nothing]
            for n in (1, 2, 9):
                x = rng.standard_normal((n, tensor.k)).astype(np.float32)
                np.testing.assert_allclose(mapped.matmul(name, x), device.matmul(name, x), rtol=1e-4, atol=1e-4)
            got, expected = mapped.dequantize(name), device.dequantize(name)
            np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format with one row and odd numbers of rows, at widths that are no multiple of 512."""
    rng = np.random.default_rng(3)
    tensors = {}
    for name, size in SIZES.items():
        widths = (1, 37, 2887) if size.values == 1 else tuple(blocks * size.values for blocks in (1, 3, 11))
        for m, k in zip((1, 3, 67), widths, strict=True):
            tensors[f"{name} {m} x {k}"] = (name, (m, k), random_blocks(name, (m, k), rng))
    path = tmp_path_factory.mktemp("odd") / "odd.gguf"
    write_gguf(path, tensors)
    return path


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", FORMATS)
def test_products_and_dequantization_between_guards_and_among_poison(odd: Path, name: str, placement: str) -> None:
    with qmm.open(odd) as model:
        tensors = tuple(tensor for tensor in model if tensor.startswith(f"{name} "))
    checks = check_guarded(Job(str(odd), "cuda:0", placement, tensors, (1, 2, 9), ("int8", "f16"), 0, ()))
    assert [check.failure for check in checks] == [None] * 3
    modes = 1 if FORMATS[name].plain else 2
    assert [check.products for check in checks] == [3 * modes * 4] * 3
    assert all(check.dequantizations >= 4 for check in checks)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("by", "at"), [(1, "last"), (-1, "first")])
def test_a_product_that_reads_one_byte_too_far_is_named(
    odd: Path, placement: str, by: int, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmm.verify import paranoid

    change = (
        "from qmm import direct; kept = direct.matmul\n"
        f"direct.matmul = lambda d, f, a, m, *rest: kept(d, f, a + ({by} if m == 67 and near(a) else 0), m, *rest)\n"
        # In the guard alone: the engine's own tensor lies among bytes that may be read.
        f"near = lambda a: a % 4096 == ({'-67 * 11 * 34' if by > 0 else '0'}) % 4096"
    )
    monkeypatch.setattr(paranoid, "CHILD", f"exec({change!r}); from qmm.verify.paranoid import work; sys.exit(work())")
    tensors = ("Q8_0 67 x 352", "Q8_0 1 x 32")
    shifted, other = check_guarded(Job(str(odd), "cuda:0", placement, tensors, (1,), ("int8",), 0, ()))
    assert shifted.failure is not None
    assert "cudaErrorIllegalAddress" in shifted.failure
    assert f"at the {at} byte" in shifted.failure
    assert other.failure is None
