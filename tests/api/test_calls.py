"""Products on streams, of arrays of a made-up library, on a simulated CUDA."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from simulated_arrays import Array, Arrays, K, M, Own, Weight
from simulated_cuda import Stream
from simulated_work import Simulated

import qmm.calls
from qmm.arrays import KINDS
from qmm.calls import Calls
from qmm.children import PerProcess
from qmm.errors import ArrayError, OutOfMemoryError
from qmm.in_flight import InFlight
from qmm.kernels.ops.matvec.plan import Product
from qmm.kernels.ops.op import At, LaunchSpec

MIB = 1 << 20


class Products:
    """The calls of an engine with one weight, whose products take :attr:`nbytes` of workspace."""

    def __init__(self, simulated: Simulated, patch: pytest.MonkeyPatch) -> None:
        self.simulated, self.patch, self.nbytes = simulated, patch, 0
        self.weight = Weight()
        patch.setattr(qmm.calls, "plan", self._plan)
        in_flight = PerProcess(lambda: InFlight("closed"))
        self.calls = Calls({self.weight: self.weight}, simulated.device, in_flight, "model.gguf")
        self.current, self.other = simulated.cuda.stream(), simulated.cuda.stream()

    def _plan(self, block_format: Any, m: int, k: int, layout: Any, x: Any, y: Any, *rest: Any) -> Product:
        arguments = {"workspace": At("workspace"), "x": At("x"), "y": At("y")}
        return Product((LaunchSpec.of(self.simulated.kernel, 1, early=True, **arguments),), self.nbytes, x=x, y=y)

    def library(self, **how: Any) -> Arrays:
        """One whose current stream is :attr:`current`."""
        made = Arrays(int(self.current), **how)
        self.patch.setitem(KINDS, Array, made)
        return made

    def multiply(self, x: Any, out: Any = None, stream: Any = None) -> Any:
        kind = KINDS[type(x)]
        call, x_address, y_address = self.calls.find(self.weight, "int8", kind, x, out)
        assert call is not None
        return self.calls.queue(call, kind, x, out, x_address, y_address, stream)

    def each(self, x: Any, outs: list[Any], stream: Any = None) -> list[Any]:
        kind = KINDS[type(x)]
        found = [self.calls.find(self.weight, "int8", kind, x, out) for out in outs]
        return self.calls.queue_each(found, kind, x, outs, stream)

    def own_stream(self) -> Own:
        return Own(int(self.other), 0)

    def ordered(self) -> bool:
        """Whether the other stream's work waits for what was queued on the current one before; both are finished."""
        waits = any(item.after for item in self.other.items)
        self.simulated.cuda.finish()
        return waits


@pytest.fixture
def products(simulated: Simulated, monkeypatch: pytest.MonkeyPatch) -> Products:
    made = Products(simulated, monkeypatch)
    simulated.cuda._queue(made.current, frozenset())  # what a dropped array may still be used by
    return made


@pytest.fixture(params=["matmul", "matmul_each"])
def multiply(request: pytest.FixtureRequest, products: Products) -> Any:
    """A product by one method or the other."""
    if request.param == "matmul":
        return products.multiply
    return lambda x, out=None, stream=None: products.each(x, [out], stream)[0]


def x_of(rows: int = 1, named: int = 0) -> Array:
    return Array((rows, K), 0x4000, named)


def addresses(products: Products) -> tuple[int, ...]:
    return products.simulated.cuda.launches[-1].arguments


# The result, and what arrays outlive ----------------------------------------------------------------------------------


def test_a_result_of_the_current_stream_is_the_librarys_affair(products: Products, multiply: Any) -> None:
    library, x = products.library(), x_of()
    for stream in (None, int(products.current)):
        out = multiply(x, stream=stream)
        assert out.shape == (1, M)
        assert library.made[-1][1] is None
        assert addresses(products)[1:] == (x.address, out.address)
    assert not library.recorded
    assert not products.simulated.device.streams._held
    assert not products.ordered()


def test_a_result_for_one_of_its_own_streams_is_allocated_there(products: Products, multiply: Any) -> None:
    library, x, stream = products.library(), x_of(), products.own_stream()
    out = multiply(x, stream=stream)
    assert library.made[-1] == (weakref.ref(out), stream)
    assert set(library.recorded) == {(x.address, stream), (out.address, stream)}
    assert not products.simulated.device.streams._held
    assert not products.ordered()


def test_arrays_that_a_library_cannot_record_are_held(products: Products, multiply: Any) -> None:
    library = products.library(records=False)
    out = weakref.ref(multiply(x_of(), stream=products.own_stream()))
    assert library.made[-1][0] == out
    gc.collect()
    assert out() is not None
    products.simulated.cuda.finish()
    products.simulated.device.streams.forget_idle()
    assert out() is None


def test_a_result_for_a_handle_waits_for_the_memorys_last_use_and_is_held(products: Products, multiply: Any) -> None:
    library = products.library()
    x = x_of()
    out, dropped = weakref.ref(multiply(x, stream=int(products.other))), weakref.ref(x)
    del x
    assert library.made[-1][1] is None
    gc.collect()
    assert out() is not None
    assert dropped() is not None
    assert products.ordered()
    products.simulated.device.streams.forget_idle()
    assert out() is None
    assert dropped() is None


def test_a_given_out_is_held_but_not_ordered(products: Products, multiply: Any) -> None:
    products.library()
    out = Array((1, M), 0x6000)
    assert multiply(x_of(), out, int(products.other)) is out
    assert len(products.simulated.device.streams._held) == 1
    assert not products.ordered()


def test_a_library_that_waits_before_it_frees_needs_neither(products: Products, multiply: Any) -> None:
    products.library(recycles=False)
    multiply(x_of(), stream=int(products.other))
    assert not products.simulated.device.streams._held
    assert not products.ordered()


def test_a_product_waits_for_the_stream_that_fills_its_arrays(products: Products, multiply: Any) -> None:
    products.library(recycles=False)
    multiply(x_of(named=int(products.current)), stream=int(products.other))
    assert products.ordered()
    products.simulated.cuda._queue(products.current, frozenset())
    multiply(x_of(), Array((1, M), 0x6000, int(products.current)), int(products.other))
    assert products.ordered()


@pytest.mark.parametrize("recycles", [True, False])
def test_a_stream_that_only_the_call_refers_to_lives_until_the_work_is_queued(
    products: Products, multiply: Any, recycles: bool
) -> None:
    products.library(recycles=recycles)
    cuda = products.simulated.cuda

    class Foreign:
        def __init__(self) -> None:
            self.stream = cuda.stream()
            self.ptr = self.stream.handle

        def __del__(self) -> None:
            gone.append(self.stream)
            cuda.destroy(self.stream)

    gone: list[Stream] = []
    multiply(x_of(), stream=Foreign())
    assert cuda.launches[-1].stream >= 0x1000
    cuda.finish()
    products.simulated.device.streams.forget_idle()
    gc.collect()
    assert len(gone) == 1  # and no call got its handle afterwards, else an AssertionError
    cuda.finish()


def test_kernels_start_early_on_the_librarys_current_stream_only(products: Products, multiply: Any) -> None:
    products.library()
    for stream, early in ((None, True), (int(products.other), False), (int(products.current), True)):
        multiply(x_of(), stream=stream)
        assert products.simulated.early == early


# Which call, and how many ---------------------------------------------------------------------------------------------


def test_arrays_without_memory_are_refused_though_their_layout_was_used(products: Products, multiply: Any) -> None:
    products.library()
    out = Array((1, M), 0x6000)
    multiply(x_of(), out)
    launches = len(products.simulated.cuda.launches)
    for x, target, name in ((Array((1, K), 0), out, "x"), (x_of(), Array((1, M), 0), "out")):
        with pytest.raises(ArrayError, match=f"{name} is a made up array of shape .* without memory"):
            multiply(x, target)
    assert len(products.simulated.cuda.launches) == launches


def test_calls_of_one_layout_are_prepared_once(products: Products) -> None:
    products.library()
    x = x_of()
    found = {id(products.calls.find(products.weight, "int8", KINDS[Array], x, None)[0]) for _ in range(3)}
    x.address += 64
    found.add(id(products.calls.find(products.weight, "int8", KINDS[Array], x, None)[0]))
    assert len(found) == 1
    x.address += 4  # other kernels read it
    assert id(products.calls.find(products.weight, "int8", KINDS[Array], x, None)[0]) not in found


def test_few_calls_stay_prepared(products: Products, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmm.calls, "MOST_LAUNCHES", 8)
    products.library()
    prepared = []
    for rows in range(1, 13):
        call, *_ = products.calls.find(products.weight, "int8", KINDS[Array], x_of(rows), None)
        assert call is not None
        prepared.append(weakref.ref(call.prepared))
        del call
    alive = [reference() is not None for reference in prepared]
    assert alive == [False] * 8 + [True] * 4  # each counts as itself and one launch
    assert products.multiply(x_of(1)).shape == (1, M)


# Out of memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["current", "own", "handle"])
def test_out_of_memory_takes_workspace_of_the_library(products: Products, multiply: Any, stream: str) -> None:
    library, cuda = products.library(records=False), products.simulated.cuda
    products.nbytes, library.cached_nbytes = 4 * MIB, 8 * MIB
    cuda.limit = cuda.nbytes + MIB
    given = {"current": None, "own": products.own_stream(), "handle": int(products.other)}[stream]
    multiply(x_of(), Array((1, M), 0x6000), given)
    workspace, owner = library.made[-1]
    assert addresses(products)[0] == 0x8000
    assert owner is (given if stream == "own" else None)
    gc.collect()
    assert (workspace() is None) == (stream == "current")  # held, unless its library knows better
    assert products.ordered() == (stream == "handle")
    products.simulated.device.streams.forget_idle()
    assert workspace() is None


def test_out_of_memory_of_both_is_qmms_error(products: Products, multiply: Any) -> None:
    products.library()
    products.nbytes = 4 * MIB
    products.simulated.cuda.limit = products.simulated.cuda.nbytes + MIB
    with pytest.raises(OutOfMemoryError, match=rf"{4 * MIB} bytes for workspace .*: {MIB} bytes are free"):
        multiply(x_of())
    assert not products.simulated.cuda.launches


# Host arrays ----------------------------------------------------------------------------------------------------------


def host_product(products: Products) -> None:
    x, y = np.zeros((1, K), np.float32), np.zeros((1, M), np.float32)
    products.calls.multiply_host(products.weight, x, y, True)


def test_host_arrays_are_copied_there_and_back_and_only_their_stream_is_waited_for(products: Products) -> None:
    cuda, device = products.simulated.cuda, products.simulated.device
    products.nbytes = MIB
    for _ in range(2):
        host_product(products)
        assert cuda.take_waits() == [f"stream {cuda.streams[device.stream].number}"]
    assert [copy[2] for copy in cuda.copies] == [4 * K, 4 * M] * 2
    (_, x, y), staged = addresses(products), cuda.copies[-2:]
    assert (staged[0][0], staged[1][1]) == (x, y)
    assert products.current.pending  # not waited for


@pytest.mark.parametrize("thread", [False, True], ids=["the thread that captures", "another thread"])
def test_host_arrays_beside_a_capture(products: Products, thread: bool) -> None:
    cuda = products.simulated.cuda
    with cuda.captured(products.other) as graph:
        if thread:
            other = threading.Thread(target=host_product, args=(products,))
            other.start()
            other.join()
        else:
            host_product(products)
    assert len(cuda.copies) == 2
    cuda.take_waits()
    cuda.cudaGraphDestroy(graph)


def test_a_product_in_a_capture_takes_its_workspace_there(products: Products, multiply: Any) -> None:
    products.library()
    products.nbytes = MIB
    cuda = products.simulated.cuda
    with cuda.captured(products.other) as graph:
        multiply(x_of(), Array((1, M), 0x6000), int(products.other))
    assert addresses(products)[0] in graph.blocks
    assert not products.simulated.device.streams._held
    cuda.cudaGraphDestroy(graph)


def test_workspace_of_the_library_in_a_capture_lives_as_long_as_the_graph(products: Products, multiply: Any) -> None:
    library, cuda = products.library(), products.simulated.cuda
    products.nbytes, library.cached_nbytes = 4 * MIB, 8 * MIB
    cuda.limit = cuda.nbytes + MIB
    with cuda.captured(products.current) as graph:
        multiply(x_of(), Array((1, M), 0x6000))
    workspace, _ = library.made[-1]
    assert addresses(products)[0] == 0x8000
    gc.collect()
    assert workspace() is not None
    cuda.cudaGraphDestroy(graph)
    products.simulated.device.streams.forget_idle()
    assert workspace() is None


def test_a_result_lives_on_after_an_interrupt_that_left_its_work_queued(products: Products, multiply: Any) -> None:
    library, device = products.library(records=False), products.simulated.device
    queue = device.queue

    def interrupted(*arguments: Any) -> None:
        queue(*arguments)
        raise KeyboardInterrupt

    products.patch.setattr(device, "queue", interrupted)
    with suppress(KeyboardInterrupt):
        multiply(x_of(), stream=int(products.other))
    made, _ = library.made[-1]
    gc.collect()
    assert made() is not None
    products.simulated.cuda.finish()
    device.streams.forget_idle()
    assert made() is None
