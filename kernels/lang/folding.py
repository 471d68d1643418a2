"""Constants folded in syntax trees, and other small work on trees, for :mod:`qmm.kernels.lang.specialize`."""

from __future__ import annotations

import ast
from typing import Any

__all__ = ["Folding", "SingleFloats", "acts", "copied", "outcome", "read_name", "truth"]


class Folding(ast.NodeTransformer):
    """Computes operations on constants, and leaves out what a known condition does not need."""

    def refuse(self, node: ast.AST, found: bool, what: str) -> None:
        """Raise if something was found, naming the node's place."""
        raise NotImplementedError

    def fold(self, node: Any) -> ast.expr:
        """The constant that results from an operation on constants."""
        if all(isinstance(leaf, ast.Constant) for leaf in ast.iter_child_nodes(node) if isinstance(leaf, ast.expr)):
            expression = ast.fix_missing_locations(ast.Expression(node))
            try:
                return ast.Constant(eval(compile(expression, "<fold>", "eval"), {"__builtins__": {}}))
            except Exception as reason:
                self.refuse(node, True, f"{ast.unparse(node)}: {reason}")
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Arithmetic on constants is its result."""
        return self.fold(self.generic_visit(node))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        """So is ``not`` and a sign."""
        visited = self.generic_visit(node)
        if isinstance(visited, ast.UnaryOp) and isinstance(visited.op, ast.Not):
            visited.operand = truth(visited.operand)
        return self.fold(visited)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """So is a comparison."""
        return self.fold(self.generic_visit(node))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        """``and`` and ``or`` give an operand, as in Python, or where all are truths, a truth."""
        visited = self.generic_visit(node)
        assert isinstance(visited, ast.BoolOp)
        if all(_is_bool(value) for value in visited.values):
            return truth(visited)
        values: list[ast.expr] = []
        for value in visited.values:
            values.append(value)
            if isinstance(value, ast.Constant):
                if bool(value.value) == isinstance(visited.op, ast.Or):
                    break  # Python does not look at the rest
                if value is not visited.values[-1]:
                    values.pop()  # Python goes on; only the last operand is a result in any case
        return values[0] if len(values) == 1 else ast.BoolOp(visited.op, values)

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        """A known condition leaves its branch."""
        test = truth(self.visit(node.test))
        if isinstance(test, ast.Constant):
            return self.visit(node.body if test.value else node.orelse)
        return ast.IfExp(test, self.visit(node.body), self.visit(node.orelse))


class SingleFloats(ast.NodeTransformer):
    """Makes every float literal a float32: to Numba a bare one is a double, and so is every result computed with it."""

    def __init__(self, name: str) -> None:
        """Args are what float32 is called."""
        self.name = name

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        """A float literal is wrapped."""
        if isinstance(node.value, float):
            return ast.Call(ast.Name(self.name, ast.Load()), [node], [])
        return node


def read_name(node: ast.AST) -> str | None:
    """The variable that a node reads, if any."""
    if isinstance(node, ast.AugAssign):
        return node.target.id if isinstance(node.target, ast.Name) else None
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else None


def copied(node: Any) -> Any:
    """A deep copy of a syntax tree."""
    if isinstance(node, ast.AST):
        fields = {name: copied(value) for name, value in ast.iter_fields(node)}
        return ast.copy_location(type(node)(**fields), node)
    return [copied(item) for item in node] if isinstance(node, list) else node


def _is_bool(node: ast.expr) -> bool:
    """Whether an expression is certainly True or False, so that its truth is its value."""
    if isinstance(node, ast.BoolOp):
        return all(_is_bool(value) for value in node.values)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, bool)
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def acts(node: ast.AST) -> bool:
    """Whether an expression may do more than give a value: it calls a function, which may store, or sets a variable."""
    return any(isinstance(inner, ast.Call | ast.NamedExpr) for inner in ast.walk(node))


def truth(node: ast.expr) -> ast.expr:
    """The same where only its truth counts, as in the test of an ``if``: ``x and False`` is False, whatever x is. But
    ``f(x) and False`` calls f."""
    if not isinstance(node, ast.BoolOp):
        return node
    decisive = isinstance(node.op, ast.Or)
    open_values: list[ast.expr] = []
    for value in map(truth, node.values):
        if not isinstance(value, ast.Constant):
            open_values.append(value)
        elif bool(value.value) == decisive:
            while open_values and not acts(open_values[-1]):
                open_values.pop()
            result = ast.Constant(decisive)
            return ast.BoolOp(node.op, [*open_values, result]) if open_values else result
    if not open_values:
        return ast.Constant(not decisive)
    return open_values[0] if len(open_values) == 1 else ast.BoolOp(node.op, open_values)


def outcome(test: ast.expr) -> bool | None:
    """The outcome of a :func:`truth`; None where it is open."""
    last = test.values[-1] if isinstance(test, ast.BoolOp) else test  # operands before it are there to be called
    return bool(last.value) if isinstance(last, ast.Constant) else None
