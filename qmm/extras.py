"""The command that installs the packages of an extra, for messages.

The command names the packages themselves. By qmm's own name pip would fetch a stranger's project: qmm is not on PyPI,
and the project of that name there is somebody else's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["CLONE", "command", "for_gpu"]

CLONE: Final = "in a clone of qmm's repository: pip install '.[{}]'"
"""The text where the requirements are unknown."""

PROJECT: Final = Path(__file__).resolve().parents[1] / "pyproject.toml"
NESTED: Final = re.compile(r"qmm\[([\w\s,.-]+)\]")
OF_EXTRA: Final = re.compile(r"""(?P<what>[^;]+);.*\bextra\s*==\s*["'](?P<extra>[^"']+)["']""")


def command(extra: str) -> str:
    """``pip install`` and the packages of an extra, such as ``pip install 'cuda-python>=13,<14'``.

    The requirements are those of ``pyproject.toml`` where qmm is used from its source tree, else those of the installed
    package. Where neither has them it is what to do in a clone.
    """
    packages = dict.fromkeys(_packages(extra, _extras()))
    return f"pip install {' '.join(map(repr, packages))}" if packages else CLONE.format(extra)


def for_gpu() -> str:
    """What to install for a GPU, by the version of CUDA that its driver has."""
    return f"for a driver of CUDA 13: {command('cu13')}; for one of CUDA 12: {command('cu12')}"


def _packages(extra: str, extras: dict[str, list[str]]) -> Iterator[str]:
    """The requirements of an extra, and of the extras that it includes."""
    for requirement in extras.get(extra, ()):
        nested = NESTED.fullmatch(requirement)
        if nested is None:
            yield requirement
        else:
            for name in nested[1].split(","):
                yield from _packages(name.strip(), extras)


def _extras() -> dict[str, list[str]]:
    """Requirements by extra; empty if they are unknown."""
    import tomllib
    from importlib import metadata

    try:
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        if project["name"] == "qmm":
            return dict(project["optional-dependencies"])
    except (OSError, ValueError, KeyError):  # an installed qmm has no such file beside it
        pass
    extras: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("qmm") or ()
    except metadata.PackageNotFoundError:
        requirements = ()
    for found in filter(None, map(OF_EXTRA.match, requirements)):
        extras.setdefault(found["extra"], []).append(found["what"].strip())
    return extras
