"""How much is tested: the usual run, or more of it.

``tests/conftest.py`` has the options and sets these before tests are collected.
"""

from __future__ import annotations

__all__ = ["draws", "every"]

every = False
"""``--all``: whether every kernel is compiled and every format goes through the tests that otherwise take a few."""
draws = 1
"""``--draws=N``: how many times as many cases are drawn as in the usual run, where they are the same in each run."""
