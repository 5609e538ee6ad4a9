"""Trace time of `project` on a tree of 1,000 weights: python benchmarks/tracing.py [--quick] [--before DIRECTORY].

`--before` names another checkout, such as a git worktree of an older commit, to measure in alternation: each round
starts one process per checkout. Seconds are CPU time, which background load affects less.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CASES = ("ClipWeights", "Chain(ClipWeights, Prune)", "Chain(ClipWeights, Prune(schedule))", "SpectralNorm")


def measure(n: int) -> dict[str, dict[str, float]]:
    """Returns {case: seconds to trace and to lower one update, and the number of equations}."""
    import jax
    import jax.numpy as jnp

    import jaxweights as jw

    def schedule(step):
        return jnp.minimum(0.01 * step, 0.9)

    clip = jw.ClipWeights(1.0)
    transforms = (clip, jw.Chain(clip, jw.Prune(0.5)), jw.Chain(clip, jw.Prune(schedule)), jw.SpectralNorm())
    params = {f"layer_{i}": {"kernel": jnp.full((8, 8), i / n)} for i in range(n)}
    results = {}
    for case, transform in zip(CASES, transforms, strict=True):
        tx = jw.project(transform, where="**/kernel")
        state = tx.init(params)
        trace_s, lower_s = [], []
        for _ in range(3):
            start = time.process_time()
            traced = jax.jit(lambda *arguments, tx=tx: tx.update(*arguments)).trace(params, state, params)
            trace_s.append(time.process_time() - start)
            start = time.process_time()
            traced.lower()
            lower_s.append(time.process_time() - start)
        results[case] = {"trace_s": min(trace_s), "lower_s": min(lower_s), "equations": len(traced.jaxpr.eqns)}
    return results


def run(checkout: Path, n: int) -> dict[str, dict[str, float]]:
    """Runs `measure` in a separate process that imports the library from `checkout`."""
    env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--measure", str(n)]
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def best(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Takes the minimum over all rounds."""
    return {case: {name: min(r[case][name] for r in rounds) for name in rounds[0][case]} for case in CASES}


def main() -> None:
    from rich.table import Table
    from script import environment, parser, terminal

    options = parser(__doc__)
    options.add_argument("--before", type=Path, help="another checkout of the library, measured in turn")
    options.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    n, rounds = (20, 1) if options.quick else (1000, 3)
    checkouts = {"now": ROOT} | ({"before": options.before} if options.before else {})
    samples = {name: [] for name in checkouts}
    for _ in range(rounds):
        for name, checkout in checkouts.items():
            samples[name].append(run(checkout, n))
    results = {name: best(rounds) for name, rounds in samples.items()}

    table = Table(title=f"project(...).update on {n:,} weights")
    for heading in (
        "transform",
        "equations",
        "trace, s",
        "lower, s",
        *(["trace, of before"] if options.before else []),
    ):
        table.add_column(heading, justify="left" if heading == "transform" else "right")
    for case, row in results["now"].items():
        ratio = [f"{row['trace_s'] / results['before'][case]['trace_s']:.2f}"] if options.before else []
        table.add_row(case, f"{row['equations']:,.0f}", f"{row['trace_s']:.2f}", f"{row['lower_s']:.2f}", *ratio)
    terminal().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"quick": options.quick, "environment": environment(), "weights": n, "results": results}
    path = options.out / f"tracing{'-quick' if options.quick else ''}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
