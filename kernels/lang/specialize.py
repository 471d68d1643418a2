"""Turns a kernel written as plain Python into the flat function that Numba compiles for one target.

A kernel in this package is ordinary Python: it calls operations (:mod:`qmm.kernels.lang`), reads compile-time constants
from a namespace (:mod:`qmm.kernels.lang.constants`), loops over ``unroll(...)`` and keeps its accumulators in
``registers(...)``. As plain Python it is slow and exact, as tests and the emulator need it. A compiled kernel must have
no loop over an accumulator and no list: else accumulators are in memory, not in registers. :func:`specialize`
transforms the syntax tree:

* ``c.NAME`` becomes a literal (a number, text) or a global (a function, such as a format's ``load``);
* ``for i in unroll(...)`` is unrolled, once for each value;
* ``a = registers(count, value)`` becomes ``a_0 = value``, ``a_1 = value``, …, and ``a[i]`` the variable of that number;
* a helper that is given registers is inlined, so that it works on the caller's variables;
* ``if`` and the conditional expression are decided where their test is known, so a disabled variant is not even typed;
* a mask (:mod:`qmm.kernels.lang.masks`) is its value, or the value without it if the target leaves it out;
* a float literal is a float32;
* every other function that the kernel calls is specialized in turn, and every operation becomes the target's intrinsic,
  whether by its name or by a module's (``primitives.half``).

The generated source is kept for tracebacks and for reading (``function.__source__``).
"""

from __future__ import annotations

import ast
import itertools
import linecache
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.folding import Folding, SingleFloats, acts, copied, outcome, truth
from qmm.kernels.lang.masks import mask
from qmm.kernels.lang.operation import Operation
from qmm.kernels.lang.source import Literal, Scope, Source, literal

__all__ = ["Target", "registers", "specialize", "unroll"]

Inside = (ast.Lambda, ast.FunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
"""What has variables of its own."""
COMPILERS_OWN = ("math", "numba", "numpy", "operator")
"""Modules whose functions compilers know, so that their names stay as they are."""
_serial = itertools.count()


class Target(Protocol):
    """The target of :func:`specialize`."""

    name: str
    absent_masks: frozenset[str]
    """The names of masks to leave out: none, except in tests that show that their absence is noticed."""

    def intrinsic(self, primitive: object) -> object | None:
        """The target's implementation of an operation, or None where ``primitive`` is not one."""

    def device_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a function that kernels call."""


def unroll(count: Iterable[int] | int) -> Iterable[int]:
    """Marks a loop to be unrolled; in plain Python it is an ordinary loop."""
    return range(count) if isinstance(count, int | np.integer) else count


def registers(count: int, value: Any) -> list[Any]:
    """``count`` variables that start as ``value``; a list in plain Python.

    ``value`` is a number or the like: compiled, it is evaluated once for each of them, in plain Python once for all.
    Their indices must be known when a kernel is compiled. Helpers to which they are passed are inlined: such a call is
    a statement, or the whole right side of an assignment, and the helper returns at its end only.
    """
    return [value] * count


def specialize(function: Callable[..., Any], constants: Constants, target: Target) -> Callable[..., Any]:
    """A flat copy of ``function`` for ``target``, uncompiled, with ``constants`` bound (see the module's docstring).

    Functions that it calls are specialized with the same constants and compiled as device functions.

    Args:
        function: a kernel; its source is read from its file.
        constants: values for every ``c.NAME`` that it, or a function that it calls, reads.
        target: the target.

    Raises:
        SyntaxError: something in it cannot be specialized; the message names the file and the line.
        AttributeError: it reads a constant that ``constants`` does not have.
    """
    return _Specializer(constants, target).flatten(function)


class _Specializer:
    """One specialization, in which each device function is compiled once."""

    def __init__(self, constants: Constants, target: Target) -> None:
        self.constants = constants
        self.target = target
        self.compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.open: list[Callable[..., Any]] = []

    def flatten(self, function: Callable[..., Any]) -> Callable[..., Any]:
        scope = Scope(self.constants, self.target.absent_masks)
        source_of = Source(function)
        definition = source_of.definition()
        source_of.set_defaults(definition, scope)
        names = {name: name for name in source_of.arguments}
        definition.body = _Flatten(scope, source_of, names).block(definition.body) or [ast.Pass()]
        tree = ast.Module([definition], [])
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        variables = {*stored, *source_of.arguments}
        for name in sorted(scope.used.keys() & variables):
            source_of.refuse(definition, True, f"{name}, both a variable and a global or a constant")
        single = "float32"
        while single in variables or scope.used.get(single, np.float32) is not np.float32:
            single += "_"
        SingleFloats(single).visit(tree)
        source = ast.unparse(ast.fix_missing_locations(tree))
        self.open.append(function)
        namespace = {name: self.bind(value) for name, value in scope.used.items()}
        self.open.pop()
        namespace[single] = np.float32
        filename = f"<qmm {function.__module__}.{function.__name__} #{next(_serial)}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        exec(compile(source, filename, "exec"), namespace)
        flat = namespace[definition.name]
        flat.__module__ = function.__module__
        flat.__source__ = source
        return flat

    def bind(self, value: Any) -> Any:
        """The target's value of a global name of the kernel."""
        try:
            hash(value)
        except TypeError:  # certainly no operation
            return value
        intrinsic = self.target.intrinsic(value)
        if intrinsic is not None:
            return intrinsic
        if isinstance(value, types.FunctionType):
            if value not in self.compiled:
                if value in self.open:
                    code = value.__code__
                    place = f"{code.co_filename}, line {code.co_firstlineno}, in {value.__name__}"
                    raise SyntaxError(f"{place}: it calls itself, which a compiled kernel cannot")
                self.compiled[value] = self.target.device_function(self.flatten(value))
            return self.compiled[value]
        return value


class _Flatten(Folding, ast.NodeTransformer):
    """Unrolls loops, and resolves registers, helpers and decided branches, of one function.

    Attributes:
        names: the function's own variables, and what they are called in the flat function.
        literals: variables whose values are known.
        banks: variables that are registers, and what these are called, one by one.
    """

    def __init__(self, scope: Scope, source: Source, names: dict[str, str], prefix: str = "") -> None:
        self.scope, self.source, self.prefix = scope, source, prefix
        self.names = names
        self.literals: dict[str, Any] = {}
        self.banks: dict[str, list[str]] = {}
        self.active: tuple[Callable[..., Any], ...] = (source.function,)
        for name, value in source.visible.items():
            if name not in names and isinstance(value, Literal):
                self.literals[name] = literal(value)

    # Statements -------------------------------------------------------------------------------------------------------

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
            test = truth(self.visit(node.test))
            known = outcome(test)
            if known is not None:
                calls: list[ast.stmt] = [ast.If(test, [ast.Pass()], [])] if acts(test) else []
                return calls + self.block(node.body if known else node.orelse)
            return [ast.If(test, self.block(node.body) or [ast.Pass()], self.block(node.orelse))]
        if isinstance(node, ast.While):
            self.refuse(node, bool(node.orelse), "an else of a loop")
            return [ast.While(truth(self.visit(node.test)), self.block(node.body) or [ast.Pass()], [])]
        if isinstance(node, ast.Assign) and self.called(node.value) is registers:
            return self.bank(node)
        if isinstance(node, ast.Assign | ast.Expr) and isinstance(node.value, ast.Call):
            helper = self.helper(node.value)
            if helper is not None:
                return self.inline(node, node.value, helper)
        visited = self.visit(node)
        return [visited] if visited is not None else []

    def loop(self, node: ast.For) -> list[ast.stmt]:
        self.refuse(node, bool(node.orelse), "an else of a loop")
        if self.called(node.iter) is not unroll:
            return [ast.For(self.visit(node.target), self.visit(node.iter), self.block(node.body), [], None)]
        assert isinstance(node.iter, ast.Call)
        self.refuse(node, not isinstance(node.target, ast.Name), "a loop over several variables")
        assert isinstance(node.target, ast.Name)
        leaves = any(isinstance(inner, ast.Break | ast.Continue) for inner in ast.walk(node))
        self.refuse(node, leaves, "break or continue inside unroll")
        name, flat = node.target.id, []
        self.refuse(node, len(node.iter.args) != 1 or bool(node.iter.keywords), "unroll without just one argument")
        values = self.evaluate(node.iter.args[0], "how often to unroll", _rounds)
        for value in values:
            self.literals[name] = value
            # Each copy is a fresh tree: the transformer changes nodes in place.
            flat.extend(self.block([copied(statement) for statement in node.body]))
        self.literals.pop(name, None)
        if values and name in self.source.outlasting:
            self.names.setdefault(name, self.prefix + name)
            flat.append(ast.Assign([ast.Name(self.names[name], ast.Store())], ast.Constant(values[-1]), lineno=0))
        return flat

    def bank(self, node: ast.Assign) -> list[ast.stmt]:
        (name, *others) = node.targets
        assert isinstance(node.value, ast.Call)
        plain = len(node.value.args) == 2 and not node.value.keywords and not others
        plain = plain and isinstance(name, ast.Name)
        self.refuse(node, not plain, "registers but as name = registers(count, value)")
        assert isinstance(name, ast.Name)
        count = self.evaluate(node.value.args[0], "a number of registers", operator.index)
        numbered = [f"{name.id}_{i}" for i in range(count)]
        for taken in sorted({*self.source.assigned, *self.source.arguments}.intersection(numbered)):
            self.refuse(node, True, f"a variable {taken}: specialize has its own of such names")
        self.banks[name.id] = own = [self.prefix + register for register in numbered]
        value = self.visit(node.value.args[1])
        return [ast.Assign([ast.Name(register, ast.Store())], copied(value), lineno=0) for register in own]

    # Helpers ----------------------------------------------------------------------------------------------------------

    def helper(self, call: ast.Call) -> Callable[..., Any] | None:
        """The function to inline for a call that is given registers, else None."""
        if not any(isinstance(argument, ast.Name) and argument.id in self.banks for argument in call.args):
            return None
        function = self.called(call)
        whole = isinstance(function, types.FunctionType) and not call.keywords
        self.refuse(call, not whole, "registers given to what is no function, or by keyword")
        return function

    def inline(self, node: ast.Assign | ast.Expr, call: ast.Call, helper: Callable[..., Any]) -> list[ast.stmt]:
        self.refuse(call, helper in self.active, f"{helper.__name__}, which calls itself")
        source = Source(helper)
        own = self.scope.prefix_of(helper.__name__)
        for name in (*self.source.assigned, *self.source.arguments):
            self.refuse(call, name.startswith(own), f"a variable {name}: specialize has its own of such names")
        prefix = self.prefix + own
        inner = _Flatten(self.scope, source, {}, prefix)
        inner.active = (*self.active, helper)
        arguments = self.spread(call, len(source.parameters))
        self.refuse(
            call,
            len(arguments) != len(source.parameters),
            f"{len(arguments)} arguments for the {len(source.parameters)} of {helper.__name__}",
        )
        flat: list[ast.stmt] = []
        given = [argument.id for argument in arguments if isinstance(argument, ast.Name) and argument.id in self.banks]
        # A register given by value keeps it while the helper may write to its bank: it is copied.
        changing = {register for bank in given for register in self.banks[bank]}
        for name, argument in zip(source.parameters, arguments, strict=True):
            if isinstance(argument, ast.Name) and argument.id in self.banks:
                inner.banks[name] = self.banks[argument.id]
                continue
            value = self.visit(argument)
            kept = name not in source.assigned
            if kept and isinstance(value, ast.Constant):
                inner.literals[name] = value.value
            elif kept and isinstance(value, ast.Name) and value.id not in changing:
                inner.names[name] = value.id
            else:
                inner.names[name] = prefix + name
                flat.append(ast.Assign([ast.Name(prefix + name, ast.Store())], value, lineno=0))
        for name in source.assigned - inner.names.keys():
            inner.names[name] = prefix + name
            inner.literals.pop(name, None)
        flat += inner.block(source.definition().body)
        returns = [inside for statement in flat for inside in ast.walk(statement) if isinstance(inside, ast.Return)]
        end = flat[-1] if flat else None
        last = end.value if isinstance(end, ast.Return) else None
        if isinstance(end, ast.Return):
            flat.pop()
        self.refuse(
            call, len(returns) > isinstance(end, ast.Return), f"{helper.__name__}, which returns before its end"
        )
        if isinstance(node, ast.Assign):
            self.refuse(call, last is None, f"{helper.__name__}, which returns nothing")
            assert last is not None
            flat.append(ast.Assign([self.visit(target) for target in node.targets], last, lineno=0))
        elif last is not None and acts(last):
            flat.append(ast.Expr(last))
        return flat

    def spread(self, call: ast.Call, count: int) -> list[ast.expr]:
        """The arguments of a call one by one; ``*(a, b)`` is two."""
        arguments: list[ast.expr] = []
        for argument in call.args:
            if isinstance(argument, ast.Starred):
                self.refuse(argument, not isinstance(argument.value, ast.Tuple), "a spread argument beside registers")
                assert isinstance(argument.value, ast.Tuple)
                arguments.extend(argument.value.elts)
            else:
                arguments.append(argument)
        return arguments

    # Expressions ------------------------------------------------------------------------------------------------------

    def refuse(self, node: ast.AST, found: bool, what: str) -> None:
        self.source.refuse(node, found, what)

    def visit(self, node: ast.AST) -> Any:
        self.refuse(node, isinstance(node, Inside), "a lambda, a comprehension or a def inside a kernel")
        return super().visit(node)

    def called(self, node: ast.expr) -> Any:
        """The function that a call calls, where that is known."""
        return self.known(node.func) if isinstance(node, ast.Call) else None

    def known(self, node: ast.expr) -> Any:
        """The value of a name, of a constant of the namespace or of a module's attribute; None for a variable."""
        if isinstance(node, ast.Name) and node.id not in self.names and node.id not in self.banks:
            return self.source.visible.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.known(node.value)
            if isinstance(owner, Constants):
                return self.constant(node)
            if isinstance(owner, types.ModuleType):
                return getattr(owner, node.attr, None)
        return None

    def constant(self, node: ast.Attribute) -> Any:
        """The constant that an attribute of the placeholder names."""
        try:
            return self.scope.constants.value(node.attr)
        except AttributeError as reason:
            place = f"{self.source.function.__code__.co_filename}:{self.source.line_of(node)}"
            raise AttributeError(f"{self.source.name} ({place}): {reason}") from None

    def evaluate(self, node: ast.expr, what: str, kind: Callable[[Any], Any]) -> Any:
        """The value of an expression over literals, ``range``, ``min`` and ``max``, as ``kind`` converts it."""
        visited = self.visit(copied(node))
        expression = ast.fix_missing_locations(ast.Expression(visited))
        # Numbers of numpy, and tuples, are globals of the flat function rather than literals.
        plain = {name: value for name, value in self.scope.used.items() if isinstance(value, np.integer | tuple)}
        allowed: dict[str, Any] = {"__builtins__": {}, "max": max, "min": min, "range": range, **plain}
        try:
            return kind(eval(compile(expression, "<unroll>", "eval"), allowed))
        except NameError as reason:
            self.refuse(node, True, f"{what} by a variable: {reason.name!r} is not known when the kernel is compiled")
        except Exception as reason:  # whatever the expression raises
            self.refuse(node, True, f"{what}: {reason}")

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = node.id
        if isinstance(node.ctx, ast.Store):
            self.refuse(node, name in self.literals, f"a new value for {name}")
            self.names.setdefault(name, self.prefix + name)
        elif name in self.literals:
            return ast.Constant(self.literals[name])
        self.refuse(node, name in self.banks, f"registers {name} as a whole")
        if name in self.names:
            return ast.Name(self.names[name], node.ctx)
        if name in self.source.visible:
            value = self.source.visible[name]
            self.refuse(node, isinstance(value, Constants), "a namespace of constants as a whole")
            return ast.Name(self.scope.name_of(name, value), node.ctx)
        self.refuse(node, name not in self.source.assigned, f"{name}, which is not defined")
        return ast.Name(self.prefix + name, node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        owner = self.known(node.value)
        if isinstance(owner, types.ModuleType):
            self.refuse(node, not hasattr(owner, node.attr), f"{ast.unparse(node)}: the module has no such name")
            if owner.__name__.partition(".")[0] in COMPILERS_OWN:
                return self.generic_visit(node)  # type: ignore[return-value]
        elif not isinstance(owner, Constants):
            return self.generic_visit(node)  # type: ignore[return-value]
        value = self.known(node)
        if isinstance(value, Literal):
            return ast.Constant(literal(value))
        return ast.Name(self.scope.name_of(node.attr, value), node.ctx)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        called = self.called(node)
        integer = isinstance(called, type) and issubclass(called, np.integer) and called is not np.int64
        self.refuse(
            node, integer, f"{ast.unparse(node.func)}: integers of compiled kernels have 64 bits; use & instead"
        )
        if called is not mask:
            named = isinstance(called, Operation) and bool(node.keywords)
            self.refuse(node, named, f"{ast.unparse(node)}: operations take arguments by position")
            return self.generic_visit(node)  # type: ignore[return-value]
        plain = not node.keywords and len(node.args) in (2, 3) and isinstance(node.args[0], ast.Constant)
        self.refuse(node, not plain, "a mask without a name of its own, or with keywords")
        name, value, *without = node.args
        assert isinstance(name, ast.Constant)
        if name.value in self.scope.absent_masks:
            value = without[0] if without else ast.Constant(True)
        return self.visit(value)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self.banks:
            bank, own = node.value.id, self.banks[node.value.id]
            index = self.evaluate(node.slice, f"registers {bank} indexed", operator.index)
            self.refuse(node, not 0 <= index < len(own), f"register {index} of {bank}, which has {len(own)}")
            return ast.Name(own[index], node.ctx)
        return self.generic_visit(node)  # type: ignore[return-value]


def _rounds(count: Any) -> list[Any]:
    """The values of the variable of an unrolled loop."""
    return [
        literal(value) if isinstance(value, (*Literal, tuple)) else operator.index(value) for value in unroll(count)
    ]
