"""Operations of the kernels' language: their types, their meaning in Python, and their lowering on each target.

An operation is declared once, by its meaning::

    @operation("(float32, float32, float32) -> float32")
    def fma(a, b, c):
        \"\"\"``a * b + c``, rounded once.\"\"\"
        return np.float32(float(a) * float(b) + float(c))


    @fma.cuda
    def _(e, a, b, c):
        return e.ptx("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)

Called, it runs its meaning, in the emulator too. A compiled target turns it into an intrinsic of its
compiler when a kernel uses it. Declaring one imports no compiler: a lowering is a function of an
:class:`~qmm.kernels.lang.emitter.Emitter` and of LLVM values, and runs when a kernel is compiled.

========== =================================== ========================== =====================================
type       what it is                          in Python                  in LLVM
========== =================================== ========================== =====================================
int64      an integer, an address              ``int``                    ``i64``
float32                                        ``np.float32``             ``float``
Word       one 32-bit register                 ``np.uint32``              ``i32``
Words      sixteen bytes: four such registers  ``np.uint32`` array of 4   ``<4 x i32>``
Floats     the sixteen weights of a run        ``np.float32`` array of 16 ``<16 x float>``
Partial    eight sums, on the CPU              ``np.float32`` array of 8  ``<8 x float>``
float32[n] n numbers; n may be the name of a   ``tuple``                  lowerings get and give a list
           literal parameter
literal    a constant of the source            ``int`` or ``bool``        lowerings get the Python value
None       of a result: there is none          ``None``                   ``None``
========== =================================== ========================== =====================================

``Words | Floats`` stands for either. Word and Words know ``& | ^ << >> + - *`` with each other and with integers,
always modulo 2**32 and with logical shifts, four registers side by side for Words. Memory is little endian.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from qmm.errors import EmulatorError
from qmm.kernels.lang.current import cta_or_none, this_lane

__all__ = ["Operation", "operation"]

SCALARS = ("int64", "float32", "Word", "Words", "Floats", "Partial")
ARGUMENT = re.compile(rf"({'|'.join(SCALARS)})( \| ({'|'.join(SCALARS)}))*|literal|float32\[\d+\]")
RESULT = re.compile(rf"{'|'.join(SCALARS)}|None|float32\[\w+\]")
Lowering = Callable[..., Any]


class Operation:
    """One operation; see the module's docstring.

    Attributes:
        name: as kernels call it.
        meaning: the Python function, from one lane's arguments to its result.
        declaration: its types, as text.
        of_warp: whether the lanes of a warp do it together.
        parameters: the names of its arguments.
        arguments: their types.
        result: the result's type.
        lowerings: by the name of the target, ``"cuda"`` or ``"cpu"``; a target without a lowering does not
            have the operation.
    """

    def __init__(self, function: Callable[..., Any], declaration: str, of_warp: bool = False) -> None:
        """Use :func:`operation`.

        Raises:
            TypeError: the declaration cannot be read, or has other arguments than the function.
        """
        functools.update_wrapper(self, function)
        self.declaration = declaration
        self.of_warp = of_warp
        self.name = function.__name__
        self.parameters = tuple(inspect.signature(function).parameters)
        arguments, arrow, self.result = declaration.removeprefix("(").partition(") -> ")
        self.arguments = tuple(arguments.split(", ")) if arguments else ()
        readable = all(map(ARGUMENT.fullmatch, self.arguments)) and RESULT.fullmatch(self.result)
        if not (declaration.startswith("(") and arrow and readable and len(self.arguments) == len(self.parameters)):
            raise TypeError(f"{self.name}({', '.join(self.parameters)}) cannot be declared as {declaration!r}")
        self.meaning = self._together(function) if of_warp else function
        self.lowerings: dict[str, Lowering] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Run its meaning."""
        return (self.meaning if cta_or_none() is None else self.emulated())(*arguments)

    def __repr__(self) -> str:
        return f"<operation {self.name}({', '.join(self.arguments)}) -> {self.result}>"

    def cuda(self, lowering: Lowering) -> None:
        """Attach the lowering for GPUs, ``lowering(emitter, *values)``; a decorator."""
        self.lowerings["cuda"] = lowering

    def cpu(self, lowering: Lowering) -> None:
        """Attach the lowering for the CPU."""
        self.lowerings["cpu"] = lowering

    def llvm(self, lowering: Lowering) -> None:
        """Attach a lowering that is the same everywhere."""
        self.cuda(lowering)
        self.cpu(lowering)

    def emulated(self) -> Callable[..., Any]:
        """The meaning, for the emulator.

        Raises:
            EmulatorError: GPUs do not have the operation. One of the CPU would take the emulator's addresses for this
                process's.
        """
        if "cuda" not in self.lowerings:
            raise EmulatorError(
                f"{self} of {self.__module__} has no lowering for GPUs (.cuda or .llvm): the emulator of one cannot "
                "run it"
            )
        return self.meaning

    def literals(self) -> tuple[int, ...]:
        """Which arguments must be constants of the source."""
        return tuple(i for i, kind in enumerate(self.arguments) if kind == "literal")

    def count(self, literals: dict[str, Any]) -> int | None:
        """How many numbers the result has, or None where it is not a tuple; ``literals`` by parameter."""
        found = re.fullmatch(r"float32\[(\w+)\]", self.result)
        if found is None:
            return None
        return int(found[1]) if found[1].isdecimal() else int(literals[found[1]])

    def _together(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The meaning for one lane, from a function of all 32 lanes."""
        literals = self.literals()

        def meaning(*arguments: Any) -> Any:
            return this_lane().together(function, literals, arguments)

        return functools.update_wrapper(meaning, function)


def operation(declaration: str, *, of_warp: bool = False) -> Callable[[Callable[..., Any]], Operation]:
    """Declare an operation by its meaning; a decorator.

    Args:
        declaration: the types, as ``"(int64, literal) -> float32[count]"``.
        of_warp: whether the 32 lanes of a warp do it together. The function then gets a list of 32 for each argument,
            but literals as they are, and returns the results of the 32 lanes, or None.
    """
    return lambda function: Operation(function, declaration, of_warp)
