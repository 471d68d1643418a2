"""Measures configs of products on the GPU at hand, and writes the fastest ones for it into ``kernels/tuning/``.

    python -m benchmarks.tune h100 Q4_K:640x1024:8 F16:14336x4096:1    # TYPE:MxK:N, and :mapped behind it
    python -m benchmarks.tune h100 --bench                             # all cases of bench_matvec

Candidates are what :func:`qmm.kernels.ops.matvec.config.legal` allows near the rule's choice: first warps, rows of a
lane, tiles at once and units of a stage, then where activations are and how many stages are filled before them. They
are compiled by all CPUs at once, then timed by turns as in ``bench_matvec``: replays of graphs of products by copies of
the weight, cold in L2. A case is written where a candidate is faster than the rule's choice by GAIN or more, and the
products of both are the same but for the order of sums; a case that was written before is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.support import gpu as machine
from benchmarks.support.placed import GRAPH_PRODUCTS, Placed, Weight, allocated, in_a_mapped_file, in_device_memory
from benchmarks.support.rounds import Side, take_turns
from qmm.device import Device
from qmm.graph import replay
from qmm.kernels.formats import FORMATS
from qmm.kernels.ops.cpu.parallel import available_cpus
from qmm.kernels.ops.matvec.choose import rule
from qmm.kernels.ops.matvec.config import X_PLACES, Case, Config, Schedule, legal
from qmm.kernels.ops.matvec.plan import Product, scheduled
from qmm.kernels.ops.op import Operand, WeightLayout, alignment_of
from qmm.kernels.ops.tiling import MOST_STAGES
from qmm.kernels.tuning import Key
from qmm.sequence import Step, queue_sequence

FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "tuning"
GAIN = 0.015
ROUNDS = 15
SAME = 1e-10
"""NMSE of results whose float32 sums were taken in another order; a wrong weight makes far more."""


def shapes_near(case: Case, start: Config, device: Device) -> list[Config]:
    """Configs that differ from one in how the CTA's warps share rows, each with as many stages as fit."""
    found = []
    for warps, lane_rows, row_warps, units in itertools.product((4, 8, 16), (2, 4), (1, 2, 4), (1, 2, 4, 8)):
        for stages in range(MOST_STAGES, 1, -1):
            config = dataclasses.replace(
                start,
                warps=warps,
                lane_rows=lane_rows,
                row_warps=row_warps,
                units=units,
                stages=stages,
                first_stages=min(start.first_stages, stages),
            )
            if not legal(config, case, device.architecture):
                found.append(config)
                break
    return found


def ways_near(case: Case, start: Config, device: Device) -> list[Config]:
    """Configs that differ from one in where activations are, how many stages are filled before, and one stage less."""
    found = []
    for x, first, fewer in itertools.product(X_PLACES, (1, 2, 3, MOST_STAGES), (0, 1)):
        stages = start.stages - fewer
        config = dataclasses.replace(start, x=x, stages=stages, first_stages=min(first, stages))
        if not legal(config, case, device.architecture):
            found.append(config)
    return list(dict.fromkeys(found))


def product_of(case: Case, config: Config, device: Device) -> Product:
    """The plan of a case with a config."""
    schedule = Schedule.of(case, config, device.architecture)
    operands = Operand.contiguous(case.n, case.k), Operand.contiguous(case.n, case.m)
    layout = WeightLayout(case.alignment, case.mapped)
    return scheduled(case.block_format, case.m, case.k, layout, *operands, schedule, device.architecture)


@functools.cache
def _device() -> Device:
    return Device(0)


def _compile(type_name: str, fields: dict[str, Any], config: Config) -> None:
    case = Case(FORMATS[type_name], **fields)
    _device().prepare(product_of(case, config, _device()), "compiling")


def compile_all(pool: ProcessPoolExecutor, case: Case, configs: Sequence[Config]) -> None:
    """Fills the kernel cache."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    name = fields.pop("block_format").name
    for _ in pool.map(_compile, *zip(*[(name, fields, config) for config in configs], strict=True)):
        pass


def times_of(placed: Placed, case: Case, configs: Sequence[Config], x: np.ndarray) -> list[float]:
    """Microseconds of a product with each config, by turns; results must be those of the first."""
    device, weight = placed.gpu, placed.weight
    with contextlib.ExitStack() as held:
        source = allocated(device, x.nbytes, held)
        device.copy(source, x.ctypes.data, x.nbytes, device.stream)
        target = allocated(device, 4 * case.n * weight.m, held)
        sides, expected = [], None
        for number, config in enumerate(configs):
            prepared = device.prepare(product_of(case, config, device), "tuning")
            addresses = [placed.addresses[i % len(placed.addresses)] for i in range(placed.products)]
            steps = [Step(prepared, address, source, target) for address in addresses[:GRAPH_PRODUCTS]]
            queue_sequence(device, steps[:1], device.stream)
            y = np.empty((case.n, weight.m), np.float32)
            device.copy(y.ctypes.data, target, y.nbytes, device.stream)
            device.synchronize(device.stream)
            expected = y if expected is None else expected
            error = float(((y - expected).astype(np.float64) ** 2).sum() / (expected.astype(np.float64) ** 2).sum())
            assert error < SAME or config.x != configs[0].x, (config, error)
            work = functools.partial(queue_sequence, device, steps, device.stream, False)
            again = held.enter_context(replay(device, work, device.stream))
            sides.append(Side(str(number), again, lambda: device.synchronize(device.stream), len(steps)))
        quantiles = take_turns(None, sides, ROUNDS)
    return [quantiles[str(number)].median * 1e6 for number in range(len(configs))]


@contextlib.contextmanager
def placed_weight(weight: Weight, device: Device) -> Iterator[Placed]:
    """Copies of a weight where its placement has them."""
    with TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        if weight.placement == "mapped":
            yield held.enter_context(in_a_mapped_file(weight, device, Path(folder, "weight.gguf")))
        else:
            yield held.enter_context(in_device_memory(weight, device, None))


def tune(weight: Weight, n: int, device: Device, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """The fastest config of a case beside the rule's."""
    block_format = FORMATS[weight.type]
    alignment = alignment_of(16 | block_format.row_nbytes(weight.k))
    mapped = weight.placement == "mapped"
    case = Case(block_format, weight.m, weight.k, n, not block_format.plain, alignment, weight.k % 4 == 0, mapped)
    start = best = rule(case, device.architecture)
    x = np.random.default_rng(1).standard_normal((n, weight.k), dtype=np.float32)
    tried = 0
    with placed_weight(weight, device) as placed:
        for near in (shapes_near, ways_near):
            configs = list(dict.fromkeys([start, best, *near(case, best, device)]))
            compile_all(pool, case, configs)
            times = times_of(placed, case, configs, x)
            best, tried = configs[int(np.argmin(times))], tried + len(configs)
        us, rule_us = times_of(placed, case, [best, start], x)
    print(
        f"{weight.type} {weight.m}x{weight.k} n={n} {weight.placement}: {us:.2f} us, rule {rule_us:.2f}, {tried} tried"
    )
    print(f"    {best}\n    {start}", flush=True)
    return {
        "format": weight.type,
        "m": weight.m,
        "k": weight.k,
        "columns": case.columns,
        "int8": case.int8,
        "alignment": case.alignment,
        "fusible": case.fusible,
        "mapped": mapped,
        "config": dataclasses.asdict(best),
        "us": round(us, 3),
        "rule us": round(rule_us, 3),
    }


def write(name: str, found: Sequence[dict[str, Any]], device: Device, folder: Path = FOLDER) -> Path:
    """Keep what is faster than the rule, beside what the GPU's file has of other cases."""
    path = folder / f"{name}.json"
    head = {
        **machine.about(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "architecture": dataclasses.asdict(device.architecture),
    }
    kept = json.loads(path.read_text())["cases"] if path.exists() else []
    identity = ("m", "k", *Key._fields)
    renewed = {tuple(case[key] for key in identity) for case in found}
    cases = [case for case in kept if tuple(case[key] for key in identity) not in renewed]
    cases += [case for case in found if case["us"] < (1 - GAIN) * case["rule us"]]
    cases.sort(key=lambda case: tuple(str(case[key]) for key in ("format", *identity)))
    lines = ",\n  ".join(json.dumps(case) for case in cases)
    about = json.dumps(head, indent=1)[:-2]
    path.write_text(f'{about},\n "cases": [\n  {lines}\n ]\n}}\n')
    return path


def weight_of(text: str) -> tuple[Weight, int]:
    """``TYPE:MxK:N`` or ``TYPE:MxK:N:mapped``."""
    name, shape, n, *placement = text.split(":")
    m, k = map(int, shape.split("x"))
    return Weight("tuning", name, m, k, *(placement or ["device"])), int(n)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the GPU's file, such as h100")
    parser.add_argument("cases", nargs="*", help="TYPE:MxK:N, or TYPE:MxK:N:mapped")
    parser.add_argument("--bench", action="store_true", help="all cases of bench_matvec")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    given = parser.parse_intermixed_args()
    cases = [weight_of(text) for text in given.cases]
    if given.bench:
        from benchmarks.bench_matvec import CASES

        cases += [parameters.values for parameters in CASES]
    device = _device()
    found = []
    with ProcessPoolExecutor(available_cpus(), multiprocessing.get_context("spawn")) as pool:
        for weight, n in cases:
            found.append(tune(weight, n, device, pool))
            write(given.name, found, device, given.folder)


if __name__ == "__main__":
    main()
