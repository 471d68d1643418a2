"""What decides whether a result is right: bits, NMSE, and how many results it is taken over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf_files import write_gguf

import qmm
from qmm.errors import QmmError
from qmm.verify import check as verify
from qmm.verify import oracle


def tensor(m: int, k: int = 64, plain: bool = False) -> Any:
    return SimpleNamespace(name="t", m=m, k=k, format=SimpleNamespace(plain=plain))


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.0000002], False),
        ([0.0], [-0.0], False),
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.nan, 1.0], [1.0, np.nan], False),
        ([np.inf], [-np.inf], False),
        ([np.nan], [np.inf], False),
    ],
)
def test_bits_are_the_same_or_not(actual: list[float], expected: list[float], same: bool) -> None:
    assert oracle.same_bits(np.array(actual, np.float32), np.array(expected, np.float32)) is same


def test_which_nan_it_is_does_not_matter() -> None:
    quiet, other = np.array([0x7FC00000], np.uint32), np.array([0x7FFFFFFF], np.uint32)
    assert oracle.same_bits(quiet.view(np.float32), other.view(np.float32))


@pytest.mark.parametrize("m", [1, 3, 63, 64, 4097])
@pytest.mark.parametrize("n", [1, 2, 8, 33])
def test_enough_results_are_summed_up_and_no_batch_too_many(m: int, n: int) -> None:
    batches = verify.batches_for(tensor(m), n)
    assert batches * m * n >= verify.RESULTS
    assert batches == 1 or (batches - 1) * m * n < verify.RESULTS


def test_activations_are_the_seeds_and_the_names() -> None:
    first, again = (verify.activations(tensor(1), 3, 5) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:2], verify.activations(tensor(1), 2, 5))  # a shorter one is its beginning
    assert not np.array_equal(first, verify.activations(tensor(1), 3, 6))
    assert abs(float(verify.activations(tensor(1, k=100_000), 1, 0).std()) - 1) < 0.02


def test_plain_types_are_checked_with_unquantized_activations_alone() -> None:
    assert verify.modes_of(tensor(1, plain=True), ("int8",)) == ("f16",)
    assert verify.modes_of(tensor(1), ("int8", "f16")) == ("int8", "f16")


def test_tolerance_of_int8_holds_for_the_worst_block_there_is() -> None:
    """All values but one lie half a step from what can be stored, and the largest is as small as that allows."""
    step = np.float64(1.0)
    block = np.full(32, step / 2)
    block[0] = 127 * step
    error = np.full(32, step / 2)
    error[0] = 0
    assert np.sum(error**2) / np.sum(block**2) <= 32 / (4 * 127**2) < verify.TOLERANCES["int8"]


def test_tolerance_of_f16_holds_for_any_rounding_to_float16(rng: np.random.Generator) -> None:
    values = rng.standard_normal(1 << 16) * np.exp2(rng.integers(-10, 1, 1 << 16))
    error = values - values.astype(np.float16)
    assert np.sum(error**2) / np.sum(values**2) <= 2.0**-22 < verify.TOLERANCES["f16"]


def written(folder: Path, tensors: dict[str, Any]) -> qmm.Model:
    write_gguf(folder / "m.gguf", tensors)
    return qmm.open(folder / "m.gguf")


EXOTIC = (19, (1, 256), bytes(50))  # IQ1_S, which has no kernel


def test_a_model_without_tensors_has_nothing_to_verify(tmp_path: Path) -> None:
    with written(tmp_path, {}) as model, pytest.raises(QmmError, match=r"m\.gguf: holds no tensors: nothing to verify"):
        verify.checkable(model, "*")


def test_types_without_a_kernel_are_nothing_to_verify(tmp_path: Path) -> None:
    with written(tmp_path, {"a.x": EXOTIC, "b.x": EXOTIC, "c": ("F32", (1,), bytes(4))}) as model:
        with pytest.raises(
            QmmError, match=r"has 2 tensors that match '\*\.x', none of a type .*\(IQ1_S\): nothing to v"
        ):
            verify.checkable(model, "*.x")
        assert [tensor.name for tensor in verify.checkable(model, "*")] == ["a.x", "b.x", "c"]
        with pytest.raises(qmm.PatternError, match=r"'z\*'; there are 3 tensors"):
            verify.checkable(model, "z*")
