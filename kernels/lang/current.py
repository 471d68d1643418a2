"""The emulator's current lane, on which the meanings of GPU operations work."""

from __future__ import annotations

from typing import Any

from greenlet import getcurrent

from qmm.errors import EmulatorError

__all__ = ["cta_or_none", "this_cta", "this_lane"]


def this_lane() -> Any:
    """The lane whose turn it is, a :class:`qmm.kernels.lang.targets.emulator.lanes.Lane`.

    Raises:
        EmulatorError: no kernel is being run.
    """
    lane = getcurrent()
    if not hasattr(lane, "cta"):
        raise _outside()
    return lane


def this_cta() -> Any:
    """The CTA of the lane whose turn it is, a :class:`qmm.kernels.lang.targets.emulator.cta.CTA`.

    Raises:
        EmulatorError: no kernel is being run.
    """
    try:
        return getcurrent().cta
    except AttributeError:
        raise _outside() from None


def cta_or_none() -> Any:
    """The same; None outside of the emulator, where addresses are those of this process."""
    return getattr(getcurrent(), "cta", None)


def _outside() -> EmulatorError:
    return EmulatorError(
        "this operation works on the memory and the lanes of a GPU: call it in a kernel, and run that with "
        "qmm.kernels.lang.targets.emulator.emulate()"
    )
