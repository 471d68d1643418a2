"""The emulator as a target, and :func:`emulate`, which runs a kernel."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.fields import FieldAccess
from qmm.kernels.lang.operation import Operation
from qmm.kernels.lang.specialize import specialize
from qmm.kernels.lang.targets.emulator.cta import CTA, Settings
from qmm.kernels.lang.targets.emulator.memory import Memory, Region

if TYPE_CHECKING:
    from qmm.kernels.runtime.kernel import Kernel

__all__ = ["EmulatorTarget", "emulate", "launch"]

USUAL = Settings()
NO_CONSTANTS = Constants()


class EmulatorTarget:
    """Specializes kernels for the emulator: operations are their meanings.

    Attributes:
        absent_masks: the masks to leave out.
    """

    name = "emulator"

    def __init__(self, absent_masks: frozenset[str] = frozenset()) -> None:
        self.absent_masks = absent_masks

    def intrinsic(self, value: object) -> object | None:
        """The meaning of an operation; None where ``value`` is not one.

        Raises:
            EmulatorError: GPUs do not have the operation.
        """
        return value.emulated() if isinstance(value, Operation) else None

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that kernels call."""
        return function


def emulate(
    kernel: Kernel | Callable[..., None],
    *,
    memory: Memory,
    grid: int = 1,
    threads: int | None = None,
    shared_nbytes: int = 0,
    fields: FieldAccess | None = None,
    constants: Constants | None = None,
    settings: Settings = USUAL,
    after_predecessors: bool = True,
    **arguments: Region | int,
) -> None:
    """Run a kernel lane by lane on the CPU, in memory that rejects wrong accesses which a GPU might not notice.

    Args:
        kernel: a :class:`qmm.kernels.runtime.kernel.Kernel`, which has its own threads, fields and constants; or a
            Python function over the operations of :mod:`qmm.kernels.lang`.
        memory: global memory, where the kernel finds its inputs and leaves its results.
        grid: how many CTAs; they run one after the other.
        threads: of a CTA, a multiple of 32; of a function 32 if not given.
        shared_nbytes: shared memory of a CTA.
        fields: the memory that blocks lie in, and the alignment of fields; None for a function that loads none.
        constants: what a function is specialized with.
        settings: how to run it.
        after_predecessors: as in :func:`launch`.
        arguments: the kernel's, by name: integers, or regions, which are passed as their address.

    Raises:
        EmulatorError: the kernel broke a rule; the message says which.
        TypeError: the arguments are not the kernel's, or the launch is invalid.

    A kernel that adds one to each byte, 32 at a time::

        >>> from qmm.kernels.lang.ptx.global_memory import load_global_byte, store_global_byte
        >>> from qmm.kernels.lang.ptx.grid import cta_index, lane_index
        >>> from qmm.kernels.lang.targets.emulator import Memory, emulate
        >>> def add_one(source, target, nbytes):
        ...     item = cta_index() * 32 + lane_index()
        ...     if item < nbytes:
        ...         store_global_byte(target + item, load_global_byte(source + item) + 1)
        >>> memory = Memory()
        >>> source = memory.add("source", bytes(range(40)), constant=True)
        >>> target = memory.add("target", 40)
        >>> emulate(add_one, memory=memory, grid=2, source=source, target=target, nbytes=40)
        >>> target.data == bytes(range(1, 41)), set(source.reads.tolist())
        (True, {1})

    Without the comparison, lane 8 of the second CTA would raise an EmulatorError that names the byte it reads.
    """
    if isinstance(kernel, types.FunctionType):
        given = _integers(kernel, arguments)
        flat = specialize(kernel, constants or NO_CONSTANTS, EmulatorTarget(settings.faults))
    else:
        kernel = cast("Kernel", kernel)
        if (threads, fields, constants) != (None, None, None):
            raise TypeError(f"{_named(kernel.function)}: threads, fields and constants are those of the Kernel")
        if shared_nbytes and not kernel.shared:
            raise TypeError(f"{_named(kernel.function)}: shared memory needs Kernel(..., shared=True)")
        threads, fields = kernel.threads, kernel.fields
        given = _integers(kernel.function, arguments)
        flat = _flat(kernel, settings.faults)
    launch(
        flat,
        given,
        memory=memory,
        grid=grid,
        threads=32 if threads is None else threads,
        shared_nbytes=shared_nbytes,
        fields=fields,
        settings=settings,
        after_predecessors=after_predecessors,
    )


def _integers(function: Callable[..., None], arguments: Mapping[str, Region | int]) -> dict[str, int]:
    """The arguments of a kernel, regions as their addresses.

    Raises:
        TypeError: they are not the kernel's, or neither integers nor regions.
    """
    given = {}
    for name, value in arguments.items():
        try:
            given[name] = value.start if isinstance(value, Region) else operator.index(value)
        except TypeError:
            kind = type(value).__name__
            raise TypeError(
                f"{_named(function)}: {name} must be an integer or a Region, not a {kind}: {value!r}"
            ) from None
    try:
        inspect.signature(function).bind(**given)
    except TypeError as reason:
        raise TypeError(f"{_named(function)}: {reason}") from None
    return given


@functools.lru_cache(maxsize=256)
def _flat(kernel: Kernel, faults: frozenset[str]) -> Callable[..., None]:
    """A kernel for the emulator, without the masks that are among the faults."""
    return specialize(kernel.function, kernel.constants, EmulatorTarget(faults))


def _named(kernel: Callable[..., None]) -> str:
    """A kernel and where it is, for messages."""
    return f"{kernel.__name__} ({kernel.__code__.co_filename}, line {kernel.__code__.co_firstlineno})"


def launch(
    function: Callable[..., None],
    arguments: Mapping[str, int],
    *,
    memory: Memory,
    grid: int,
    threads: int,
    shared_nbytes: int = 0,
    fields: FieldAccess | None = None,
    settings: Settings = USUAL,
    after_predecessors: bool = True,
) -> None:
    """Run a kernel that is specialized for an :class:`EmulatorTarget` already; see :func:`emulate`.

    Args:
        function: the kernel.
        arguments: its arguments by name.
        memory: global memory.
        grid: how many CTAs; they run one after the other.
        threads: of a CTA.
        shared_nbytes: shared memory of a CTA.
        fields: the memory that blocks lie in, and the alignment of fields; None for a kernel that loads none.
        settings: how to run it.
        after_predecessors: whether the kernels before had ended when this one starts. If not, lanes have to wait for
            them (``wait_for_predecessors``) before they use memory that is not constant.

    Raises:
        EmulatorError: the kernel broke a rule; the message says which.
        TypeError: the launch is invalid.
    """
    if threads < 32 or threads % 32 or threads > 1024:
        raise TypeError(f"a CTA has 32 to 1024 threads, whole warps of 32, not {threads}")
    if grid < 1:
        raise TypeError(f"a grid has at least one CTA, not {grid}")
    for index in range(grid):
        cta = CTA(memory, shared_nbytes, fields, index, grid, threads, after_predecessors, settings)
        cta.run(function, arguments)
