"""Where the tensors of a file are: against gguf's reader, at any alignment, shape and order."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_files import F32_ROW, FORMATS, random_blocks, write_gguf

import qmm
from qmm.cli.info import describe
from qmm.errors import GGUFError, UnsupportedTypeError
from qmm.loaders import FileMapping, GGUFIndex
from qmm.loaders.gguf.header import (
    LAST_READ_NBYTES,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_test_writer_knows_the_block_sizes_of_gguf() -> None:
    for name, form in FORMATS.items():
        kind = GGMLQuantizationType[name]
        assert (form.number, form.values, form.nbytes) == (kind.value, *GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("alignment", [1, 2, 4, 8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_every_tensor_is_where_gguf_reader_finds_it(
    tmp_path: Path, rng: np.random.Generator, alignment: int, version: int
) -> None:
    path = tmp_path / "model.gguf"
    tensors = {}
    for name, form in FORMATS.items():
        shape = (3, 2, form.values * 2)
        tensors[f"blk.{name}.weight"] = (name, shape, random_blocks(name, shape, rng))
    places = write_gguf(path, tensors, alignment=alignment, version=version)

    index = GGUFIndex.read(path)
    reader = gguf.GGUFReader(path)
    assert (index.version, index.alignment, index.files) == (version, alignment, (path,))
    assert list(index.tensors) == [tensor.name for tensor in reader.tensors] == list(tensors)
    for theirs in reader.tensors:
        ours = index.tensors[theirs.name]
        assert ours.type == theirs.tensor_type.name
        assert ours.shape == tuple(theirs.shape.tolist()[::-1])
        assert (ours.m, ours.k) == (6, ours.shape[-1])
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert ours.offset == places[ours.name]
        with FileMapping.open(ours.path) as mapping:
            assert mapping.view(ours.offset, ours.nbytes).tobytes() == tensors[ours.name][2]


def test_unknown_type_gets_the_room_up_to_its_neighbour_or_the_end(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = {"first": (99, (3,), bytes(40)), "second": F32_ROW, "third": (4, (2, 2), bytes(33))}
    places = write_gguf(path, tensors)  # type: ignore[arg-type]
    index = GGUFIndex.read(path)
    first, second, third = index.tensors.values()
    assert (first.type, first.nbytes, second.type, third.type) == ("unknown(99)", 64, "F32", "unknown(4)")
    assert third.offset == places["third"]
    assert third.offset + third.nbytes == path.stat().st_size


def test_a_tensor_of_an_unknown_type_is_listed_and_only_its_use_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"new": (99, (1, 8), bytes(32)), "known": ("F32", (1, 8), np.ones(8, np.float32).tobytes())})
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        assert [(row.name, row.type, row.nbytes, row.supported) for row in describe(model).tensors] == [
            ("new", "unknown(99)", 32, False),
            ("known", "F32", 32, True),
        ]
        assert model["new"].data.tobytes() == bytes(32)
        with pytest.raises(UnsupportedTypeError, match=r"tensor 'new' is of type unknown\(99\)"):
            engine.matmul("new", np.ones(8, np.float32))
        assert engine.matmul("known", np.ones(8, np.float32)).tolist() == [8]


@pytest.mark.parametrize("other", [F32_ROW, (98, (1, 8), bytes(32))], ids=["known", "unknown"])
def test_two_tensors_at_one_offset_overlap_whatever_their_types_and_order(
    tmp_path: Path, other: tuple[str | int, tuple[int, ...], bytes]
) -> None:
    path = tmp_path / "model.gguf"
    for names in ("ab", "ba"):
        tensors = dict(zip(names, (other, (99, (1, 8), bytes(32))), strict=True))
        write_gguf(path, tensors, offsets={names[1]: 0})  # type: ignore[arg-type]
        with pytest.raises(GGUFError, match=r"tensor '[ab]' takes bytes \d+ to \d+, but tensor '[ab]' begins at byte"):
            GGUFIndex.read(path)


def test_unknown_type_has_no_byte_without_values_and_at_least_one_with_them(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for order in (("none", "w"), ("w", "none")):
        tensors = {"none": (99, (0, 3), b""), "w": F32_ROW}
        write_gguf(path, {name: tensors[name] for name in order}, offsets={"none": 0, "w": 0})
        assert {name: tensor.nbytes for name, tensor in GGUFIndex.read(path).tensors.items()} == {"none": 0, "w": 32}
    write_gguf(path, {"w": F32_ROW, "some": (99, (1, 3), b"")})
    with pytest.raises(GGUFError, match=r"tensor 'some' takes bytes 160 to 161, but the file ends at byte 160"):
        GGUFIndex.read(path)


@pytest.mark.parametrize(
    ("shape", "m", "k"),
    [
        *[((), 1, 1), ((5,), 1, 5), ((2, 3, 4, 5), 24, 5), ((0, 5), 0, 5), ((7, 0), 7, 0), ((2, 1, 3, 1, 5), 6, 5)],
        ((1,) * 63 + (5,), 1, 5),
    ],
)
def test_shapes(tmp_path: Path, shape: tuple[int, ...], m: int, k: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"w": ("F32", shape, bytes(4 * m * k)), "v": F32_ROW})
    tensor = GGUFIndex.read(path).tensors["w"]
    assert (tensor.shape, tensor.m, tensor.k, tensor.nbytes) == (shape or (1,), m, k, 4 * m * k)


def test_tensor_table_may_be_out_of_order(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    places = write_gguf(path, {"a": F32_ROW, "b": F32_ROW}, offsets={"a": 32, "b": 0})
    index = GGUFIndex.read(path)
    assert list(index.tensors) == ["a", "b"]
    assert [tensor.offset for tensor in index.tensors.values()] == [places["b"], places["a"]]


@pytest.mark.parametrize("alignment", [1, 2, 4, 24])
def test_tensors_at_any_alignment_are_used(tmp_path: Path, rng: np.random.Generator, alignment: int) -> None:
    """gguf.md wants a multiple of 8, ggml a power of two; kernels of qmm read at any address."""
    path = tmp_path / "model.gguf"
    kinds = {"Q4_K": (3, 512), "Q8_0": (3, 32), "F32": (3, 33), "BF16": (2, 5)}
    tensors: dict[str, Any] = {"odd": ("Q8_0", (1, 32), bytes(34)), "byte": (99, (1,), bytes(1))}
    tensors |= {kind: (kind, shape, random_blocks(kind, shape, rng)) for kind, shape in kinds.items()}
    places = write_gguf(path, tensors, alignment=alignment)
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        assert model.alignment == alignment
        for kind, (m, k) in kinds.items():
            assert model[kind].info.offset == places[kind]
            rows = np.frombuffer(tensors[kind][2], np.uint8).reshape(m, -1)
            weights = gguf.quants.dequantize(rows.copy(), GGMLQuantizationType[kind])
            np.testing.assert_array_equal(engine.dequantize(kind), weights)
            x = rng.standard_normal((4, k)).astype(np.float32)
            exact = x.astype(np.float64) @ weights.T.astype(np.float64)
            assert np.sum((engine.matmul(kind, x) - exact) ** 2) <= 5e-4 * np.sum(exact**2)


def test_a_tensor_of_five_dimensions_is_used_by_its_rows(tmp_path: Path, rng: np.random.Generator) -> None:
    """The patch embedding of a video model; ggml has at most four dimensions, gguf-py and MLX write more."""
    path = tmp_path / "wan.gguf"
    shape = (8, 4, 1, 2, 32)
    block = random_blocks("Q8_0", (64, 32), rng)
    write_gguf(path, {"patch": ("Q8_0", shape, block), "w": ("Q8_0", (64, 32), block)})
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        x = rng.standard_normal((3, 32)).astype(np.float32)
        assert (model["patch"].shape, model["patch"].m, model["patch"].k) == (shape, 64, 32)
        assert engine.matmul("patch", x).shape == (3, 8, 4, 1, 2)
        np.testing.assert_array_equal(engine.matmul("patch", x).reshape(3, 64), engine.matmul("w", x))
        np.testing.assert_array_equal(engine.dequantize("patch").reshape(64, 32), engine.dequantize("w"))


@pytest.mark.parametrize("cut", [0, 24], ids=["padded", "not-padded"])
def test_a_tensor_without_values_may_be_last_in_a_file_that_is_not_padded(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.gguf"
    weights = np.arange(90, dtype=np.float32)
    write_gguf(
        path, {"w": ("F32", (3, 30), weights.tobytes() + bytes(24)), "__index_timestep_zero__": ("F32", (0,), b"")}
    )
    os.truncate(path, path.stat().st_size - cut)
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        empty = model["__index_timestep_zero__"]
        assert (empty.nbytes, empty.data.size, engine.dequantize(empty).shape) == (0, 0, (0,))
        np.testing.assert_array_equal(engine.dequantize("w").reshape(-1), weights)


def test_tensors_without_values_may_claim_any_place(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, {"w": F32_ROW, "none": ("F32", (0, 3), b"")}, offsets={"none": 2**64 - 32})
    with qmm.open(path) as model, qmm.Engine(model, device="cpu") as engine:
        assert model["none"].data.size == 0
        assert engine.matmul("none", np.ones(3, np.float32)).shape == (0,)
        assert engine.address("none") == 0


def resident_pages(mapping: FileMapping) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """By page of the file: whether the page cache holds it (mincore(2))."""
    count = -(-mapping.nbytes // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(mapping.address), ctypes.c_size_t(mapping.nbytes), flags):
        raise OSError(ctypes.get_errno(), "mincore")
    return np.frombuffer(flags, dtype=np.uint8) & 1 == 1


def test_no_weight_page_is_mapped_or_read(tmp_path: Path) -> None:
    """Indexing maps nothing at all, and reads from the disk only the header and the rest of the last read of it.

    The last read does not know where the header ends, so up to LAST_READ_NBYTES of what follows come into the page
    cache (not into the process). Beyond that nothing is read, for which POSIX_FADV_RANDOM is needed: the kernel would
    read ahead.
    """
    path = tmp_path / "big.gguf"
    nbytes = 64 << 20
    write_gguf(path, {"w": ("F32", (nbytes // 4,), os.urandom(1 << 20) * 64)}, metadata={"t": ["token"] * 100_000})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with FileMapping.open(path) as mapping:
        if resident_pages(mapping).mean() > 0.01:
            pytest.skip("this file system keeps pages in spite of POSIX_FADV_DONTNEED (tmpfs, overlay)")
    before = Path("/proc/self/maps").read_text()
    index = GGUFIndex.read(path)
    assert str(path) not in before + Path("/proc/self/maps").read_text()
    with FileMapping.open(path) as mapping:
        pages = resident_pages(mapping)
        smaps = Path("/proc/self/smaps").read_text().split(str(path))[1].splitlines()
    assert next(line.split() for line in smaps if line.startswith("Rss:"))[1:] == ["0", "kB"]
    beyond = (index.tensors["w"].offset + LAST_READ_NBYTES) // mmap.PAGESIZE + 1
    assert not pages[beyond:].any()


def test_sparse_weights_of_a_terabyte_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    write_gguf(path, {"w": ("F32", (8,), b"")}, dimensions={"w": (1 << 37,)})
    os.truncate(path, path.stat().st_size + (1 << 39))
    started = time.perf_counter()
    assert GGUFIndex.read(path).tensors["w"].nbytes == 1 << 39
    assert time.perf_counter() - started < 1


def test_gemma(gemma_path: Path) -> None:
    index = GGUFIndex.read(gemma_path)
    assert (index.version, index.alignment, len(index.tensors)) == (3, 32, 236)
    by_type: dict[str, int] = {}
    for tensor in index.tensors.values():
        by_type[tensor.type] = by_type.get(tensor.type, 0) + 1
        assert tensor.offset % 32 == 0
    assert by_type == {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}
    assert index.tensors["token_embd.weight"].shape == (262_144, 640)
    assert max(tensor.offset + tensor.nbytes for tensor in index.tensors.values()) == gemma_path.stat().st_size
    tokens = index.metadata["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[:4]) == (262_144, ["<pad>", "<eos>", "<bos>", "<unk>"])
    assert index.metadata["tokenizer.ggml.scores"].shape == (262_144,)
    assert index.metadata["general.architecture"] == "gemma3"


def test_gemma_is_indexed_in_milliseconds(gemma_path: Path) -> None:
    """8 ms on two slow cores; benchmarks/bench_open.py has the figures. The bound leaves room for a busy machine."""
    times = []
    for _ in range(8):
        started = time.perf_counter()
        GGUFIndex.read(gemma_path)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.030


def test_random_blocks_are_finite_in_every_format(rng: np.random.Generator) -> None:
    for extreme in (False, True):
        for name, form in FORMATS.items():
            data = random_blocks(name, (4, 4 * form.values), rng, extreme)
            assert len(data) == gguf_files.nbytes_of(name, (4, 4 * form.values))
            rows = np.frombuffer(data, dtype=np.uint8).reshape(4, -1)
            with np.errstate(all="ignore"):
                assert np.isfinite(gguf.quants.dequantize(rows.copy(), GGMLQuantizationType[name])).all()
