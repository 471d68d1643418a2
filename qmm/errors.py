"""Everything qmm raises on purpose.

Each message names the file, the tensor where there is one, the numbers that disagree and the way out, so that it can be
acted on without a debugger. All of them derive from :class:`QmmError`.
"""

from __future__ import annotations

from qmm.output import printable

__all__ = [
    "ArrayError",
    "ClosedError",
    "CopyError",
    "DeviceError",
    "EmulatorError",
    "FileAccessError",
    "FileMissingError",
    "GGUFError",
    "MappingError",
    "OutOfMemoryError",
    "PatternError",
    "QmmError",
    "RegistrationError",
    "TensorNotFoundError",
    "UnsupportedTypeError",
]


class QmmError(Exception):
    """Base of every error that qmm raises on purpose. Its text is one printable line: control characters of names,
    keys and paths are written as ``\\x1b``."""

    def __str__(self) -> str:
        # Not the base's: KeyError would show a repr, OSError its number and path.
        return printable(str(self.args[0])) if len(self.args) == 1 else super().__str__()


class GGUFError(QmmError):
    """The file is not a GGUF file that can be used: damaged, cut short, big endian, an unknown version."""


class MappingError(QmmError):
    """The file could not be mapped, or is no longer the file that was mapped."""


class FileAccessError(GGUFError, MappingError, OSError):
    """The file could not be opened; ``errno``, ``strerror`` and ``filename`` are those of the operating system's error.

    It is a GGUFError and a MappingError whichever opened it, so that either name catches it.
    """

    def __init__(self, message: str, reason: Exception | None = None) -> None:
        super().__init__(message)
        if isinstance(reason, OSError):
            self.errno, self.strerror, self.filename = reason.errno, reason.strerror, reason.filename

    def __reduce__(self) -> tuple[object, ...]:  # OSError's would lose them, on the way from a worker
        return type(self), (self.args[0], OSError(self.errno, self.strerror, self.filename))


class FileMissingError(FileAccessError, FileNotFoundError):
    """There is no such file."""


class RegistrationError(QmmError):
    """CUDA refused to register the mapping; the message names the call or attribute and a placement that works."""


class DeviceError(QmmError):
    """The device asked for is absent or cannot do what was asked."""


class OutOfMemoryError(DeviceError):
    """The device has too little free memory; the message says for what, and the way out. For an array or workspace it
    gives both numbers, and libraries were asked before for what they merely keep."""


class EmulatorError(QmmError):
    """A kernel in the emulator broke a rule; the message names the lane, the access and the source line."""


class TensorNotFoundError(QmmError, KeyError):
    """The model has no tensor of that name; the message suggests similar names."""


class PatternError(TensorNotFoundError):
    """No tensor of the model has a name that matches a pattern."""


class UnsupportedTypeError(QmmError):
    """The tensor has a block type that qmm has no kernel for."""


class ArrayError(QmmError, ValueError):
    """An activation or output array has the wrong kind, shape, dtype or device."""


class CopyError(QmmError, TypeError):
    """An object that refers to memory of this process or its GPU cannot be copied or pickled."""


class ClosedError(QmmError):
    """The model, mapping or engine was used after it was closed."""
