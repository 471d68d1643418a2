"""``python -m qmm``: the same as the ``qmm`` command."""

from __future__ import annotations

from qmm.cli.app import main

if __name__ == "__main__":
    main()
