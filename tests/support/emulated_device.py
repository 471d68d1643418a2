"""A GPU whose memory and launches are the emulator's, for :mod:`qmm.direct` and :mod:`qmm.sequence`."""

from __future__ import annotations

import ctypes
import threading
from contextlib import AbstractContextManager, nullcontext

from qmm.device import Device, Prepared
from qmm.kernels.lang.targets.emulator import Memory, Region, Settings, emulate
from qmm.kernels.ops.layout import ZERO_NBYTES
from qmm.kernels.ops.op import Architecture, At, LaunchSpec, Work
from qmm.streams import Streams, Use

__all__ = ["AMPERE", "HOPPER", "USUAL", "EmulatedDevice", "EmulatedLaunch"]

HOPPER = Architecture(sms=2, shared_nbytes=232448, bulk=True, l2_nbytes=6 << 20)
"""A small GPU of compute capability 9.0."""
AMPERE = Architecture(sms=2, shared_nbytes=166912, bulk=False, l2_nbytes=6 << 20)
"""One of 8.0."""
USUAL = Settings()


class EmulatedLaunch:
    """Stands in for :class:`qmm.kernels.runtime.launch.Launch`."""

    def __init__(self, device: EmulatedDevice, spec: LaunchSpec) -> None:
        self.device = device
        self.spec = spec
        values = {name: 0 if isinstance(value, At) else value for name, value in spec.arguments.items()}
        self.cells = {name: ctypes.c_int64(value) for name, value in values.items()}
        assert spec.shared_nbytes <= device.architecture.shared_nbytes, "more shared memory than a CTA may have"

    def cell(self, name: str) -> ctypes.c_int64:
        """An argument, to be changed before the next launch."""
        return self.cells[name]

    def read_from(self, name: str, values: ctypes.Array[ctypes.c_int64], index: int) -> None:
        """From now on, take an argument from an element of an array."""
        self.cells[name] = ctypes.c_int64.from_buffer(values, 8 * index)

    def queue(self, stream: int, early: bool = True) -> None:
        """Run it."""
        spec, device = self.spec, self.device
        emulate(
            spec.kernel,
            memory=device.memory,
            grid=spec.ctas,
            shared_nbytes=spec.shared_nbytes,
            settings=device.settings,
            after_predecessors=not spec.early,
            **{name: cell.value for name, cell in self.cells.items()},
        )


class EmulatedStreams(Streams):
    """Streams of a device on which everything is done at once."""

    def __init__(self, device: EmulatedDevice) -> None:
        self._device = device
        self.crowded = False

    def begin(self, stream: int, owner: object = None) -> Use:
        return Use(None)

    def end(self, use: Use) -> None:
        """Nothing is left to be done."""

    def workspace(self, use: Use, nbytes: int) -> int:
        # Fresh for each call: what the call before has left there must not be of use.
        return self._device.allocate(nbytes, "workspace")


class EmulatedDevice(Device):
    """A device whose memory is :attr:`memory`, and which runs what is queued at once.

    What it allocates is nowhere near anything else.
    """

    def __init__(self, architecture: Architecture = HOPPER, settings: Settings = USUAL) -> None:
        self.memory = Memory()
        self.settings = settings
        self.architecture = architecture
        self.number = self.stream = 0
        self.lock = threading.RLock()
        self._thread = threading.local()
        self._thread.ready = True
        self._stopped = False
        self._queued = 0
        self.own_streams = {}
        self.streams = EmulatedStreams(self)
        self._staging = (0, 0)
        self._zeros = self.add("zeros", bytes(ZERO_NBYTES), constant=True).start

    def add(self, name: str, content: bytes | int, constant: bool = False, shift: int = 0) -> Region:
        """Make a region of these bytes, or of so many unwritten ones, ``shift`` bytes past a multiple of 4096."""
        return self.memory.add(name, content, constant=constant, shift=shift)

    def errors(self, doing: str) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, work: Work, doing: str) -> Prepared:
        return Prepared(work, [EmulatedLaunch(self, spec) for spec in work.launches], self._zeros)

    def allocate(self, nbytes: int, what: str) -> int:
        return self.add(what, nbytes).start

    def free(self, address: int) -> None:
        self.memory.regions = [region for region in self.memory.regions if region.start != address]

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        if self._ours(source):
            region = self.memory.find(source, nbytes)
            content = bytes(region.data[source - region.start :][:nbytes])
        else:
            content = ctypes.string_at(source, nbytes)
        if self._ours(target):
            region = self.memory.find(target, nbytes)
            region.put(target - region.start, content)
        else:
            ctypes.memmove(target, content, nbytes)

    def synchronize(self, stream: int) -> None:
        """Whatever was queued is done."""

    def _ours(self, address: int) -> bool:
        return any(region.start <= address < region.end for region in self.memory.regions)
