"""Kernels for the CPU, loaded from the user's cache or compiled when they are first called.

Machine code is an object file with one C function, which takes the address of its arguments and returns 0. llvmlite,
which comes with Numba, loads it; Numba itself is imported only to compile.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, SupportsIndex

from qmm.children import PerProcess
from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.specialize import specialize
from qmm.kernels.runtime.cache import CachedKernel, Code
from qmm.kernels.runtime.compiler import check_cpu

__all__ = ["CPUKernel", "host"]

SETTING_PREFIX = "NUMBA_"
SETTINGS_FILE = ".numba_config.yaml"
"""A file of Numba's settings in the working directory, which a key does not cover."""
SYMBOLS, NAMES = b".symtab", b".strtab"
SYMBOL = struct.Struct("=IBBHQQ")
"""A symbol of a 64-bit ELF file: the place of its name, three fields that tell what it is (the third is its section, 0
where it has none), its value and size."""


class CPUKernel:
    """A kernel for the CPU, loaded at its first call. Every parameter is an int64: an address or a number.

    Threads may share it: the first call of one waits for the compilation that another has begun. The interpreter's lock
    is released while it runs.

    Attributes:
        name: for messages and for the cache.
        parameters: their names, in the order that its machine code has them.
        key: what its machine code depends on, apart from the source of this package.
    """

    def __init__(
        self, name: str, parameters: tuple[str, ...], compiled: Callable[[], Code], key: Mapping[str, Any]
    ) -> None:
        """Args are as the attributes, and ``compiled``, which compiles the kernel."""
        self.name = name
        self.parameters = parameters
        self.key = key
        self._compiled = compiled
        self._parameter_set = frozenset(parameters)
        self._pack = struct.Struct(f"{len(parameters)}q").pack
        self._loaded: _Loaded | None = None
        # A finalizer may call the kernel in the middle of the compilation.
        self._lock = PerProcess(threading.RLock)

    @classmethod
    def of(cls, name: str, function: Callable[..., None], constants: Constants, *fastmath: str) -> CPUKernel:
        """A function with its compile-time constants.

        Args:
            name: for messages and for the cache.
            function: the kernel, as plain Python.
            constants: its compile-time constants.
            fastmath: LLVM's fast-math flags; none where results must equal the reference's bit for bit.
        """

        def compiled() -> Code:
            check_cpu()  # with some settings Numba cannot even be imported
            from qmm.kernels.lang.targets.cpu import CPUTarget
            from qmm.kernels.runtime import build_cpu

            target = CPUTarget(fastmath)
            return build_cpu.compiled(specialize(function, constants, target), target)

        key = {"function": function, "constants": constants.described(), "fastmath": fastmath}
        return cls(name, tuple(inspect.signature(function).parameters), compiled, key)

    def __call__(self, *positional: SupportsIndex, **named: SupportsIndex) -> None:
        """Run it; arguments are passed as to any Python function.

        Raises:
            TypeError: an argument is missing or unknown.
            DeviceError: a setting of Numba forbids compiling.
            RuntimeError: it raised an exception.
        """
        count = len(positional) + len(named)
        if positional:
            named = {**named, **dict(zip(self.parameters, positional, strict=False))}
        if not count == len(named) == len(self.parameters) or not self._parameter_set.issuperset(named):
            raise TypeError(f"{self.name} takes {', '.join(self.parameters)}; it was given {count}: {', '.join(named)}")
        loaded = self._loaded or self._load()
        try:
            packed = self._pack(*map(named.__getitem__, self.parameters))
        except struct.error:
            raise TypeError(f"{self.name}: arguments are 64-bit integers, but it was given {named}") from None
        status = loaded.function(packed)
        if status:
            raise RuntimeError(f"{self.name} raised an exception (status {status} of Numba)")

    def _load(self) -> _Loaded:
        with self._lock.now:
            if self._loaded is None:
                self._loaded = self._cached()
            return self._loaded

    def _cached(self) -> _Loaded:
        """The kernel from the cache if it is there and can be loaded; else compiled, and kept there."""
        cached = CachedKernel(self.name, self.key, host())
        code = cached.get()
        if code is not None:
            with suppress(RuntimeError):  # refused for any reason: compile it here
                return _Loaded(code)
        code = self._compiled()
        loaded = _Loaded(code)
        from qmm.kernels.runtime.build_cpu import has_usual_settings

        if has_usual_settings():
            cached.put(code)
        return loaded


class _Loaded:
    """Machine code in memory.

    Attributes:
        function: its entry point, which takes the arguments packed.
    """

    def __init__(self, code: Code) -> None:
        """Load it.

        Raises:
            RuntimeError: it is no object file for this machine, or needs a function that this process lacks.
        """
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine()
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)  # which holds the code
        file = binding.ObjectFileRef.from_data(code.code)
        if not file:
            raise RuntimeError(f"{code.entry}: no object file")
        for name in _undefined(file):
            if binding.address_of_symbol(name) is None:  # at which LLVM would end the process
                raise RuntimeError(f"{code.entry} needs {name}, which this process does not have")
        self._engine.add_object_file(file)
        self._engine.finalize_object()
        address = self._engine.get_function_address(code.entry)
        if not address:
            raise RuntimeError(f"{code.entry} is not in its object file")
        self.function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(address)


def _undefined(file: Any) -> Iterator[str]:
    """The functions that an ELF object file calls and does not have; none are found in another kind of file."""
    found = {section.name(): section.data() for section in file.sections() if section.name() in (SYMBOLS, NAMES)}
    names = found.get(NAMES, b"")
    for name, _, _, section, _, _ in SYMBOL.iter_unpack(found.get(SYMBOLS, b"")):
        if name and not section:
            yield names[name : names.index(b"\0", name)].decode()


def host() -> dict[str, Any] | None:
    """What machine code depends on besides the kernel: the CPU's name and features, and Numba's settings in the
    environment. None if settings may come from a file."""
    if Path(SETTINGS_FILE).exists():
        return None
    settings = {name: value for name, value in os.environ.items() if name.startswith(SETTING_PREFIX)}
    return {**_cpu(), "settings": settings}


@functools.cache
def _cpu() -> dict[str, str]:
    from llvmlite import binding

    try:
        features = binding.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know them on every platform; Numba then does without
        features = ""
    return {"cpu": binding.get_host_cpu_name(), "features": features, "triple": binding.get_process_triple()}
