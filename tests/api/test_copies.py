"""Copies of models, engines and tensors, which are the same object; and pickling, which says what to do instead."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import K, is_mapped, write_small_model

import qmm
from qmm.errors import ClosedError, CopyError
from qmm.loaders import GGUFIndex


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_models_engines_and_tensors_are_shared(
    path: Path, x: np.ndarray, copied: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """A module that holds an engine is copied for a moving average: the copy multiplies by the same weights."""
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        expected = engine.matmul("a", x)
        for original in (model, engine, model["a"], model["a"].info, model.metadata):
            module = {"it": original, "list": [original]}
            again = copied(module)
            assert again["it"] is original or again["it"] == original
        other = copied({"engine": engine})["engine"]
        np.testing.assert_array_equal(other.matmul(copied({"tensor": model["a"]})["tensor"], x), expected)
    assert other.closed
    with pytest.raises(ClosedError):
        other.matmul("a", x)
    assert not is_mapped(path)


def test_pickling_says_what_to_do_in_the_worker(path: Path) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        for original, way in (
            (model, rf"qmm\.open\('{path}'\)"),
            (engine, rf"qmm\.Engine\('{path}'\)"),
            (model["a"], rf"qmm\.open\('{path}'\)\['a'\]"),
            (model.mapping(path), "cannot be copied or pickled"),
        ):
            with pytest.raises(CopyError, match=way):
                pickle.dumps(original)
            with pytest.raises(TypeError):  # what libraries look for
                pickle.dumps([original])
        again = pickle.loads(pickle.dumps((model["a"].info, GGUFIndex.read(path))))
        assert again[0] == model["a"].info
        assert again[1].tensors == {name: tensor.info for name, tensor in model.items()}
