"""Every CUDA kernel compiles for every target, keeps its values in registers, and reads the weights as it should.

No GPU is needed: ``ptx_compile.py`` says how, ``ptx_kernels.py`` which kernels, ``conftest.py`` when, and
``ptx_budgets.py`` what each may take.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import tiers
from numba import cuda
from numba.cuda import types
from ptx_budgets import PATH, Assembled, Budget, anonymous, budget_of, budgets, digest_of, growth, written
from ptx_compile import Compiled, compile_kernel, compile_spec, problems, ptx_of_target, ptxas_version
from ptx_kernels import (
    AMPERE,
    FAMILIES,
    HOPPER,
    MAKERS,
    TARGETS,
    Spec,
    groups,
    of_dequantization,
    of_product,
)

from qmm.kernels import ops
from qmm.kernels.formats import FORMATS
from qmm.kernels.lang.constants import Constants
from qmm.kernels.lang.ptx.global_memory import load_global_float, store_global_float
from qmm.kernels.lang.specialize import specialize
from qmm.kernels.lang.targets.cuda import CUDATarget
from qmm.kernels.ops.matvec.config import Schedule

GROUPS = groups(tiers.every)
BULK_COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
COPY = "cp.async.cg.shared.global"
PREFETCH = "cp.async.bulk.prefetch.L2.global"
RESULTS = ("st.global.f32", "st.global.v4.f32", "red.global.add.f32")
OF_WEIGHTS = [group for group in GROUPS if group not in ("naive", "activations", "probes")]
each_target = pytest.mark.parametrize(
    ("group", "target"),
    [
        pytest.param(group, target, id=f"{group}-{target}")
        for group, specs in GROUPS.items()
        for target in dict.fromkeys(target for targets in specs.values() for target in targets)
    ],
)


def test_every_kernel_of_the_operations_is_compiled_here() -> None:
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]
    cached = [value for module in modules for value in vars(module).values() if callable(value)]
    functions = [function for function in map(inspect.unwrap, cached) if inspect.isfunction(function)]
    makers = {function.__name__ for function in functions if function.__annotations__.get("return") == "Kernel"}
    assert {name for name in makers if not name.startswith("_")} == set(MAKERS)
    assert {spec.maker for specs in GROUPS.values() for spec in specs} == set(MAKERS)


@each_target
def test_kernels_keep_their_values_in_registers(
    group: str, target: str, compiled: dict[Spec, Future[Compiled]]
) -> None:
    specs = [spec for spec, targets in GROUPS[group].items() if target in targets]
    assert [problem for spec in specs for problem in problems(compiled[spec].result(), target)] == []


@each_target
def test_kernels_keep_to_their_budgets(group: str, target: str, compiled: dict[Spec, Future[Compiled]]) -> None:
    exceeded = []
    for spec in (spec for spec, targets in GROUPS[group].items() if target in targets):
        budget, found = budget_of(spec.use, target), compiled[spec].result().assembled[target]
        grown = growth(budget, found) if budget else "no budget"
        exceeded += [f"{spec.use}, {target}: {grown}"] if grown else []
    assert exceeded == [], (
        f"if that is as it must be: python tests/support/write_budgets.py {group}. "
        f"The budgets are of {dict(budgets().versions)}; this is ptxas {ptxas_version()}."
    )


@pytest.mark.parametrize("group", OF_WEIGHTS)
def test_weights_are_read_by_asynchronous_copies_and_at_edges_only(
    group: str, compiled: dict[Spec, Future[Compiled]]
) -> None:
    for spec in GROUPS[group]:
        _, *how = spec.arguments  # a schedule; or a tiling, and whether the GPU has bulk copies
        tiling, bulk = (how[0].tiling, how[0].bulk) if isinstance(how[0], Schedule) else how
        alignment = tiling.alignment
        # In pieces where 16 bytes would reach outside: never if all rows are aligned.
        edges = {f"ld.global.b{8 * min(4, alignment)}"} if alignment < 16 else set()
        for text in compiled[spec].result().ptx.values():
            of_weights, others = global_accesses(text)
            assert set(of_weights) == {BULK_COPY if bulk else COPY} | edges, spec
            # Activations may be what the kernel before wrote, which this one was started before the end of: no `.nc`.
            others = [access for access in others if access not in (*RESULTS, PREFETCH, BULK_COPY)]
            assert all(access.startswith("ld.global.") and ".nc" not in access for access in others), spec
            assert not others or spec.maker == "matvec_kernel", spec


@pytest.mark.parametrize("group", ["activations"])
def test_activations_and_results_are_read_as_the_kernel_before_left_them(
    group: str, compiled: dict[Spec, Future[Compiled]]
) -> None:
    for spec in GROUPS[group]:
        for text in compiled[spec].result().ptx.values():
            of_source, others = global_accesses(text)
            assert set(of_source) in ({"ld.global.f32"}, {"ld.global.b16"}), spec
            assert others, spec
            assert all(access.startswith("st.global.") for access in others), spec


@pytest.mark.parametrize("group", ["probes"])
def test_probes_load_16_bytes_past_l1_and_nothing_else(group: str, compiled: dict[Spec, Future[Compiled]]) -> None:
    for spec in GROUPS[group]:
        if spec.maker == "read_kernel":
            continue
        (in_flight,) = spec.arguments
        for text in compiled[spec].result().ptx.values():
            of_source, others = global_accesses(text)
            assert set(of_source) == {"ld.global.nc.L1::no_allocate.v4.u32"}
            assert len(of_source) == 2 * in_flight, spec  # in the loop, and for the last tile
            assert others == ["st.global.b32"]


@pytest.mark.parametrize("group", OF_WEIGHTS)
def test_dequantize_rounds_the_product_before_the_difference(
    group: str, compiled: dict[Spec, Future[Compiled]]
) -> None:
    for spec in GROUPS[group]:
        if spec.maker != "dequantize_kernel":
            continue
        for text in compiled[spec].result().ptx.values():
            assert not re.search(r"\bfma\.", text), spec
            # `.rn` keeps ptxas from fusing them too. It may still fuse the products that a format makes of its scales
            # (mul.f32): 11 bits of a float16 by 8 are exact, fused or not.
            assert len(re.findall(r"mul\.rn\.f32", text)) == (0 if FORMATS[spec.arguments[0]].plain else products(spec))


def products(spec: Spec) -> int:
    """Weights that a lane of the dequantization makes in one stage."""
    name, tiling, _ = spec.arguments
    return 16 * FORMATS[name].runs * tiling.units * tiling.lane_rows


def global_accesses(text: str) -> tuple[list[str], list[str]]:
    """The instructions that access global memory, at addresses made from the first argument (weights) and others.

    Follows values from register to register, whatever the order of the instructions; registers of PTX are written once,
    or else where two paths meet, and then both writes count.
    """
    instructions: list[tuple[str, set[str], set[str], set[str]]] = []
    for statement in re.split(r"[;\n]", re.sub(r"//.*", "", text)):
        # Before an instruction may stand the brace or a label of inline PTX, and a predicate.
        match = re.match(r"\s*\{?\s*(?:\w+:\s*)?(?:@!?%?\w+\s+)?([a-z][\w.:]*)\s+(.*)$", statement)
        if not match:
            continue
        name, operands = match.groups()
        addresses = set(re.findall(r"%\w+", " ".join(re.findall(r"\[(.*?)\]", operands))))
        writes_nothing = name.startswith(("st.", "cp.", "bra", "ret", "bar", "mbarrier.init", "mbarrier.expect"))
        first = re.match(r"\{.*?\}|[^,]+", operands)
        targets = set() if writes_nothing or first is None else set(re.findall(r"%\w+", first[0]))
        sources = set(re.findall(r"%\w+", operands if first is None else operands[len(first[0]) :]))
        if name.startswith("ld.param") and operands.rstrip("]").endswith("_param_0"):
            sources.add("weights")
        instructions.append((name, targets, sources, addresses))
    tainted = {"weights"}
    while True:
        found = {target for _, targets, sources, _ in instructions if sources & tainted for target in targets}
        if found <= tainted:
            break
        tainted |= found
    accesses = [entry for entry in instructions if re.match(r"(ld|st|cp|atom|red)\b", entry[0])]
    accesses = [entry for entry in accesses if not re.match(r"(ld|st)\.(shared|param)|cp\.async\.mbarrier", entry[0])]
    assert accesses, "no access to global memory was found: the PTX is not what this expects"
    # A copy names two addresses, of shared and of global memory, and the ring's place holds the phase of the weights.
    of_weights = [name for name, _, _, addresses in accesses if addresses & tainted]
    others = [name for name, _, _, addresses in accesses if not addresses & tainted]
    return of_weights, others


def kernel_for(use: str) -> Spec:
    (found,) = (spec for specs in GROUPS.values() for spec in specs if spec.use == use)
    return found


REPRESENTATIVES = {
    "int8": of_product("Q4_0", HOPPER, 8, int8=True),
    "f16": of_product("F16", AMPERE, 8, int8=False),
    "dequantize": of_dequantization("Q6_K", HOPPER),
    "quantize": kernel_for("quantize bfloat16 to f16, A100"),
    "cast": kernel_for("cast bfloat16"),
}


@pytest.fixture(scope="module")
def assembled(workers: ProcessPoolExecutor) -> dict[str, Future[Compiled]]:
    """REPRESENTATIVES by ptxas, whatever their budgets say: for the targets of these, and the last of each family."""
    last = {family[-1] for family in FAMILIES}
    targets = {name: last | budgets().kernels[spec.use].keys() for name, spec in REPRESENTATIVES.items()}
    return {name: workers.submit(compile_spec, spec, targets[name]) for name, spec in REPRESENTATIVES.items()}


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_one_compilation_serves_a_family_of_targets(
    name: str, workers: ProcessPoolExecutor, assembled: dict[str, Future[Compiled]]
) -> None:
    spec = REPRESENTATIVES[name]
    # Products take seconds for each target: one that the compilation to compare with was not for is enough.
    every = tiers.every or spec.maker != "matvec_kernel"
    targets = {family: family if every else family[:1] for family in FAMILIES}
    jobs = {target: workers.submit(ptx_of_target, spec, target) for family in FAMILIES for target in targets[family]}
    for family in FAMILIES:
        texts = {anonymous(jobs[target].result()) for target in targets[family]}
        assert len(texts) == 1, f"NVVM makes {len(texts)} different kernels for {family}"
        assert texts == {anonymous(assembled[name].result().ptx[family])}


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_what_is_believed_of_the_budgets_is_so(name: str, assembled: dict[str, Future[Compiled]]) -> None:
    found = assembled[name].result()
    for target, budget in budgets().kernels[REPRESENTATIVES[name].use].items():
        (text,) = (text for family, text in found.ptx.items() if target in family)
        assert not growth(budget, found.assembled[target])
        if (budget.ptx, budgets().versions["ptxas"]) == (digest_of(text), ptxas_version()):
            assert found.assembled[target] == Assembled(budget.registers, budget.instructions)


def test_every_kernel_has_a_budget_for_each_of_its_targets_and_nothing_else_has() -> None:
    expected = {spec.use: set(targets) for specs in groups(True).values() for spec, targets in specs.items()}
    assert {use: set(targets) for use, targets in budgets().kernels.items()} == expected
    usual = {spec.use: set(targets) for specs in groups(False).values() for spec, targets in specs.items()}
    assert usual.items() <= expected.items()


def test_the_budgets_are_as_they_were_written() -> None:
    assert PATH.read_text(encoding="utf-8") == written(*budgets())
    assert json.loads(written({}, {}))["kernels"] == {}


def test_growth_is_found_beyond_its_allowance() -> None:
    budget = Budget("", 100, 1000)
    assert growth(budget, Assembled(108, 1050)) == ""
    assert growth(budget, Assembled(109, 900)) == "109 registers, where it had 100"
    assert growth(budget, Assembled(90, 1056)) == "1056 instructions, where it had 1000"


def compiled_indexing() -> Compiled:
    function = specialize(indexing, Constants(), CUDATarget())
    return compile_kernel(function, types.void(types.int64, types.int64), "indexing", 32)


def spilling(live: int) -> object:
    """A kernel that needs ``live`` registers at once: as many loads, a barrier, and as many stores."""
    lines = ["def spilling(values):", *[f"    v{i} = values[{i}]" for i in range(live)], "    cuda.syncthreads()"]
    lines += [f"    values[{live - i}] = v{i} * v{(7 * i + 3) % live}" for i in range(live)]
    namespace = {"cuda": cuda}
    exec("\n".join(lines), namespace)
    return namespace["spilling"]


def indexing(address, index):
    """A kernel whose array is indexed by a variable, and so lies in memory."""
    array = cuda.local.array(256, types.float32)
    for i in range(256):
        array[i] = load_global_float(address + i * index)
    store_global_float(address, array[index])


def test_spills_are_found() -> None:
    compiled = compile_kernel(spilling(300), types.void(types.float32[::1]), "spilling", 1024)
    for target in TARGETS:
        assert any("spills" in problem for problem in problems(compiled, target)), target


def test_a_stack_frame_and_local_memory_are_found() -> None:
    compiled = compiled_indexing()
    for target in TARGETS:
        found = " ".join(problems(compiled, target))
        assert "stack frame" in found, target
        assert "local memory" in found, target


def test_other_accesses_to_the_weights_are_found() -> None:
    for text in compiled_indexing().ptx.values():
        of_weights, _ = global_accesses(text)
        assert set(of_weights) == {"ld.global.f32", "st.global.f32"}
