"""The description of a GPU kernel: everything that its machine code depends on.

Its parameters are those of its Python function, whose signature is the only list of them; launches name them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.fields import FieldAccess

__all__ = ["Kernel"]

MOST_THREADS = 1024
"""Threads of the largest CTA."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function for the GPU with its compile-time constants. Every parameter is an int64: an address or a number.

    Attributes:
        name: for messages and for the cache.
        function: the kernel, as plain Python.
        constants: its compile-time constants.
        threads: of a CTA.
        fields: how it reads block fields; None if it reads none. One that does is not compiled without.
        shared: whether launches ask for dynamic shared memory, as much as the device has for a CTA if need be.

    Raises:
        ValueError: a CTA cannot have so many threads.
    """

    name: str
    function: Callable[..., None]
    constants: Constants
    threads: int
    fields: FieldAccess | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if not 32 <= self.threads <= MOST_THREADS or self.threads % 32:
            raise ValueError(
                f"{self.name}: threads = {self.threads}; a CTA has whole warps, so a multiple of 32 from 32 to "
                f"{MOST_THREADS}"
            )

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters, in the order that its machine code has them."""
        return tuple(inspect.signature(self.function).parameters)

    def check(self, names: Iterable[str]) -> None:
        """Check that these are the names of its parameters.

        Raises:
            TypeError: one is missing or unknown.
        """
        given, wanted = set(names), set(self.parameters)
        if given != wanted:
            missing, unknown = (", ".join(sorted(some)) or "none" for some in (wanted - given, given - wanted))
            place = f"{self.function.__code__.co_filename}, line {self.function.__code__.co_firstlineno}"
            raise TypeError(f"{self.name} ({place}): arguments that are missing: {missing}; unknown: {unknown}")

    def described(self) -> dict[str, Any]:
        """What its machine code depends on, apart from the source of this package."""
        return {
            "function": self.function,
            "constants": self.constants.described(),
            "threads": self.threads,
            "fields": self.fields,
        }
