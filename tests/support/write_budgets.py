"""Writes tests/kernels/budgets.json: what ptxas makes of each CUDA kernel now.

    python tests/support/write_budgets.py             all kernels: ten minutes of two CPUs
    python tests/support/write_budgets.py Q4_K probes those of some groups (of ptx_kernels.groups)

What grew beyond its allowance is listed: say in the commit why that is right. A kernel that spills gets no budget.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version

from ptx_budgets import PATH, Budget, budgets, digest_of, growth, written
from ptx_compile import compile_spec, pool, problems, ptxas_version
from ptx_kernels import groups

COMPILERS = ("numba-cuda", "nvidia-nvvm")


def main() -> int:
    """Compile and write. The status is 1 where a kernel may have no budget."""
    every = groups(True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(every))
    asked = parser.parse_args().groups or list(every)
    if not every.keys() >= set(asked):
        parser.error(f"groups are {', '.join(every)}")
    versions = {"python": platform.python_version().rpartition(".")[0], **{name: version(name) for name in COMPILERS}}
    versions["ptxas"] = ptxas_version()
    if len(asked) < len(every) and versions != budgets().versions:
        parser.error(f"the file is of {budgets().versions}, this is {versions}: write all of it, or use those versions")
    specs = {spec: targets for name in asked for spec, targets in every[name].items()}
    made = {use: dict(budgets().kernels[use]) for use in budgets().kernels}
    refused = []
    with pool() as workers:
        jobs = {spec: workers.submit(compile_spec, spec, targets) for spec, targets in specs.items()}
        for count, (spec, job) in enumerate(jobs.items(), 1):
            print(f"\r{count} of {len(jobs)} kernels", end="", file=sys.stderr, flush=True)
            compiled = job.result()
            refused += [problem for target in specs[spec] for problem in problems(compiled, target)]
            texts = {target: text for family, text in compiled.ptx.items() for target in family}
            made[spec.use] = {
                target: Budget(digest_of(texts[target]), found.registers, found.instructions)
                for target, found in compiled.assembled.items()
            }
            for target, budget in budgets().kernels.get(spec.use, {}).items():
                grown = growth(budget, compiled.assembled[target]) if target in compiled.assembled else ""
                if grown:
                    print(f"\n{spec.use}, {target}: {grown}", file=sys.stderr)
    print(file=sys.stderr)
    if refused:
        print("\n".join(refused), file=sys.stderr)
        return 1
    uses = [spec.use for specs in every.values() for spec in specs]
    PATH.write_text(written(versions, {use: made[use] for use in uses if use in made}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
