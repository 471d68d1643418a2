"""What each CUDA kernel may take, in ``tests/kernels/budgets.json``, so that none grows unnoticed.

``write_budgets.py`` writes that file. It holds, for every kernel and target, a digest of the PTX and what ptxas made of
it: registers and machine instructions. None spills. PTX of the same digest is not assembled again, if ptxas is the
same. Other PTX, which may come of another Numba or NVVM, is held to the same numbers, with the allowances here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PATH", "Assembled", "Budget", "anonymous", "budget_of", "budgets", "digest_of", "growth", "written"]

PATH = Path(__file__).parents[1] / "kernels" / "budgets.json"
ABOUT = "What ptxas makes of the CUDA kernels; none spills. Written by tests/support/write_budgets.py, never by hand."
MORE_REGISTERS = 8
"""Registers are allotted to a warp by eights a lane: less may be free."""
MORE_INSTRUCTIONS = 0.05
"""A part of them: what other orders of the same instructions may need in moves and waits."""


@dataclass(frozen=True)
class Assembled:
    """What ptxas makes of one kernel on one target.

    Attributes:
        registers: of a thread.
        instructions: of machine code, filled up to 128 bytes.
        stack_nbytes, spill_store_nbytes, spill_load_nbytes: of a thread.
    """

    registers: int
    instructions: int
    stack_nbytes: int = 0
    spill_store_nbytes: int = 0
    spill_load_nbytes: int = 0


class Budget(NamedTuple):
    """What a kernel had on one target when the file was written."""

    ptx: str
    """The digest of its PTX."""
    registers: int
    instructions: int


class Budgets(NamedTuple):
    """The file."""

    versions: Mapping[str, str]
    """Of ptxas and of all that has a part in the PTX."""
    kernels: Mapping[str, Mapping[str, Budget]]
    """By use (:class:`ptx_kernels.Spec`) and target."""


@functools.cache
def budgets() -> Budgets:
    """The file as it is."""
    document = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {"versions": {}, "kernels": {}}
    kernels = {
        use: {target: Budget(**entry) for target, entry in targets.items()}
        for use, targets in document["kernels"].items()
    }
    return Budgets(document["versions"], kernels)


def budget_of(use: str, target: str) -> Budget | None:
    """A kernel's budget on one target, if the file has it."""
    return budgets().kernels.get(use, {}).get(target)


def written(versions: Mapping[str, str], kernels: Mapping[str, Mapping[str, Budget]]) -> str:
    """The file's text: a line for each kernel on each target, so that a difference can be read."""

    def lines(entries: Mapping[str, Any], indent: str, text: Any) -> str:
        return ",\n".join(f"{indent}{json.dumps(name)}: {text(entry)}" for name, entry in entries.items())

    def of_kernel(targets: Mapping[str, Budget]) -> str:
        return f"{{\n{lines(targets, '      ', lambda budget: json.dumps(budget._asdict()))}\n    }}"

    head = f'{{\n  "about": {json.dumps(ABOUT)},\n  "versions": {{\n{lines(versions, "    ", json.dumps)}\n  }},\n'
    return f'{head}  "kernels": {{\n{lines(kernels, "    ", of_kernel)}\n  }}\n}}\n'


def anonymous(text: str) -> str:
    """PTX without what differs from one compilation to the next: the target, comments, and the numbers in names."""
    names: dict[str, str] = {}
    text = re.sub(r"//.*|(?m:^\.target .*$)", "", text)
    text = "\n".join(line for line in text.splitlines() if "NumbaEnv" not in line)
    return re.sub(r"\b_ZN\w+?(?=_param_|\b)", lambda name: names.setdefault(name[0], f"name{len(names)}"), text)


def digest_of(text: str) -> str:
    """A digest of anonymous PTX."""
    return hashlib.sha256(anonymous(text).encode()).hexdigest()[:16]


def growth(budget: Budget, found: Assembled) -> str:
    """By how much a kernel exceeds its budget, in words; empty where it does not."""
    grown = []
    if found.registers > budget.registers + MORE_REGISTERS:
        grown.append(f"{found.registers} registers, where it had {budget.registers}")
    if found.instructions > budget.instructions * (1 + MORE_INSTRUCTIONS):
        grown.append(f"{found.instructions} instructions, where it had {budget.instructions}")
    return " and ".join(grown)
