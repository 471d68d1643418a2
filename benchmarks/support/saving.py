"""Results files: one of a benchmark, machine and day, to which every run of that day adds its rows.

A row takes the place of the one of the same key, and the other rows stay: ``-k`` may measure a benchmark in parts. That
holds only for runs of one machine and the same versions. What was measured by others has a file of its own, with a
number behind the date.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ResultsFile"]

Row = dict[str, Any]
VARYING = ("date", "load_average", "read_peak")
"""What differs from run to run; all else in a head must agree before rows are put into one file."""


@dataclass
class ResultsFile:
    """Where a run puts its rows.

    Attributes:
        path: of the file, a JSON document; beside it lies the same as ``.csv``, the rows alone.
        before: what it held before this run; None if there was no such file.
        passed: files of the same day that are of another machine, driver or version, and what differs first.
    """

    path: Path
    before: dict[str, Any] | None
    passed: list[str]

    @classmethod
    def find(cls, folder: Path, stem: str, head: dict[str, Any]) -> ResultsFile:
        """The first of ``stem``, ``stem-2``, ``stem-3``... that is free, or whose head agrees."""
        passed = []
        for number in itertools.count(1):
            path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
            if not path.exists():
                return cls(path, None, passed)
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
                different = disagreement(before, head)
            except (ValueError, TypeError, AttributeError):  # cut short, or something else
                different = "it is no results file"
            if different is None:
                return cls(path, before, passed)
            passed.append(f"{path.name} ({different})")
        raise AssertionError

    def save(self, head: dict[str, Any], rows: Sequence[Row], key: Sequence[str]) -> str:
        """Write the file, and say in a sentence what was put together. ``key``: columns that make rows the same."""
        new = {identity(row, key): row for row in rows}
        old = {identity(row, key): row for row in (self.before["rows"] if self.before else ())}
        kept = [name for name in old if name not in new]
        if self.before is not None and kept:
            earlier = {name: self.before[name] for name in VARYING if name in self.before}
            head = head | {"earlier": [*self.before.get("earlier", ()), earlier]}
        every = list((old | new).values())
        self.path.parent.mkdir(exist_ok=True, parents=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({**head, "rows": every}, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)
        with self.path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            columns = dict.fromkeys(column for row in every for column in row)
            writer = csv.DictWriter(file, fieldnames=list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(every)
        said = f"saved: {self.path}: {len(new)} rows"
        if self.before is not None:
            replaced = len(old) - len(kept)
            said += f", {replaced} of them in place of earlier ones; {len(kept)} of {self.before['date']} kept"
        return said + "".join(f"; not put into {other}" for other in self.passed)


def identity(row: Row, key: Sequence[str]) -> str:
    """What makes two rows the same case."""
    return json.dumps([row[column] for column in key])


def disagreement(before: dict[str, Any], head: dict[str, Any]) -> str | None:
    """The first fact that two heads do not have in common; None if they agree in all."""
    names = dict.fromkeys([*before, *head])
    for name in names:
        if name not in (*VARYING, "rows", "earlier") and before.get(name) != json.loads(json.dumps(head.get(name))):
            return f"its {name} is {before.get(name)!r}, not {head.get(name)!r}"
    return None
