"""Masks: the comparisons that keep a kernel within its tensors, marked in the source.

A mask is a comparison, or the lesser of two numbers, without which a kernel would read or write outside its tensors, or
add up values that do not exist. It evaluates to its value, and costs nothing when compiled. The emulator can leave it
out (``Settings.faults``), so that tests show for every mask that its absence is noticed::

    if mask("rows of results", row < m):
        store_global_float(y + 4 * row, total)
    last = mask("end of row", min(start + 512, end), start + 512)

Comparisons on which no result or access depends are not marked.
"""

from __future__ import annotations

import ast
import inspect
from types import ModuleType
from typing import Any

__all__ = ["mask", "masks_of"]


def mask(name: str, value: Any, without: Any = True) -> Any:
    """``value``; where the mask of that name is left out, ``without``.

    Args:
        name: a literal; no other mask has it.
        value: what the kernel means.
        without: the value of a kernel that ignores the tensor's end.
    """
    return value


def masks_of(module: ModuleType) -> list[str]:
    """The names of the masks in a module's source, in order, whatever :func:`mask` is called there.

    Raises:
        ValueError: a mask's name is not a literal, or a function hands ``mask`` on, so that its masks are not found.
    """

    def named(node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            return vars(module).get(node.id)
        if isinstance(node, ast.Attribute):
            owner = named(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        return None

    tree = ast.parse(inspect.getsource(module))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and named(node.func) is mask]
    followed = {call.func for call in calls} | {node.value for node in tree.body if isinstance(node, ast.Assign)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute) or isinstance(node.ctx, ast.Store):
            continue
        if named(node) is mask and node not in followed:
            raise ValueError(f"{module.__file__}, line {node.lineno}: mask can only be called")
    names: list[str] = []
    for call in calls:
        name = call.args[0] if call.args else None
        if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
            raise ValueError(f"{module.__file__}, line {call.lineno}: a mask without a name of its own")
        names.append(name.value)
    return names
