"""Arrays as qmm sees them: addresses, strides and dtypes of NumPy arrays, compared with NumPy's own arithmetic."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from qmm.arrays import DTYPES, View, kind_of
from qmm.arrays.cuda_interface import CuPyArrays, NumbaArrays
from qmm.errors import ArrayError, QmmError

BUFFER = np.arange(4096, dtype=np.float32)


@st.composite
def strided(draw: st.DrawFn, least: int = 0) -> np.ndarray[Any, Any]:
    """Draw an array of up to four dimensions with any strides, negative and zero ones too, inside BUFFER."""
    shape = draw(st.lists(st.integers(least, 4), min_size=1, max_size=4))
    strides = [draw(st.integers(-70, 70)) for _ in shape]
    start = BUFFER.size // 2
    array = as_strided(BUFFER[start:], shape, [4 * stride for stride in strides], writeable=False)
    assert array.size == 0 or (array.min() >= 0 and array.max() < BUFFER.size)  # its values are its own addresses
    return array


@st.composite
def sliced(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Draw what slicing, reversing and transposing make of a contiguous array: no two elements share memory."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    array = array[tuple(slice(None, None, draw(st.sampled_from([1, 2, -1]))) for _ in shape)]
    return array.transpose(draw(st.permutations(range(array.ndim))))


def view_of(array: np.ndarray[Any, Any]) -> View:
    return kind_of(array).view(array)


def addresses(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Compute the address of every element, in the array's shape."""
    grid = np.full(array.shape, array.ctypes.data, np.int64)
    for axis, stride in enumerate(array.strides):
        steps = np.arange(array.shape[axis]) * stride
        grid += steps.reshape([-1 if other == axis else 1 for other in range(array.ndim)])
    return grid


@given(strided())
def test_slabs_reach_every_row_once_and_in_order(array: np.ndarray[Any, Any]) -> None:
    k = array.shape[-1]
    view = view_of(array)
    slabs = view.operand().slabs
    firsts = np.cumsum([0, *(slab.rows for slab in slabs)])
    assert [slab.first for slab in slabs] == firsts[:-1].tolist()
    reached = [
        np.add.outer(slab.row_stride * np.arange(slab.rows), slab.column_stride * np.arange(k))
        + (view.address + slab.offset)
        for slab in slabs
    ]
    expected = addresses(array).reshape(-1, k) if array.size else np.empty((0, k), np.int64)
    np.testing.assert_array_equal(np.concatenate([*reached, np.empty((0, k), np.int64)])[: len(expected)], expected)
    if array.size:
        assert firsts[-1] == len(expected)


@given(sliced())
def test_a_matrix_of_any_strides_is_one_slab(array: np.ndarray[Any, Any]) -> None:
    matrix = array.reshape(array.shape[0], -1)
    assert len(list(view_of(matrix).operand().slabs)) == 1


def test_rows_that_do_not_continue_each_other_are_two_slabs() -> None:
    array = np.zeros((2, 3, 8), np.float32)[:, :2]
    assert [(slab.first, slab.rows, slab.row_stride) for slab in view_of(array).operand().slabs] == [
        (0, 2, 32),
        (2, 2, 32),
    ]


def test_no_rows_are_no_slabs() -> None:
    assert view_of(np.zeros((0, 8), np.float32)).operand().slabs == ()


@given(st.one_of(strided(least=1), sliced()))
def test_contiguous_is_what_numpy_calls_contiguous(array: np.ndarray[Any, Any]) -> None:
    assert view_of(array).contiguous == array.flags.c_contiguous


@given(strided())
def test_no_overlap_goes_unseen(array: np.ndarray[Any, Any]) -> None:
    if not view_of(array).overlaps_itself:
        assert len(np.unique(addresses(array))) == array.size


@given(sliced())
def test_slices_and_transposes_do_not_overlap(array: np.ndarray[Any, Any]) -> None:
    assert not view_of(array).overlaps_itself


def test_a_broadcast_array_overlaps() -> None:
    assert view_of(np.broadcast_to(np.zeros(8, np.float32), (3, 8))).overlaps_itself


@given(st.one_of(strided(least=1), sliced()), st.data())
def test_rows_keep_addresses_or_are_refused(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    leading = data.draw(st.integers(0, array.ndim - 1))
    try:
        rows = view_of(array).rows(leading)
    except ArrayError:
        assert not array.flags.c_contiguous
        return
    flat = addresses(array).reshape(*array.shape[:leading], -1)
    assert rows.shape == flat.shape
    expected = np.full(flat.shape, rows.address, np.int64)
    for axis, stride in enumerate(rows.strides):
        steps = np.arange(flat.shape[axis]) * stride
        expected += steps.reshape([-1 if other == axis else 1 for other in range(flat.ndim)])
    np.testing.assert_array_equal(expected, flat)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_dtypes_come_back_as_they_are(dtype: type[np.floating[Any]]) -> None:
    array = np.ones((3, 4), dtype)
    kind = kind_of(array)
    view = kind.view(array)
    assert view.dtype == np.dtype(dtype).name
    assert view.dtype in DTYPES
    assert view.device is None
    assert view.address == array.ctypes.data
    made = kind.empty((2, 5), array)
    assert (made.shape, made.dtype) == ((2, 5), np.dtype(dtype))
    assert kind.to_host(array).dtype == np.float32


def test_contiguous_float32_is_not_copied() -> None:
    array = np.ones((2, 3, 4), np.float32)
    assert np.shares_memory(kind_of(array).to_host(array), array)
    assert kind_of(array).to_host(array).shape == (6, 4)


def test_float16_results_overflow_to_infinity_without_a_warning() -> None:
    target = np.zeros(2, np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind_of(target).from_host(np.array([1e6, -1e6], np.float32), target)
    assert target.tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64", "object"])
def test_other_dtypes_are_refused_with_the_ones_that_work(dtype: str) -> None:
    with pytest.raises(ArrayError, match=f"{dtype}.*float32, float16, bfloat16"):
        view_of(np.zeros(4, dtype))


def test_foreign_byte_order_is_refused_with_the_way_out() -> None:
    with pytest.raises(ArrayError, match="astype"):
        view_of(np.zeros(4, ">f4"))


@pytest.mark.parametrize("value", [[1.0, 2.0], 1.0, None, memoryview(b"abcd"), np.float32(1)])
def test_what_is_no_array_is_refused_by_its_type(value: object) -> None:
    with pytest.raises(ArrayError, match=type(value).__qualname__) as caught:
        kind_of(value)
    assert isinstance(caught.value, QmmError)
    assert isinstance(caught.value, ValueError)


def test_a_memmap_and_other_subclasses_are_numpy_arrays(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 4))
    assert kind_of(mapped).name == "NumPy"
    assert not view_of(np.memmap(tmp_path / "x", np.float32, "r", shape=(2, 4))).writable


def test_a_class_that_only_looks_like_a_tensor_is_refused() -> None:
    class Tensor:
        shape = (4,)

    with pytest.raises(ArrayError, match="not an array that qmm supports"):
        kind_of(Tensor())


@pytest.mark.parametrize(
    ("index", "reach"),
    [
        (np.s_[:], (0, 96)),
        (np.s_[1:, ::2], (0, 60)),
        (np.s_[::-1], (-64, 32)),
        (np.s_[:, ::-1], (-28, 68)),
        (np.s_[:0], (0, 0)),
    ],
)
def test_reach_is_from_the_lowest_byte_to_the_highest(index: Any, reach: tuple[int, int]) -> None:
    array = np.zeros((3, 8), np.float32)[index]
    assert kind_of(array).view(array).reach == reach


@pytest.mark.parametrize(
    ("offset", "index", "aligned"),
    [(0, np.s_[:], True), (4, np.s_[:, ::-1], True), (1, np.s_[:], False), (2, np.s_[:], False), (3, np.s_[:0], False)],
)
def test_aligned_is_what_numpy_calls_aligned(offset: int, index: Any, aligned: bool) -> None:
    array = np.ndarray((2, 3), np.float32, bytearray(64), offset)[index]
    assert view_of(array).aligned == aligned


def test_steps_between_elements_may_be_unaligned_too() -> None:
    array = as_strided(BUFFER, (2, 3), (14, 4), writeable=False)
    assert not view_of(array).aligned
    assert view_of(array[:1]).aligned  # the step from row to row is not taken


@pytest.mark.parametrize("name", ["numba", "cupy"])
def test_cuda_arrays_of_foreign_byte_order_are_refused(name: str) -> None:
    class Foreign:
        dtype = np.dtype(">f4")
        __cuda_array_interface__ = {"shape": (4, 8), "strides": None, "data": (4096, False)}  # noqa: RUF012

    kind = NumbaArrays() if name == "numba" else CuPyArrays()
    with pytest.raises(ArrayError, match=r"array of foreign byte order \(>f4\)"):
        kind.view(Foreign())
