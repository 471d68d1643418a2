"""What a device queues, as a driver gets to see it; no kernel is compiled or run."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import fake_driver
import pytest
from fake_driver import Driver

from qmm import sequence
from qmm.device import Device
from qmm.errors import ClosedError, DeviceError
from qmm.kernels.ops.layout import Activations
from qmm.kernels.ops.matvec.plan import NOTHING, Product, Region
from qmm.kernels.ops.op import At, LaunchSpec, Operand
from qmm.sequence import Step, queue_sequence
from qmm.streams import Streams

REGION = Region(34, 7, 32)
X, Y = Operand.contiguous(1, 32), Operand.contiguous(1, 8)
QUANTIZED = Activations(1, True, 0, 1, 4)
WORKSPACE = 1 << 30


def reads(weights, x, y, next_weights, next_row_nbytes, next_rows, next_nbytes):
    """A kernel of a product's parameters."""


def quantizes(weights, x, y, next_weights, next_row_nbytes, next_rows, next_nbytes):
    """Another one, before it."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return fake_driver.install(monkeypatch)


@pytest.fixture
def device(fake: Driver, monkeypatch: pytest.MonkeyPatch) -> Device:
    """One whose device was made current before, with nothing on it."""
    for module in ("device", "streams"):
        monkeypatch.setattr(f"qmm.{module}.on_device", lambda number: nullcontext())
    monkeypatch.setattr("qmm.device.call", lambda function: None)
    device = object.__new__(Device)
    device.number, device.own_streams, device._zeros, device._alone = 0, {}, 0x2E05, True
    device.lock, device._thread, device._stopped = threading.RLock(), threading.local(), False
    device._queued = 0
    device.allocate = lambda nbytes, what: WORKSPACE
    device.streams = Streams(device)
    device._thread.ready = True
    return device


def product_of(fake: Driver, launches: int, quantized: Activations | None = None) -> Product:
    """A product of so many launches that read the weights, and one that quantizes before."""
    nothing = dict.fromkeys(("next_weights", "next_row_nbytes", "next_rows", "next_nbytes"), 0)
    source = At("workspace", 256) if quantized else At("x")
    first = [LaunchSpec.of(fake.kernel(quantizes), 1, weights=0, x=At("x"), y=At("workspace"), **nothing)]
    specs = first if quantized else []
    for number in range(launches):
        target = At("y", 4 * number)
        specs.append(LaunchSpec.of(fake.kernel(reads), 4, weights=At("weights"), x=source, y=target, **nothing))
    return Product(
        tuple(specs),
        x=X,
        y=Y,
        quantized=quantized,
        quantize_launches=1 if quantized else 0,
        prefetch_region=REGION,
        prefetches=len(specs) - 1,
    )


def test_addresses_are_bound_when_work_is_queued(fake: Driver, device: Device) -> None:
    prepared = device.prepare(product_of(fake, 2), "a test")
    for weights, x, y in ((1000, 2000, 3000), (1001, 2002, 3003)):
        device.queue(prepared, weights, x, y, stream=7)
    assert [launched.arguments[:3] for launched in fake.launches] == [
        (1000, 2000, 3000),
        (1000, 2000, 3004),
        (1001, 2002, 3003),
        (1001, 2002, 3007),
    ]
    assert {launched.stream for launched in fake.launches} == {7}


def test_only_the_last_reading_of_the_weights_prefetches_what_comes_next(fake: Driver, device: Device) -> None:
    prepared = device.prepare(product_of(fake, 2), "a test")
    queue_sequence(device, [Step(prepared, 4096, 1, 2), Step(prepared, 8192, 1, 3)], 0)
    nothing, next_ones = (0, *NOTHING), (8192, *REGION)
    assert [launched.arguments[3:] for launched in fake.launches] == [nothing, next_ones, nothing, nothing]


def steps_of(fake: Driver, device: Device, *arrays: tuple[int, int]) -> list[Step]:
    return [Step(device.prepare(product_of(fake, 1, QUANTIZED), "a test"), 4096, x, y) for x, y in arrays]


def functions(fake: Driver) -> list[int]:
    """For each launch, whether it read the weights (1) or quantized (0)."""
    return [int(launched.arguments[0] == 4096) for launched in fake.launches]


def test_products_with_the_same_activations_quantize_them_once(fake: Driver, device: Device) -> None:
    steps = steps_of(fake, device, (1000, 5000), (1000, 6000), (1000, 7000))
    queue_sequence(device, steps, 0)
    assert functions(fake) == [0, 1, 1, 1]
    fake.launches.clear()
    queue_sequence(device, steps, 0, share_activations=False)
    assert functions(fake) == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    "arrays",
    [
        pytest.param([(1000, 5000), (1004, 6000)], id="other activations"),
        pytest.param([(1000, 1000 - 4 * 8 + 1), (1000, 6000)], id="activations that a product has written to"),
        pytest.param([(1000, 1000 + 4 * 31), (1000, 6000)], id="the last one of them"),
    ],
)
def test_what_may_have_changed_is_quantized_again(fake: Driver, device: Device, arrays: list[tuple[int, int]]) -> None:
    queue_sequence(device, steps_of(fake, device, *arrays), 0)
    assert functions(fake) == [0, 1, 0, 1]


def test_a_refusal_names_the_device_and_what_was_queued(fake: Driver, device: Device) -> None:
    prepared = device.prepare(product_of(fake, 1), "a test")
    fake.refuses = fake.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DeviceError, match="a product on CUDA device 0: cuLaunchKernelEx of example returned"):
        device.queue(prepared, 1, 2, 3, 0)


def test_a_stopped_device_takes_no_more_work(fake: Driver, device: Device) -> None:
    prepared = device.prepare(product_of(fake, 1), "a test")
    device._stopped = True
    with pytest.raises(ClosedError, match="the engine on CUDA device 0 was closed"):
        device.queue(prepared, 1, 2, 3, 0)


@pytest.mark.parametrize("between", [False, True], ids=["in a product", "between two of a sequence"])
def test_a_product_in_the_middle_of_others_is_an_error(
    fake: Driver, device: Device, monkeypatch: pytest.MonkeyPatch, between: bool
) -> None:
    """As of a signal handler: they share the memory of their arguments, and of quantized activations."""
    steps = steps_of(fake, device, (1000, 5000), (1000, 6000))
    whose, name = (sequence, "_same_activations") if between else (fake, "cuStreamIsCapturing")
    usual, nested = getattr(whose, name), []

    def multiply_first(*arguments: object) -> object:
        if not nested:
            nested.append(True)
            device.queue(steps[0].prepared, 4096, 3000, 7000, 0)
        return usual(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(whose, name, multiply_first)
        patch.setattr(device.streams, "_capturing", fake.cuStreamIsCapturing)
        with pytest.raises(DeviceError, match="a signal handler of the same thread multiplied in the middle"):
            queue_sequence(device, steps, 0)
    queue_sequence(device, steps, 0)
