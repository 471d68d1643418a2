"""The operations of :mod:`qmm.kernels.lang.ptx` and :mod:`qmm.kernels.lang.targets.cuda` in Python, for one lane of
:mod:`lanes_machine`; each has the name and the meaning of its twin.

Numbers are Python's own integers, ``np.float32``, and the values of :mod:`qmm.kernels.lang.primitives`, whose functions
are taken as they stand where they do not read memory. Two operations round differently from a GPU, in the last bit:
:func:`fused` sums in float64 before it rounds to float32 (a tie of 2**-29 may fall the other way), and
:func:`dot_floats` and :func:`dot_short` sum in another order.
"""

from __future__ import annotations

import struct
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from greenlet import getcurrent
from lanes_machine import SHARED_WINDOW, Copy, Delivery, LaneError, meet, together

from qmm.kernels.lang import primitives, ptx

__all__ = ["MAKERS", "TWINS", "LaneTarget"]

TWINS: dict[str, Callable[..., Any]] = {}
"""The twins of the operations of ptx.py, by name."""
MAKERS: dict[str, Callable[..., Callable[..., Any]]] = {}
"""Those of its functions that make an operation of numbers."""

float32, uint32, from_buffer = np.float32, np.uint32, np.frombuffer
unpack_float, pack_float, pack_word = (
    struct.Struct("<f").unpack_from,
    struct.Struct("<f").pack,
    struct.Struct("<I").pack,
)


def twin(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the twin of the operation of the same name."""
    TWINS[function.__name__] = function
    return function


def twin_of_warp(instruction: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    """Makes the twin of the operation of the same name, of what the whole warp does: from the arguments of the 32 lanes
    to their 32 results."""

    def operation(*arguments: Any) -> Any:
        return together(instruction, *arguments)

    TWINS[instruction.__name__] = operation
    return operation


def maker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the twin of a function that makes operations."""
    MAKERS[function.__name__] = function
    return function


def here() -> Any:
    """The block of the lane whose turn it is."""
    return getcurrent().block  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------------------
# Where a thread is
# ---------------------------------------------------------------------------------------------------------------------


@twin
def lane_index():
    return getcurrent().index


@twin
def thread_index():
    return getcurrent().thread


@twin
def block_index():
    return here().index


@twin
def block_count():
    return here().count


@twin
def shared_memory():
    return SHARED_WINDOW


# ---------------------------------------------------------------------------------------------------------------------
# Copies and barriers
# ---------------------------------------------------------------------------------------------------------------------


@twin
def copy16(target, source):
    lane = getcurrent()
    lane.loose.append(lane.block.start_copy(target, source, 16))


def edge_copier(nbytes):
    def copy_edge(target, source):
        block = here()
        data, at = block.memory.read(source, nbytes, nbytes)
        block.write(target, data[at : at + nbytes], nbytes)

    return copy_edge


TWINS |= {f"copy_edge{nbytes}": edge_copier(nbytes) for nbytes in (1, 2, 4)}


@twin
def bulk_copy(target, source, nbytes, barrier):
    block = here()
    copy = block.start_copy(target, source, nbytes)
    block.deliver(Delivery([copy], block.barrier(barrier), nbytes))


@twin
def prefetch(source, nbytes):
    """Whether it is brought into a cache makes no difference here; where it lies does."""
    if nbytes <= 0 or nbytes & 15 or source & 15:
        raise LaneError(f"{nbytes} bytes at {source:#x} are to be brought into L2: both must be multiples of 16")
    block = here()
    region = block.memory.find(source, nbytes)
    start = source - region.start
    region.brought[start : start + nbytes] = b"\1" * nbytes


@twin
def arrive_after_copies(barrier):
    lane = getcurrent()
    copies: list[Copy] = lane.loose
    lane.loose = []
    lane.block.deliver(Delivery(copies, lane.block.barrier(barrier), 0, lane))


@twin
def initialize_barrier(barrier, expected):
    here().initialize(barrier, expected)


@twin
def arrive(barrier):
    block = here()
    block.arrive(block.barrier(barrier))


@twin
def expect(barrier, nbytes):
    block = here()
    block.expect(block.barrier(barrier), nbytes)


@maker
def waiter(bulk):
    def wait(barrier, parity):
        here().wait(barrier, parity)

    return wait


@maker
def fence(bulk):
    def fence_barriers():
        """Barriers are seen at once here."""

    return fence_barriers


@maker
def barrier_arrive(number, threads):
    def arrive_at_barrier():
        meet(number, threads, False)

    return arrive_at_barrier


@maker
def barrier_wait(number, threads):
    def wait_at_barrier():
        meet(number, threads, True)

    return wait_at_barrier


@twin
def synchronize_block():
    meet(0, 0, True)


@twin
def launch_dependents():
    """The next kernel starts when this one has ended, which is allowed."""


@twin
def wait_for_predecessors():
    lane = getcurrent()
    lane.settled = lane.settled or "predecessors" not in lane.block.settings.faults


@twin
def synchronize_warp():
    together(_synchronize_warp)


def _synchronize_warp(arguments):
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Shared memory
# ---------------------------------------------------------------------------------------------------------------------


@twin
def load_shared16(address):
    block = here()
    return from_buffer(block.shared, uint32, 4, block.read(address, 16, 16)).copy()


@twin
def load_shared_float(address):
    block = here()
    return float32(unpack_float(block.shared, block.read(address, 4, 4))[0])


@maker
def shared_floats(count):
    nbytes = 4 * min(4, count)

    def load_shared_floats(address):
        block = here()
        values = []
        for start in range(0, 4 * count, nbytes):
            values.extend(from_buffer(block.shared, float32, nbytes // 4, block.read(address + start, nbytes, nbytes)))
        return tuple(values)

    return load_shared_floats


@twin
def store_shared16(address, words):
    here().write(address, words.tobytes(), 16)


@twin
def store_shared_float(address, value):
    here().write(address, pack_float(value), 4)


@twin
def store_shared_word(address, word):
    here().write(address, pack_word(int(word)), 4)


def field_loads(alignment: int) -> dict[Any, Callable[..., Any]]:
    """Loads of fields of blocks that keep to an alignment, by the primitive. They read aligned words around a field
    where that needs it: those must lie in shared memory too, whatever is in them."""

    def load16(address, offset):
        block = here()
        address += offset
        if alignment >= 4:
            at = block.look(address, 16, 16 if alignment >= 16 else 4)
        else:
            block.place(address & -4, 20, 4)
            at = block.look(address, 16, 1)
        return from_buffer(block.shared, uint32, 4, at).copy()

    def load4(address, offset):
        block = here()
        address += offset
        if alignment >= 4:
            at = block.look(address, 4, 4)
        else:
            block.place(address & -4, 8, 4)
            at = block.look(address, 4, 1)
        return uint32(int.from_bytes(block.shared[at : at + 4], "little"))

    def load2(address, offset):
        block = here()
        at = block.look(address + offset, 2, 2 if alignment >= 2 else 1)
        return uint32(int.from_bytes(block.shared[at : at + 2], "little"))

    def load1(address, offset):
        block = here()
        return uint32(block.shared[block.look(address + offset, 1, 1)])

    return {
        primitives.load16: load16,
        primitives.load4: load4,
        primitives.load2: load2,
        primitives.load1: load1,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Global memory
# ---------------------------------------------------------------------------------------------------------------------


@twin
def load_cached16(address):
    data, at = here().memory.read(address, 16, 16)
    return from_buffer(data, uint32, 4, at).copy()


TWINS["load_past16"] = TWINS["load_past_l1"] = load_cached16


@maker
def cached_floats(count):
    nbytes = 4 * min(4, count)

    def load_cached_floats(address):
        memory = here().memory
        values = []
        for start in range(0, 4 * count, nbytes):
            data, at = memory.read(address + start, nbytes, nbytes)
            values.extend(from_buffer(data, float32, nbytes // 4, at))
        return tuple(values)

    return load_cached_floats


TWINS["load_past_floats"] = cached_floats(4)


@twin
def load_float(address):
    data, at = here().memory.read(address, 4, 4)
    return float32(unpack_float(data, at)[0])


@twin
def load_half(address):
    data, at = here().memory.read(address, 2, 2)
    return float32(from_buffer(data, np.float16, 1, at)[0])


@twin
def load_bfloat(address):
    data, at = here().memory.read(address, 2, 2)
    return uint32(int.from_bytes(data[at : at + 2], "little") << 16).view(float32)


@twin
def load_byte(address):
    data, at = here().memory.read(address, 1, 1)
    return data[at]


@twin
def store_float(address, value):
    here().memory.write(address, pack_float(value), 4)


@twin
def store_half(address, value):
    here().memory.write(address, np.float16(value).tobytes(), 2)


@twin
def store_bfloat(address, value):
    bits = int(float32(value).view(uint32))
    nan = bits & 0x7FFFFFFF > 0x7F800000
    rounded = 0x7FFF if nan else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF
    here().memory.write(address, rounded.to_bytes(2, "little"), 2)


@twin
def store_byte(address, value):
    here().memory.write(address, bytes([value & 0xFF]), 1)


@twin
def store_word(address, word):
    here().memory.write(address, pack_word(int(word)), 4)


@twin
def store_run(address, values):
    memory, content = here().memory, values.tobytes()
    for start in range(0, 64, 16):
        memory.write(address + start, content[start : start + 16], 16)


@twin
def store_part(address, values, count):
    memory, content = here().memory, values.tobytes()
    for start in range(0, 4 * max(0, min(16, count)), 4):
        memory.write(address + start, content[start : start + 4], 4)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


@twin
def zero_words():
    return np.zeros(4, uint32)


@twin
def scaled(values, scale):
    return values * scale


@twin
def fused(a, b, c):
    return float32(float(a) * float(b) + float(c))


@twin
def dot_floats(a, b):
    return np.dot(a, b)


@twin
def reciprocal(value):
    return float32(1) / value


@twin
def power_of_two_below(value):
    return uint32(min(int(value.view(uint32)) & 0x7F800000, 253 << 23)).view(float32)


@twin
def largest_of_values(a, b, c, d):
    bits = np.array([a, b, c, d], float32).view(uint32) & 0x7FFFFFFF
    return bits.max().view(float32)


def _rounded(value, factor):
    """The product, which float64 holds exactly, as a whole number, halves to even; of a NaN it is anything."""
    product = float(value) * float(factor)
    return round(product) if abs(product) < 1 << 22 else 0x55


@twin
def scaled_byte(value, factor):
    return ((_rounded(value, factor) + 128) & 0xFF) - 128


@twin
def two_halves(a, b):
    return uint32(int.from_bytes(np.array([a, b], np.float16).tobytes(), "little"))


@twin
def scaled_bytes(a, b, c, d, factor):
    low = [_rounded(value, factor) & 0xFF for value in (a, b, c, d)]
    return uint32(int.from_bytes(bytes(low), "little"))


# ---------------------------------------------------------------------------------------------------------------------
# Of a whole warp
# ---------------------------------------------------------------------------------------------------------------------


def _bytes_by_row(arguments, index):
    """The sixteen signed bytes that each lane brings: a row for each quad of lanes."""
    return np.array([lane[index] for lane in arguments], uint32).view(np.int8).reshape(8, 64).astype(np.int32)


def _by_lane(upper, lower):
    """Of two squares of eight rows by eight columns, lane ``4 g + t`` gets row g of both, columns ``2 t`` and
    ``2 t + 1``."""
    squares = np.concatenate([upper.reshape(32, 2), lower.reshape(32, 2)], axis=1)
    return [tuple(row) for row in squares]


@twin_of_warp
def dot_pair_more(arguments):
    dots = np.array([lane[3] for lane in arguments], float32).view(np.int32)
    a, b, x = (_bytes_by_row(arguments, index) for index in range(3))
    upper, lower = (dots[:, half].reshape(8, 8) for half in (slice(0, 2), slice(2, 4)))
    upper, lower = ((side @ x.T + dots).astype(np.int32).view(float32) for side, dots in ((a, upper), (b, lower)))
    return _by_lane(upper, lower)


@twin_of_warp
def dot_pair(arguments):
    a, b, x = (_bytes_by_row(arguments, index) for index in range(3))
    upper, lower = ((side @ x.T + ptx.MAGIC).astype(np.int32).view(float32) for side in (a, b))
    return _by_lane(upper, lower)


@twin_of_warp
def dot_short(arguments):
    sides = [np.array([lane[index] for lane in arguments], float32).reshape(8, 64) for index in range(3)]
    if any((side.view(uint32) & 0x1FFF).any() for side in sides):
        raise LaneError("the tensor cores' TF32 leaves out the last 13 bits of a number, of which some are not 0")
    totals = np.array([lane[3] for lane in arguments], float32)
    a, b, x = (side.astype(np.float64) for side in sides)
    upper = totals[:, :2].reshape(8, 8) + _products(a, x)
    lower = totals[:, 2:].reshape(8, 8) + _products(b, x)
    return _by_lane(upper.astype(float32), lower.astype(float32))


def _products(rows, columns):
    return np.einsum("rk,ck->rc", rows, columns)  # not a BLAS product, which may spread a NaN to other rows


@twin
def share(a, b, distance, upper):
    return together(_share, a, b, distance, upper != 0)


NEIGHBOURS = {distance: np.arange(32) ^ distance for distance in (1, 2, 4, 8, 16)}


def _share(arguments):
    a, b, distance, upper = zip(*arguments, strict=True)
    if len(set(distance)) > 1:
        raise LaneError(f"lanes of a warp share over different distances: {set(distance)}")
    a, b = np.array(a, float32), np.array(b, float32)
    sent = np.where(upper, a, b)
    return np.where(upper, b, a) + sent[NEIGHBOURS[distance[0]]]


@twin_of_warp
def sum_of_half_warp(arguments):
    return np.array(arguments).reshape(2, 16).sum(axis=1).repeat(16).tolist()


@twin_of_warp
def sum_of_warp(arguments):
    return [sum(value for (value,) in arguments)] * 32


def _sum_of_words(arguments, lanes):
    sums = np.array(arguments, uint32).view(np.int8).reshape(-1, 4 * lanes).sum(axis=1, dtype=np.int32)
    return sums.astype(float32).repeat(lanes)


@twin_of_warp
def sum_of_four_words(arguments):
    return _sum_of_words(arguments, 4)


@twin_of_warp
def sum_of_eight_words(arguments):
    return _sum_of_words(arguments, 8)


def _largest(arguments, lanes):
    bits = np.array(arguments, float32).view(uint32) & 0x7FFFFFFF
    return bits.reshape(-1, lanes).max(axis=1).view(float32).repeat(lanes)


@twin_of_warp
def largest_of_warp(arguments):
    return _largest(arguments, 32)


@twin_of_warp
def largest_of_eight(arguments):
    return _largest(arguments, 8)


# ---------------------------------------------------------------------------------------------------------------------
# The target
# ---------------------------------------------------------------------------------------------------------------------


class LaneTarget:
    """Specializes kernels for :mod:`lanes_machine`, with block fields that keep to ``alignment`` bytes."""

    name = "lanes"

    def __init__(self, alignment: int) -> None:
        self._twins: dict[Any, Any] = {
            getattr(primitives, name): getattr(primitives, name) for name in primitives.__all__
        }
        self._twins |= field_loads(alignment)
        self._twins |= {getattr(ptx, name): function for name, function in TWINS.items()}

    def intrinsic(self, primitive: object) -> object | None:
        """The twin of an operation, or None for what is none.

        Raises:
            LaneError: it is one, but has no twin.
        """
        found = self._twins.get(primitive)
        if found is not None:
            return found
        if isinstance(primitive, types.FunctionType) and primitive.__module__ == __name__:
            return primitive  # what a constant of the kernel was resolved to
        if type(primitive) is type(ptx.arrive):
            names = [name for name, value in vars(ptx).items() if value is primitive]
            raise LaneError(f"ptx.{names[0] if names else primitive} has no twin in {__name__}")
        return None

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that kernels call."""
        return function

    @staticmethod
    def operation(value: Any) -> Any:
        """What a constant of a kernel stands for, as :func:`qmm.kernels.runtime.build.specialized` has it.

        Raises:
            LaneError: an operation has no twin.
        """
        if isinstance(value, str):
            if value not in TWINS:
                raise LaneError(f"ptx.{value} has no twin in {__name__}")
            return TWINS[value]
        if isinstance(value, tuple):
            name, *arguments = value
            if name not in MAKERS:
                raise LaneError(f"ptx.{name} has no twin in {__name__}")
            return MAKERS[name](*arguments)
        return value
