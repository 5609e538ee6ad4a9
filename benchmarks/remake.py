"""Remake all figures and pictures that are shown: python benchmarks/remake.py [PART ...] [--render].

Runs the parts, all by default (hours on 2 cores), each in a process of its own: a part is a benchmark or an example. It
leaves a picture and, beside it, a JSON file: the command, the device, the versions and the figures. Then figures.py
writes the tables of README.md and of docs/measurements from these files. A part that fails does not stop the others.

The pages show results of a CPU. Those of another device go to benchmarks/results/<device>.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import re
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import jax
import reports
from script import environment

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "measurements").glob("*.md")))


def of_runs(results: dict[str, Any]) -> dict[str, Any]:
    names = ("early", "accuracy", "stored_accuracy", "sigma", "largest", "values", "zeros", "norm", "bytes")
    return {run: {name: float(getattr(r, name)) for name in names} for run, r in results.items()}


def of_methods(results: dict[str, Any]) -> dict[str, Any]:
    zeros = lambda r: [f"{s:.0%}" for s in r.sparsity.mean(1)]
    return {method: dict(zip(zeros(r), r.accuracy.tolist(), strict=True)) for method, r in results.items()}


def of_critics(results: dict[str, Any]) -> dict[str, Any]:
    return {
        critic: {"slope": r.curves.upper[-1], "distance": r.curves.distance[-1], "held_out": r.held_out}
        for critic, r in results.items()
    }


BENCHMARKS = {
    name: f"benchmarks/{name}.py"
    for name in (
        *("run", "spectral_norm", "norms", "selection", "sparse_matmul", "bf16_training", "clients"),
        *("quantization", "low_bit", "clustering", "sharing", "deep_compression"),
    )
}
EXAMPLES: dict[str, tuple[str, Callable[[Any], Any]]] = {  # and what of the results of `main` is kept
    "ten_techniques": ("examples/ten_techniques.py", of_runs),
    "minilm": ("examples/minilm.py", lambda cosines: cosines),
    "compress_minilm": ("examples/compress_minilm.py", lambda results: results),
    "sparse_training": ("examples/sparse_training.py", of_methods),
    "gan_digits": ("examples/gan.py", of_critics),
    "gan_fashion_mnist": ("examples/gan.py --data fashion-mnist", of_critics),
    "mup": ("examples/mup.py", lambda slopes: {way: s.tolist() for way, s in slopes.items()}),
    "seeing_sparsity": ("examples/seeing_sparsity.py", lambda found: found[1]),
}


def folders() -> tuple[Path, Path]:
    """Where results of benchmarks and of examples go on this device."""
    if jax.default_backend() == "cpu":
        return reports.RESULTS, reports.EXAMPLES
    other = reports.RESULTS / re.sub(r"\W+", "-", jax.devices()[0].device_kind.lower())
    return other, other


def benchmark(name: str) -> None:
    command, out, start = BENCHMARKS[name], folders()[0], time.perf_counter()
    sys.argv = [command, "--out", str(out)]
    runpy.run_path(str(ROOT / command), run_name="__main__")
    path = out / f"{jax.default_backend() if name == 'run' else name}.json"
    record(path, command, start, json.loads(path.read_text()))


def example(name: str) -> None:
    (command, keep), path, start = EXAMPLES[name], folders()[1] / f"{name}.json", time.perf_counter()
    script, *options = command.split()
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.path.append(str(reports.EXAMPLES))
    results = importlib.import_module(Path(script).stem).main([*options, "--out", str(path.with_suffix(".png"))])
    record(path, command, start, {"environment": environment(), "results": keep(results)})


def record(path: Path, command: str, start: float, report: dict[str, Any]) -> None:
    """Writes what was found, what made it, and a digest of the picture beside it: both are of one run."""
    made = {"command": f"python {command}", "seconds": round(time.perf_counter() - start)}
    digest = hashlib.sha256(path.with_suffix(".png").read_bytes()).hexdigest()
    path.write_text(json.dumps({**made, "picture_sha256": digest, **report}, indent=1) + "\n")


def succeeds(name: str) -> bool:
    """Runs a part in a new process, which prints its error if it fails."""
    process = multiprocessing.get_context("spawn").Process(
        target=benchmark if name in BENCHMARKS else example, args=[name]
    )
    process.start()
    process.join()
    return process.exitcode == 0


def main(arguments: list[str] | None = None) -> None:
    parts = [*BENCHMARKS, *EXAMPLES]
    accepted = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    accepted.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(parts)}")
    accepted.add_argument(
        "--render", action="store_true", help="write the pages from the results there are; run nothing"
    )
    options = accepted.parse_args(arguments)
    if unknown := sorted(set(options.parts) - set(parts)):
        accepted.error(f"no part is called {', '.join(unknown)}; the parts are {', '.join(parts)}")
    failed = []
    for name in [] if options.render else options.parts or parts:
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        if not succeeds(name):
            failed.append(name)
        print(f"== {name}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    for page in PAGES:
        page.write_text(figures.render(page.read_text()))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
