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
    """The names of the masks in a module's source, in order."""
    tree = ast.parse(inspect.getsource(module))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [node.args[0] for node in calls if isinstance(node.func, ast.Name) and node.func.id == "mask"]
    return [ast.literal_eval(name) for name in found]
