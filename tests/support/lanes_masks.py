"""The masks of the kernels that read weights and activations, and the kernels' source without one of them.

A mask is what keeps a kernel to its tensors: a comparison, or the lesser of two numbers. Tests take each of them away,
in a copy of the source that only the executor runs, to show that its absence would be noticed. The text that is
replaced must occur exactly once in its function, or nothing runs: so the table cannot fall behind the kernels.

Some comparisons look like masks, and no result or access depends on them:

* In ``multiply``, lanes of one column's kernel whose row of ``dot_pair`` belongs to no column (``(group & 1) >=
  COLUMNS``): what they pass makes sums of a second column, which are never taken.
* In ``multiply``, blocks past a row's end of a plain format: ``masked`` makes their weights zeros again. In
  ``dequantize``, the same: of such a block ``store_part`` stores less than one number.
* In ``quantize_block``, either of ``here < blocks * 32`` before a store and ``here - (thread & 31) * 4 < blocks * 32``
  around it: scale blocks are a multiple of four, 128 values, which is what a warp makes, so both say the same.
* In ``matvec``, ``thread * 16 < ZERO_NBYTES``: what would be zeroed beyond is written before it is read.
* In ``fetch_bulk``, ``last > first`` before the copy: there a copy would be of no bytes.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import textwrap
import types
from collections.abc import Callable
from typing import Any

from qmm.kernels.ops import dequantize
from qmm.kernels.ops import pipeline as ring
from qmm.kernels.ops import quantize as activations
from qmm.kernels.ops.matvec import kernel as matvec

__all__ = ["MASKS", "without"]

Function = Callable[..., Any]

MASKS: dict[str, tuple[Function, str, str]] = {
    # Weights, on their way to the ring.
    "rows, bulk": (ring.fetch_bulk, "line < ROWS and row + line < m", "line < ROWS"),
    "rows, by 16": (ring.fetch, "min(ROWS, m - row)", "ROWS"),
    "lines, bulk": (ring.fetch_bulk, "line < ROWS and row + line < m", "row + line < m"),
    "depth, bulk": (ring.fetch_bulk, "min(start + CHUNK_NBYTES, begin + row_nbytes)", "start + CHUNK_NBYTES"),
    "depth, by 16": (ring.fetch, "min(start + CHUNK_NBYTES, begin + row_nbytes)", "start + CHUNK_NBYTES"),
    "first piece, bulk": (ring.fetch_bulk, "if first < weights:", "if False:"),
    "last piece, bulk": (ring.fetch_bulk, "if last > end and last > first:", "if False:"),
    "only piece, bulk": (ring.fetch_bulk, "if last > end and last > first:", "if last > end:"),
    "first piece, by 16": (ring.fetch, "piece >= weights and piece + 16 <= end", "piece + 16 <= end"),
    "last piece, by 16": (ring.fetch, "piece >= weights and piece + 16 <= end", "piece >= weights"),
    "edge before": (ring.copy_edges, "if source + i >= weights and source + i < end:", "if source + i < end:"),
    "edge after": (ring.copy_edges, "if source + i >= weights and source + i < end:", "if source + i >= weights:"),
    "brought, before": (ring.prefetch_rows, "first = (start + 15) & -16", "first = start & -16"),
    "brought, after": (ring.prefetch_rows, "last = (start + nbytes) & -16", "last = (start + nbytes + 15) & -16"),
    # Products: blocks past a row's end, activations past the last group of blocks, numbers past k, columns, results.
    "blocks": (matvec.multiply, "if chunk * CHUNK_BLOCKS + place >= blocks:", "if False:"),
    "groups": (
        matvec.multiply,
        "min(chunk * (CHUNK_BLOCKS // 4) + block_group, last_group)",
        "(chunk * (CHUNK_BLOCKS // 4) + block_group)",
    ),
    "tail": (matvec.multiply, "if PLAIN:", "if False:"),
    "tail, short": (
        matvec.multiply,
        "masked(floats[r], k - (chunk * CHUNK_BLOCKS + place) * 16)\n                        # The lane's own",
        "floats[r]\n                        # The lane's own",
    ),
    "columns, short": (matvec.multiply, "if group < COLUMNS:", "if True:"),
    "sums, short": (matvec.multiply, "if c < COLUMNS:", "if True:"),
    "rows of results": (matvec.add_up, "if r < m and c < n:", "if c < n:"),
    "columns of results": (matvec.add_up, "if r < m and c < n:", "if r < m:"),
    "copy of activations, read": (
        matvec.copy_activations,
        "if at + i * (16 * 32 * WARPS) < nbytes:\n                words[i]",
        "if True:\n                words[i]",
    ),
    "copy of activations, written": (
        matvec.copy_activations,
        "if at + i * (16 * 32 * WARPS) < nbytes:\n                store",
        "if True:\n                store",
    ),
    # Activations.
    "columns of x": (activations.quantize, "if row < n and source", "if source"),
    "tail of x": (activations.quantize, "if row < n and source * 32 + lane < k:", "if row < n:"),
    "columns of x, fused": (activations.quantize_block, "if here < k and c < n:", "if here < k:"),
    "tail of x, fused": (activations.quantize_block, "if here < k and c < n:", "if c < n:"),
    # Dequantization.
    "blocks of weights": (dequantize.dequantize, "if block < blocks and row", "if row"),
    "rows of weights": (dequantize.dequantize, "if block < blocks and row + line < m:", "if block < blocks:"),
    "tail of weights": (dequantize.dequantize, "min(16, k - block * 16)", "16"),
}
"""By name: the function, its text, and what stands there instead."""

MODULES = {module.__name__ for module in (activations, dequantize, matvec, ring)}
_serial = itertools.count()


def without(masks: frozenset[str], function: Function) -> Function:
    """A kernel with all that it calls, but without these masks."""
    return _copied(function, tuple(MASKS[name] for name in sorted(masks))) if masks else function


@functools.cache
def _copied(function: Function, edits: tuple[tuple[Function, str, str], ...]) -> Function:
    source = textwrap.dedent(inspect.getsource(function))
    for edited, text, instead in edits:
        if edited is function:
            assert source.count(text) == 1, f"{function.__name__} has {text!r} {source.count(text)} times, not once"
            source = source.replace(text, instead)
    called = inspect.getclosurevars(function).globals.items()
    namespace = dict(function.__globals__)
    namespace |= {name: _copied(value, edits) for name, value in called if _is_of_kernels(value)}
    filename = f"<{function.__module__}.{function.__name__} without masks #{next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)
    return namespace[function.__name__]


def _is_of_kernels(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and value.__module__ in MODULES
