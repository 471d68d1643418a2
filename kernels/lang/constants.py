"""Compile-time constants: an object with documented fields that a kernel is specialized with.

A kernel reads them from a placeholder, by convention named ``c``::

    @dataclass(frozen=True)
    class Sizes(Constants):
        COLUMNS: int
        \"\"\"Columns that a kernel multiplies at once.\"\"\"

    c = Sizes.placeholder()

    def kernel(x, y):
        for column in unroll(c.COLUMNS): ...

    specialize(kernel, Sizes(COLUMNS=4), target)

Numbers become literals of the compiled kernel, functions are specialized and called. So editors and type checkers know
the fields that a kernel may read, and a missing field is an error when the kernel is described.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

__all__ = ["Constants"]


@dataclasses.dataclass(frozen=True)
class Constants:
    """The base of all sets of compile-time constants; subclasses are frozen dataclasses."""

    @classmethod
    def placeholder(cls) -> Self:
        """The object that kernels read; :func:`qmm.kernels.lang.specialize.specialize` replaces its fields by
        values."""
        return object.__new__(cls)

    def __getattr__(self, name: str) -> Any:
        # Called for a field of a placeholder, and for names that are not fields.
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"{type(self).__name__}.{name} has a value only in a specialized kernel")

    def value(self, name: str) -> Any:
        """The constant of that name.

        Raises:
            AttributeError: there is none.
        """
        if name not in vars(self):
            raise AttributeError(f"there is no constant {name}; there are {', '.join(vars(self)) or 'none'}")
        return vars(self)[name]

    def described(self) -> dict[str, Any]:
        """All constants by name, as in a kernel's cache key."""
        return dict(vars(self))
