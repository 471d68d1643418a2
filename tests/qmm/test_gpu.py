"""Prepared products as a driver gets to see them; no kernel is compiled or run."""

from __future__ import annotations

import pytest
from fake_driver import Driver

from qmm.gpu import Product
from qmm.kernels import launch
from qmm.kernels.launch import Launch

ARGUMENTS = 15


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(launch, "driver", made)
    return made


def product_of(fake: Driver, *grids: int) -> Product:
    """A product of so many launches, each of which reads the weights."""
    product = Product(0)
    for grid in grids:
        made = Launch(fake.kernel(ARGUMENTS, shared=True), 0, grid, (0,) * ARGUMENTS, 0, early=True)
        product.add(made, (7, 0, 0), (11, 1, 0))
        product.announced, product.grid = made.arguments, grid
    return product


@pytest.mark.parametrize("nbytes", [0, 15, 16, 2112, 33 << 20])
@pytest.mark.parametrize("grid", [1, 40, 132])
def test_blocks_share_what_comes_next_and_leave_out_less_than_16_bytes_each(
    fake: Driver, grid: int, nbytes: int
) -> None:
    product = product_of(fake, grid)
    product.announce(1 << 40, nbytes)
    product.queue(1, 2, 3, 0)
    (launched,) = fake.launches
    address, share = launched.arguments[13:]
    assert address == 1 << 40
    assert share % 16 == 0
    assert grid * share <= nbytes < grid * (share + 16)


def test_only_the_last_reading_of_the_weights_brings_in_what_comes_next(fake: Driver) -> None:
    product = product_of(fake, 4, 4)
    product.announce(4096, 1024)
    product.queue(1, 2, 3, 0)
    assert [launched.arguments[13:] for launched in fake.launches] == [(0, 0), (4096, 256)]


def test_without_an_announcement_nothing_is_brought_in(fake: Driver) -> None:
    product = product_of(fake, 4)
    product.announce(4096, 1024)
    product.announce(0, 0)
    product.queue(1, 2, 3, 0)
    (launched,) = fake.launches
    assert launched.arguments[13:] == (0, 0)


def test_a_product_that_launches_nothing_takes_announcements() -> None:
    Product(0).announce(4096, 1024)
