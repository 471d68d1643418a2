"""What lies beside the tensor, the activations and the results is neither read nor written by the CPU's kernels."""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import os
import signal
import traceback
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from cpu_weights import Weights, columns_for, each_format, each_product, widths_of
from decoded_blocks import assert_same_bits

from qmm.kernels.formats import FORMATS, Format
from qmm.kernels.ops.cpu import products as cpu


@each_product
def test_neighbours_change_no_bit(block_format: Format, activations: str, rng: np.random.Generator) -> None:
    m, k = 3, widths_of(block_format)[-1]
    weights = Weights.random(block_format, m, k, rng)
    x = weights.activations(columns_for(block_format, activations, [5])[0], rng)
    results = []
    for filler in (0x00, 0xFF, 0x7C):  # 0xFF: every float a NaN; 0x7C7C: float16 NaN, and large numbers elsewhere
        buffer = np.full(weights.data.size + 512, filler, np.uint8)
        buffer[256:-256] = weights.data
        beside = weights._replace(data=buffer[256:-256])
        results.append((beside.matmul(x[:1], activations), beside.matmul(x, activations), beside.dequantize()))
        assert np.all(buffer[:256] == filler)
        assert np.all(buffer[-256:] == filler)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


class Guarded:
    """Memory between two pages that must not be touched, from the start of its first page or to the end of its last."""

    def __init__(self, nbytes: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        inner = -(-nbytes // page) * page
        self.map = mmap.mmap(-1, inner + 2 * page)
        self.all = np.frombuffer(self.map, np.uint8)
        start = page + (inner - nbytes if at_end else 0)
        self.bytes = self.all[start : start + nbytes]
        libc = ctypes.CDLL(None, use_errno=True)
        for offset in (0, page + inner):
            address = ctypes.c_void_p(self.all.ctypes.data + offset)
            assert libc.mprotect(address, ctypes.c_size_t(page), 0) == 0, os.strerror(ctypes.get_errno())  # PROT_NONE

    def holding(self, array: np.ndarray) -> np.ndarray:
        """A copy of ``array`` in this memory, which must have its size."""
        self.bytes[:] = array.reshape(-1).view(np.uint8)
        return self.bytes.view(array.dtype).reshape(array.shape)


def guarded(array: np.ndarray, at_end: bool) -> np.ndarray:
    return Guarded(array.nbytes, at_end).holding(array)


@each_format
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_no_byte_is_touched_across_the_page(block_format: Format, at_end: bool, rng: np.random.Generator) -> None:
    """The weights, x and the results each lie against a page that faults; a fault ends a child, not the tests."""
    cases = []
    modes = ("f16",) if block_format.plain else ("f16", "int8")
    for k, m, n in itertools.product(widths_of(block_format)[:3], (1, 3), (1, 5)):
        weights = Weights.random(block_format, m, k, rng)
        x = weights.activations(n, rng)
        # Also compiles the kernels, which the child inherits.
        products = {mode: weights.matmul(x[: columns_for(block_format, mode, [n])[0]], mode) for mode in modes}
        cases.append((weights, x, products, weights.dequantize()))

    def child(say: Callable[[str], None]) -> None:
        for weights, x, products, dequantized in cases:
            m, k = weights.values.shape
            data = guarded(weights.data, at_end)
            for mode, expected in products.items():
                n = len(expected)
                say(f"{block_format.name} matmul {mode}, m={m}, k={k}, n={n}")
                x_there, out = guarded(x[:n], at_end), guarded(np.full_like(expected, np.nan), at_end)
                cpu.matmul(block_format, data.ctypes.data, m, k, x_there, out, mode)
                assert_same_bits(out, expected)
            say(f"{block_format.name} dequantize, m={m}, k={k}")
            out = guarded(np.full_like(dequantized, np.nan), at_end)
            cpu.dequantize(block_format, data.ctypes.data, m, k, out)
            assert_same_bits(out, dequantized)

    status, notes = in_child(child)
    assert status == 0, f"{outcome(status)} at: {notes}"


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
def test_a_byte_across_the_page_is_noticed(at_end: bool) -> None:
    """The test above can fail: a block that is said to begin one byte away from where it does."""
    data = np.zeros(34, np.uint8)
    out = np.zeros((1, 32), np.float32)
    cpu.dequantize(FORMATS["Q8_0"], data.ctypes.data, 1, 32, out)

    def child(say: Callable[[str], None]) -> None:
        say("the wrong byte")
        cpu.dequantize(FORMATS["Q8_0"], guarded(data, at_end).ctypes.data + (1 if at_end else -1), 1, 32, out)

    status, notes = in_child(child)
    assert (outcome(status), notes) == ("killed by SIGSEGV", "the wrong byte")


def in_child(work: Callable[[Callable[[str], None]], None]) -> tuple[int, str]:
    """Runs ``work`` in a fork of this process: its status, and what it said last or the exception that it raised."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: qmm's pool is made anew there
        process = os.fork()
    if process == 0:
        status = 1
        try:
            faulthandler.disable()  # pytest's: what a fault means is told by the parent
            work(lambda note: os.write(writer, f"\0{note}".encode()) and None)
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitpid(process, 0)[1], said.rpartition("\0")[2]


def outcome(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
