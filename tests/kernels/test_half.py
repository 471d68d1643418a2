"""float16 to float32 without an instruction for it: every value, and products on CPUs that have none."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
from children import command
from llvmlite import binding, ir

from qmm.kernels.lang.half import from_half, from_half_by_integers, has_instruction

VALUES = np.arange(1 << 16, dtype=np.uint16)
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")


def as_the_instruction_has_it() -> np.ndarray:
    """NumPy's values; a NaN keeps its sign and payload, and is quiet."""
    values = VALUES.view(np.float16)
    bits = values.astype(np.float32).view(np.uint32).copy()
    wide = VALUES.astype(np.uint32)
    quiet = (wide & 0x8000) << 16 | 0x7FC00000 | (wide & 0x3FF) << 13
    return np.where(np.isnan(values), quiet, bits)


def machine_of(cpu: str, features: str) -> binding.TargetMachine:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, jit=True)


def converted(convert: Callable[[ir.IRBuilder, ir.Value], ir.Value], lanes: int) -> np.ndarray:
    """All values, so many at a time, by code for this machine."""
    module = ir.Module()
    source, target = (ir.VectorType(kind, lanes) if lanes > 1 else kind for kind in (ir.HalfType(), ir.FloatType()))
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [source.as_pointer(), target.as_pointer()]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    value = builder.load(function.args[0])
    value.align = 2
    builder.store(convert(builder, value), function.args[1]).align = 4
    builder.ret_void()
    machine = machine_of(binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    compiled = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(engine.get_function_address("f"))
    found = np.empty(VALUES.size, np.uint32)
    for i in range(0, VALUES.size, lanes):
        compiled(VALUES.ctypes.data + 2 * i, found.ctypes.data + 4 * i)
    return found


@pytest.mark.parametrize("lanes", [1, 16])
def test_every_value_is_what_the_instruction_makes_of_it(lanes: int) -> None:
    np.testing.assert_array_equal(converted(from_half_by_integers, lanes), as_the_instruction_has_it())
    if has_instruction(machine_of(binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())):
        np.testing.assert_array_equal(converted(from_half, lanes), as_the_instruction_has_it())


@x86
@pytest.mark.parametrize(
    ("cpu", "features", "has"),
    [
        ("x86-64", "", False),
        ("x86-64-v2", "", False),
        ("sandybridge", "", False),
        ("ivybridge", "", True),
        ("x86-64-v3", "", True),
        ("x86-64-v3", "-f16c", False),
        ("x86-64-v3", "-avx", False),
        ("x86-64", "+f16c", True),
    ],
)
def test_whether_a_cpu_has_the_instruction(cpu: str, features: str, has: bool) -> None:
    assert has_instruction(machine_of(cpu, features)) == has


@x86
def test_a_cpu_without_the_instruction_multiplies_and_dequantizes_to_the_bit() -> None:
    code = """
import gguf, numpy as np
from gguf_files import random_blocks
from qmm.kernels.ops.cpu import products as cpu
from qmm.kernels.formats import FORMATS

rng = np.random.default_rng(0)
cases = [("F16", 8, 8192, ""), ("Q8_0", 3, 64, "int8"), ("Q4_K", 3, 512, "")]
for name, m, k, mode in cases:
    raw = np.frombuffer(random_blocks(name, (m, k), rng, False), np.uint8)
    weights = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(m, k)
    out, y = np.empty((m, k), np.float32), np.empty((1, m), np.float32)
    x = rng.standard_normal((1, k), dtype=np.float32)
    cpu.dequantize(FORMATS[name], raw.ctypes.data, m, k, out)
    if mode: cpu.matmul(FORMATS[name], raw.ctypes.data, m, k, x, y, mode)
    else: y[:] = x @ weights.T  # its product alone compiles for seconds
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    scale = np.linalg.norm(x) * np.linalg.norm(weights, axis=1)
    print(name, np.array_equal(out.view(np.uint32), weights.view(np.uint32)), np.all(np.abs(y - exact) < 0.01 * scale))
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(command(code), env=environment, capture_output=True, text=True, timeout=120, check=False)
    said = "".join(f"{name} True True\n" for name in ("F16", "Q8_0", "Q4_K"))
    assert (done.returncode, done.stdout) == (0, said), done.stderr
