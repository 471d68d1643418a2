"""The source of a function that is specialized, and the globals of the flat function that becomes of it.

For :mod:`qmm.kernels.lang.specialize`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import tokenize
import types
from collections.abc import Callable
from typing import Any

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.folding import copied, read_name

__all__ = ["Literal", "Scope", "Source", "literal"]

Literal = (bool, int, float, str)


def literal(value: Any) -> Any:
    """A literal as Python writes it: NumPy's float64 and the members of an IntEnum are written otherwise."""
    return next((kind(value) for kind in Literal if isinstance(value, kind)), value)


class Source:
    """The source of a function: its syntax tree, the values of its names, and its lines."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__name__
        code = function.__code__
        place = f"{code.co_filename}, line {code.co_firstlineno}, in {self.name}"
        try:
            lines, self._first = inspect.getsourcelines(function)
            self._tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
        except (OSError, TypeError) as reason:
            raise SyntaxError(f"{place}: its source cannot be read; a kernel is a function in a file") from reason
        except (SyntaxError, IndexError, tokenize.TokenError) as reason:
            raise SyntaxError(f"{place}: a kernel is defined by def, in a file as it was imported") from reason
        if not isinstance(self._tree, ast.FunctionDef):
            raise SyntaxError(f"{place}: a kernel is defined by def")
        if self._tree.name != code.co_name:
            raise SyntaxError(
                f"{place}: there is {self._tree.name} instead: the file has changed since it was imported, or a "
                "decorator has put another function in its place"
            )
        closure = inspect.getclosurevars(function)
        arguments = self._tree.args
        self.parameters = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        self.arguments = [argument.arg for argument in ast.walk(arguments) if isinstance(argument, ast.arg)]
        self.assigned = {
            node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        visible: dict[str, Any] = {**closure.globals, **closure.nonlocals, **closure.builtins}
        # getclosurevars takes an attribute's name for a global's, even where a variable has it.
        own = {*self.assigned, *self.arguments}
        self.visible = {name: value for name, value in visible.items() if name not in own}

    @functools.cached_property
    def outlasting(self) -> set[str | None]:
        """Names that are read outside of the loops over them, so that the last value of such a loop counts."""
        inside: set[ast.AST] = set()
        for loop in [node for node in ast.walk(self._tree) if isinstance(node, ast.For)]:
            within = [node for statement in loop.body for node in ast.walk(statement)]
            over = ast.unparse(loop.target)
            if not any(isinstance(node, ast.For) and ast.unparse(node.target) == over for node in within):
                inside |= {node for node in within if read_name(node) == over}
        return {read_name(node) for node in ast.walk(self._tree) if node not in inside}

    def definition(self) -> ast.FunctionDef:
        """A copy of the tree, without annotations and decorators."""
        definition: ast.FunctionDef = copied(self._tree)
        definition.decorator_list, definition.returns = [], None
        for argument in ast.walk(definition.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return definition

    def set_defaults(self, definition: ast.FunctionDef, scope: Scope) -> None:
        """Replace the defaults of a :meth:`definition` by their values: their names are not the flat function's."""

        def written(value: Any) -> ast.expr:
            plain = isinstance(value, (*Literal, types.NoneType))
            return ast.Constant(literal(value)) if plain else ast.Name(scope.name_of("default", value), ast.Load())

        own = self.function.__kwdefaults__ or {}
        definition.args.defaults = [written(value) for value in self.function.__defaults__ or ()]
        definition.args.kw_defaults = [
            written(own[argument.arg]) if argument.arg in own else None for argument in definition.args.kwonlyargs
        ]

    def refuse(self, node: ast.AST, found: bool, what: str) -> None:
        """Reject code whose meaning specialization would change."""
        if found:
            line = self.line_of(node)
            place = f"{self.function.__code__.co_filename}, line {line}, in {self.name}"
            raise SyntaxError(f"{place}: specialize cannot write out {what}")

    def line_of(self, node: ast.AST) -> int:
        """Its line in the function's file."""
        return self._first + getattr(node, "lineno", 1) - 1


class Scope:
    """The globals of the flat function, inlined helpers' included."""

    def __init__(self, constants: Constants, absent_masks: frozenset[str]) -> None:
        self.constants = constants
        self.absent_masks = absent_masks
        self.used: dict[str, Any] = {}
        self._inlined: dict[str, int] = {}

    def name_of(self, name: str, value: Any) -> str:
        """A name for a global: the given one unless it is taken."""
        chosen, number = name, 0
        while chosen in self.used and self.used[chosen] is not value:
            number += 1
            chosen = f"{name}_{number}"
        self.used[chosen] = value
        return chosen

    def prefix_of(self, helper: str) -> str:
        """The prefix of the variables of one inlined call."""
        self._inlined[helper] = self._inlined.get(helper, 0) + 1
        return f"{helper}_{self._inlined[helper]}_"
