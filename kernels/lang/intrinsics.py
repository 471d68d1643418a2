"""The language's values as Numba types, and its operations as Numba intrinsics.

Numba for the CPU and numba-cuda keep separate registries of types and operators, so everything here works on a
:class:`Toolkit`, the handful of names that a registration needs from either.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from llvmlite import ir

from qmm.kernels.lang.emitter import CARRIERS, I32, Emitter
from qmm.kernels.lang.fields import FieldAccess
from qmm.kernels.lang.operation import Operation

__all__ = ["Intrinsics", "Toolkit"]

OPERATORS = {
    operator.and_: "and_",
    operator.or_: "or_",
    operator.xor: "xor",
    operator.lshift: "shl",
    operator.rshift: "lshr",
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
}


@dataclass(frozen=True)
class Toolkit:
    """The extension points of one Numba target."""

    types: ModuleType
    intrinsic: Callable[..., Any]
    lower_builtin: Callable[..., Any]
    register_model: Callable[..., Any]
    primitive_model: type
    abstract_template: type
    infer_global: Callable[..., Any]
    signature: Callable[..., Any]
    require_literal: type[Exception]


class Intrinsics:
    """The language's types, operators and operations, registered with one target's compiler."""

    def __init__(self, target: str, toolkit: Toolkit) -> None:
        """Register types and operators.

        Args:
            target: the name by which operations have their lowering.
            toolkit: the target's.
        """
        self.target = target
        self._toolkit = toolkit
        numba_types = toolkit.types
        self._types = {"int64": numba_types.int64, "float32": numba_types.float32, "None": numba_types.void}
        self._types |= _registered_types(toolkit)
        _register_operators(toolkit, self._types["Word"], self._types["Words"])
        self._defined: dict[tuple[Operation, FieldAccess], Any] = {}

    def of(self, operation: Operation, fields: FieldAccess) -> Any:
        """The intrinsic of an operation, one for each way to read block fields.

        Raises:
            TypeError: the target has no such operation.
        """
        key = operation, fields
        if key not in self._defined:
            if self.target not in operation.lowerings:
                raise TypeError(f"{operation} has no lowering for the target {self.target!r}")
            self._defined[key] = self._intrinsic(operation, fields)
        return self._defined[key]

    def _intrinsic(self, operation: Operation, fields: FieldAccess) -> Any:
        lowering = operation.lowerings[self.target]

        def define(typing_context: Any, *given: Any) -> Any:
            literals = self._literals(operation, given)
            kinds = [self._argument(kind, value) for kind, value in zip(operation.arguments, given, strict=True)]
            count = operation.count(literals)
            result = self._types[operation.result] if count is None else self._tuple(count)

            def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                values = [literals.get(*pair) for pair in zip(operation.parameters, arguments, strict=True)]
                for i, kind in enumerate(kinds):
                    if isinstance(kind, self._toolkit.types.UniTuple):
                        values[i] = [builder.extract_value(values[i], j) for j in range(kind.count)]
                value = lowering(Emitter(builder, fields), *values)
                if count is not None:
                    return context.make_tuple(builder, signature.return_type, value)
                return context.get_dummy_value() if value is None else value

            return result(*kinds), lower

        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("typing_context", *operation.parameters)
        ]
        define.__name__ = define.__qualname__ = operation.name
        define.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return self._toolkit.intrinsic(define)

    def _literals(self, operation: Operation, given: tuple[Any, ...]) -> dict[str, Any]:
        """The constants among the arguments of a call, by parameter."""
        found = {}
        for i in operation.literals():
            if not isinstance(given[i], self._toolkit.types.Literal):
                raise self._toolkit.require_literal(f"{operation.name}: {operation.parameters[i]} must be a constant")
            found[operation.parameters[i]] = given[i].literal_value
        return found

    def _argument(self, kind: str, given: Any) -> Any:
        """The Numba type of an argument, from its declared and its given type."""
        if kind == "literal":
            return given
        if kind.startswith("float32["):
            return self._tuple(int(kind[8:-1]))
        possible = [self._types[name] for name in kind.split(" | ")]
        return given if given in possible else possible[0]

    def _tuple(self, count: int) -> Any:
        return self._toolkit.types.UniTuple(self._types["float32"], count)


def _registered_types(toolkit: Toolkit) -> dict[str, Any]:
    class Register(toolkit.types.Type):  # type: ignore[name-defined]
        def __init__(self, name: str, carrier: ir.Type) -> None:
            self.carrier = carrier
            super().__init__(name)

    @toolkit.register_model(Register)
    class _RegisterModel(toolkit.primitive_model):  # type: ignore[name-defined]
        def __init__(self, manager: Any, register: Any) -> None:
            super().__init__(manager, register, register.carrier)

    return {name: Register(name, carrier) for name, carrier in CARRIERS.items()}


def _register_operators(toolkit: Toolkit, word: Any, words: Any) -> None:
    integer = toolkit.types.Integer
    register = type(word)
    for function, instruction in OPERATORS.items():

        class Template(toolkit.abstract_template):  # type: ignore[name-defined]
            def generic(self, arguments: Any, keywords: Any) -> Any:
                left, right = arguments
                if left in (word, words):
                    if right in (left, word):
                        return toolkit.signature(left, left, right)
                    if isinstance(right, integer):
                        return toolkit.signature(left, left, toolkit.types.int64)
                return None

        toolkit.infer_global(function)(Template)

        def lower(context: Any, builder: Any, signature: Any, arguments: Any, instruction: str = instruction) -> Any:
            left, right = arguments
            if signature.args[1] == toolkit.types.int64:
                right = builder.trunc(right, I32)
            if right.type != left.type:
                right = Emitter(builder).splat(right, 4)
            return getattr(builder, instruction)(left, right)

        toolkit.lower_builtin(function, register, register)(lower)
        toolkit.lower_builtin(function, register, integer)(lower)
