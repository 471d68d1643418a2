"""Turns a kernel written as plain Python into the flat function that Numba compiles for one target.

A kernel in this folder is ordinary Python: it calls operations (:mod:`qmm.kernels.lang.operation`), loops over
``unroll(...)`` and keeps its accumulators in ``registers(...)``. Run as it stands it is slow and exact, which is what
the tests want. A compiled kernel must have no loop over an accumulator and no list, or the accumulators live in memory
instead of registers. :func:`specialize` closes that gap on the syntax tree:

* names given in ``constants`` become literals (numbers, text) or bound globals (functions: a format's ``load``);
* ``for i in unroll(...)`` is written out once for each value;
* ``a = registers(count, value)`` becomes ``a_0 = value``, ``a_1 = value``, …, and ``a[i]`` the variable of that number;
* ``if`` and the conditional expression are decided where their test is known, so a variant that is switched off is not
  even typed;
* a float literal is a float32;
* every function that the kernel calls is specialized in turn, and every operation becomes the target's intrinsic.

The generated source is kept for tracebacks and for reading (``function.__source__``).
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

__all__ = ["Target", "registers", "specialize", "unroll"]

Literal = (bool, int, float, str)
_serial = itertools.count()


class Target(Protocol):
    """What :func:`specialize` needs to know of the machine that it prepares a kernel for."""

    name: str

    def intrinsic(self, primitive: object) -> object | None:
        """The target's implementation of a primitive, or None where ``primitive`` is not one."""

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a function that kernels call."""


def unroll(count: Iterable[int] | int) -> Iterable[int]:
    """Marks a loop to be written out; plain Python just walks it."""
    return range(count) if isinstance(count, int) else count


def registers(count: int, value: Any) -> list[Any]:
    """``count`` variables that start as ``value``; plain Python keeps them in a list."""
    return [value] * count


def specialize(function: Callable[..., Any], constants: Mapping[str, Any], target: Target) -> Callable[..., Any]:
    """A flat copy of ``function`` for ``target``, uncompiled, with ``constants`` bound (see the module's text).

    Functions that it calls are specialized with the same constants and compiled as device functions.
    """
    return _Specializer(constants, target).flatten(function)


class _Specializer:
    """One specialization: device functions are made once each, however often they are called."""

    def __init__(self, constants: Mapping[str, Any], target: Target) -> None:
        self.constants = constants
        self.target = target
        self.compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def flatten(self, function: Callable[..., Any]) -> Callable[..., Any]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        definition.decorator_list = []
        definition.returns = None
        arguments = {argument.arg for argument in ast.walk(definition.args) if isinstance(argument, ast.arg)}
        for argument in ast.walk(definition.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        known = {name: value for name, value in _visible(function).items() if name not in arguments}
        known |= {name: value for name, value in self.constants.items() if name not in arguments}
        literals = {name: value for name, value in known.items() if isinstance(value, Literal)}
        definition.body = _Flatten(literals).block(definition.body) or [ast.Pass()]
        _SingleFloats().visit(tree)
        source = ast.unparse(ast.fix_missing_locations(tree))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        namespace = {name: self.bind(value) for name, value in known.items() if name in names}
        namespace["float32"] = np.float32
        filename = f"<qmm {function.__module__}.{function.__name__} #{next(_serial)}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        exec(compile(source, filename, "exec"), namespace)
        flat = namespace[function.__name__]
        flat.__module__ = function.__module__
        flat.__source__ = source
        return flat

    def bind(self, value: Any) -> Any:
        """What a global name of the kernel stands for on the target."""
        try:
            intrinsic = self.target.intrinsic(value)
        except TypeError:  # unhashable: certainly no primitive
            return value
        if intrinsic is not None:
            return intrinsic
        if isinstance(value, types.FunctionType):
            if value not in self.compiled:
                self.compiled[value] = self.target.device_function(self.flatten(value))
            return self.compiled[value]
        return value


def _visible(function: Callable[..., Any]) -> dict[str, Any]:
    """The globals and closure variables of a function, by name."""
    closure = inspect.getclosurevars(function)
    return {**closure.globals, **closure.nonlocals, **closure.builtins}


class _Flatten(ast.NodeTransformer):
    """Writes out loops, registers and decided branches; ``literals`` are the names whose values are known."""

    def __init__(self, literals: Mapping[str, Any]) -> None:
        self.literals = dict(literals)
        self.banks: set[str] = set()

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        flat: list[ast.stmt] = []
        for statement in statements:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            flat.extend(self.statement(statement))
        return flat

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        if isinstance(node, ast.For):
            return self.loop(node)
        if isinstance(node, ast.If):
            test = self.visit(node.test)
            if isinstance(test, ast.Constant):
                return self.block(node.body if test.value else node.orelse)
            return [ast.If(test, self.block(node.body) or [ast.Pass()], self.block(node.orelse))]
        if isinstance(node, ast.While):
            _refuse(node, bool(node.orelse), "an else of a loop")
            return [ast.While(self.visit(node.test), self.block(node.body) or [ast.Pass()], [])]
        if isinstance(node, ast.Assign) and _called(node.value) == "registers":
            return self.bank(node)
        visited = self.visit(node)
        return [visited] if visited is not None else []

    def loop(self, node: ast.For) -> list[ast.stmt]:
        _refuse(node, bool(node.orelse), "an else of a loop")
        if _called(node.iter) != "unroll":
            return [ast.For(node.target, self.visit(node.iter), self.block(node.body), [], None)]
        assert isinstance(node.iter, ast.Call) and isinstance(node.target, ast.Name)
        leaves = any(isinstance(inner, ast.Break | ast.Continue) for inner in ast.walk(node))
        _refuse(node, leaves, "break or continue inside unroll")
        flat: list[ast.stmt] = []
        for value in unroll(self.evaluate(node.iter.args[0])):
            inner = _Flatten({**self.literals, node.target.id: value})
            inner.banks = self.banks
            # Each copy is parsed afresh: the transformer changes nodes in place.
            flat.extend(inner.block([_copy(statement) for statement in node.body]))
        return flat

    def bank(self, node: ast.Assign) -> list[ast.stmt]:
        (name,) = node.targets
        assert isinstance(name, ast.Name) and isinstance(node.value, ast.Call)
        count = self.evaluate(node.value.args[0])
        self.banks.add(name.id)
        value = self.visit(node.value.args[1])
        return [ast.Assign([ast.Name(f"{name.id}_{i}", ast.Store())], _copy(value), lineno=0) for i in range(count)]

    def evaluate(self, node: ast.expr) -> Any:
        """The value of an expression over literals, ``range``, ``min`` and ``max``; no other can be unrolled."""
        expression = ast.fix_missing_locations(ast.Expression(self.visit(_copy(node))))
        return eval(
            compile(expression, "<unroll>", "eval"), {"__builtins__": {}, "max": max, "min": min, "range": range}
        )

    def visit_Name(self, node: ast.Name) -> ast.expr:
        _refuse(node, isinstance(node.ctx, ast.Store) and node.id in self.literals, f"a new value for {node.id}")
        if isinstance(node.ctx, ast.Load) and node.id in self.literals:
            return ast.Constant(self.literals[node.id])
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self.banks:
            return ast.Name(f"{node.value.id}_{self.evaluate(node.slice)}", node.ctx)
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        return _fold(self.generic_visit(node))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        return _fold(self.generic_visit(node))

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        return _fold(self.generic_visit(node))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        visited = self.generic_visit(node)
        assert isinstance(visited, ast.BoolOp)
        decisive = isinstance(visited.op, ast.Or)
        open_values = []
        for value in visited.values:
            if isinstance(value, ast.Constant):
                if bool(value.value) == decisive:
                    return ast.Constant(decisive)
            else:
                open_values.append(value)
        if not open_values:
            return ast.Constant(not decisive)
        return open_values[0] if len(open_values) == 1 else ast.BoolOp(visited.op, open_values)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        test = self.visit(node.test)
        if isinstance(test, ast.Constant):
            return self.visit(node.body if test.value else node.orelse)
        return ast.IfExp(test, self.visit(node.body), self.visit(node.orelse))


class _SingleFloats(ast.NodeTransformer):
    """Makes every float literal a float32: to Numba a bare one is a double, and drags what it meets along."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, float):
            return ast.Call(ast.Name("float32", ast.Load()), [node], [])
        return node


def _refuse(node: ast.expr | ast.stmt, found: bool, what: str) -> None:
    """What flattening would silently give another meaning is an error."""
    if found:
        raise SyntaxError(f"line {node.lineno} of a kernel: specialize cannot write out {what}")


def _called(node: ast.expr) -> str | None:
    """The plain name that a call calls."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _copy(node: Any) -> Any:
    """A deep copy of a syntax tree."""
    if isinstance(node, ast.AST):
        return type(node)(**{name: _copy(value) for name, value in ast.iter_fields(node)})
    return [_copy(item) for item in node] if isinstance(node, list) else node


def _fold(node: Any) -> ast.expr:
    """The constant that an operation on constants makes."""
    if all(isinstance(leaf, ast.Constant) for leaf in ast.iter_child_nodes(node) if isinstance(leaf, ast.expr)):
        expression = ast.fix_missing_locations(ast.Expression(node))
        return ast.Constant(eval(compile(expression, "<fold>", "eval"), {"__builtins__": {}}))
    return node
