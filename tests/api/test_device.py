"""Prepared products as a driver gets to see them; no kernel is compiled or run."""

from __future__ import annotations

import threading

import pytest
from fake_driver import Driver

from qmm.device import GPU, NEXT, NOTHING, Product
from qmm.kernels.runtime import launch
from qmm.kernels.runtime.launch import Launch

ARGUMENTS = 17
OPENING = (4096, 34, 7, 32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(launch, "driver", made)
    return made


@pytest.fixture
def gpu(fake: Driver) -> GPU:
    """One whose device was made current before, with nothing on it."""
    made = object.__new__(GPU)
    made.lock, made._thread, made._stopped = threading.RLock(), threading.local(), False
    made._thread.ready = True
    return made


def product_of(fake: Driver, launches: int) -> Product:
    """A product of so many launches, each of which reads the weights."""
    product = Product(0)
    for _ in range(launches):
        made = Launch(fake.kernel(ARGUMENTS, shared=True), 0, 4, (0,) * ARGUMENTS, 0, early=True)
        product.add(made, (7, 0, 0), (11, 1, 0))
        product.announced = made.arguments
    return product


def test_only_the_last_reading_of_the_weights_brings_in_what_comes_next(fake: Driver, gpu: GPU) -> None:
    product = product_of(fake, 2)
    product.announce(OPENING)
    gpu.queue(product, 1, 2, 0)
    assert [tuple(launched.arguments[NEXT]) for launched in fake.launches] == [NOTHING, OPENING]


def test_without_an_announcement_nothing_is_brought_in(fake: Driver, gpu: GPU) -> None:
    product = product_of(fake, 1)
    product.announce(OPENING)
    product.announce(NOTHING)
    gpu.queue(product, 1, 2, 0)
    (launched,) = fake.launches
    assert tuple(launched.arguments[NEXT]) == NOTHING


def test_a_product_that_launches_nothing_takes_announcements() -> None:
    Product(0).announce(OPENING)
