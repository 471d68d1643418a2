"""Writes a GGUF file of random, valid blocks: every format at the shapes asked for.

    python benchmarks/support/make_gguf.py odd.gguf --m 1,3,4097 --k 1,896,2880,14336

``k`` is rounded down to whole blocks, and up to one block at least; plain formats take it as it is. Shapes that come
out equal are written once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from gguf_files import FORMATS, random_blocks, write_gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--formats", default=",".join(FORMATS), help="ggml's type names, separated by commas")
    parser.add_argument("--m", default="1,3,4097", help="rows")
    parser.add_argument("--k", default="1,896,2880,14336", help="weights a row")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    tensors = {}
    for name in arguments.formats.split(","):
        block = FORMATS[name].values
        for m in map(int, arguments.m.split(",")):
            for wanted in map(int, arguments.k.split(",")):
                k = max(block, wanted // block * block)
                tensors.setdefault(f"{name.lower()}.{m}x{k}", (name, (m, k), random_blocks(name, (m, k), rng)))
    write_gguf(arguments.path, tensors)
    print(f"{arguments.path}: {len(tensors)} tensors, {arguments.path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
