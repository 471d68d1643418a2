"""A GPU in Python: one CTA at a time, lane by lane, for kernels as they are written; no GPU and no compiler is needed.

Each lane runs until it has to wait, for a barrier or for the other lanes of its warp; then another is chosen by lot.
Whatever hardware would let pass unnoticed is a :class:`qmm.EmulatorError` here:

* an access outside the memory that a launch was given, or at an address that its width does not divide;
* a read of bytes that nobody has written, or whose copy is still in flight, or that a kernel before may still write;
* lanes of a warp that are not at the same instruction, where that instruction needs all of them;
* a barrier with more arrivals than it expects, lanes that wait for ever, copies that nobody waited for.

:func:`emulate` runs a kernel; :class:`Region` says afterwards what is in its memory and how often each byte was read.
"""

from __future__ import annotations

from qmm.errors import EmulatorError
from qmm.kernels.lang.targets.emulator.cta import Settings
from qmm.kernels.lang.targets.emulator.memory import Memory, Region
from qmm.kernels.lang.targets.emulator.target import EmulatorTarget, emulate, launch

__all__ = ["EmulatorError", "EmulatorTarget", "Memory", "Region", "Settings", "emulate", "launch"]
