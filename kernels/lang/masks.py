"""Masks: what keeps a kernel to its tensors, marked where it stands.

A mask is a comparison, or the lesser of two numbers, without which a kernel would read or write what is not its own, or
count in what is not there. It means its value, and costs nothing compiled. The emulator can leave it out
(``Settings.faults``), so that tests can show for every mask that its absence is noticed::

    if mask("rows of results", row < m):
        store_global_float(y + 4 * row, total)
    last = mask("end of row", min(start + 512, end), start + 512)

Some comparisons look like masks, and no result or access depends on them; those are not marked.
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
        without: what would stand there if nobody had thought of the tensor's end.
    """
    return value


def masks_of(module: ModuleType) -> list[str]:
    """The names of the masks in a module's source, in order."""
    tree = ast.parse(inspect.getsource(module))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [node.args[0] for node in calls if isinstance(node.func, ast.Name) and node.func.id == "mask"]
    return [ast.literal_eval(name) for name in found]
