"""Models by other authors, their layouts, and σ after `SpectralNorm`: python benchmarks/clients.py [--only GLOB].

Each model is taken as it is. It is built by its own code in a small configuration, with nothing downloaded, and skipped
where it is not installed:

    pip install jaxweights equinox gemma google-tunix mamba2-jax 'transformers<5' equimo flowjax dm-haiku keras brax \\
        sbx-rl tf-keras netket

σ is the largest singular value of each matrix, in float64. The reading of its axes is confirmed by gradients of the
model, without a look at its program: see readings.py. A kernel that has no more rows or columns than the model has
positions is not confirmed: its gradients fit any reading. So is one with masked entries, or with a second use.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

# Most of the time is compilation: quick code is not needed.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import jaxweights as jw  # noqa: E402

if TYPE_CHECKING:
    from client_models import Client
    from rich.table import Table

KEY = jax.random.key(0)


def measure(client: Client) -> dict[str, Any]:
    """What is found in a client, and how far from 1 the largest singular values are."""
    from readings import confirmed, gradients

    from jaxweights.core.axes import axes_or_default
    from jaxweights.levels.paths import flatten
    from jaxweights.models.layout_table import in_words

    start = time.perf_counter()
    layout, f, params, args = client.build()
    shapes = {w.path: w.shape for w in layout.weights}
    words = {path: in_words(axes, shapes[path]) for path, axes in layout.items()}
    params = jax.tree.map(shaken, params)
    of = flatten(jax.jit(lambda params: gradients(f, params, *args))(params)).by_path
    told = []
    for path, of_axes in words.items():
        roles = of_axes.replace("batch", "stack") if fnmatch.fnmatchcase(path, client.shared) else of_axes
        if confirmed(of[path], roles, client.positions):
            told.append(path)
    by_name, transform = jw.on_tree(jw.SpectralNorm()), jw.on_tree(jw.SpectralNorm(), layout=layout)

    def normalized(params: Any) -> Any:
        return [t.apply(params, t.init(params, KEY)) for t in (transform, by_name)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selected = by_name.selected(params)
        with_layout, without = jax.jit(normalized)(params)
    guessed = {p: in_words(axes_or_default(t.axes, len(shapes[p])), shapes[p]) for p, t in selected.items()}
    return {
        **{name: getattr(client, name) for name in ("name", "package", "framework", "line")},
        "version": importlib.metadata.version(client.package),
        "kernels": len(layout),
        "confirmed": len(told),
        "not_confirmed": sorted(set(words) - set(told)),
        "skipped": dict(Counter(layout.skipped.values())),
        "with": off(with_layout, words),
        "without": off(without, words),
        "read_otherwise": sorted(path for path in words if guessed.get(path) != words[path]),
        "no_kernels": sorted(set(guessed) - set(words)),
        "warnings": sum(w.category.__module__.startswith("jaxweights") for w in caught),
        "seconds": round(time.perf_counter() - start, 1),
    }


def shaken(leaf: Any) -> Any:
    """A weight with random numbers added: none is zero, and no two columns are equal."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    rng = np.random.default_rng(leaf.size)
    return (leaf.astype(jnp.float32) + 0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)


def off(params: Any, words: dict[str, str]) -> float:
    """The largest |σ − 1| of all matrices."""
    from readings import singular_values

    from jaxweights.levels.paths import flatten

    weights = flatten(params).by_path
    sigmas = [singular_values(weights[path].astype(jnp.float32), of) for path, of in words.items()]
    return float(np.abs(np.concatenate(sigmas) - 1).max())


def table(results: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    out = Table(
        title="kernels that meet data, and their largest |σ − 1| after SpectralNorm()",
        caption="confirmed: by gradients. By name: by names and shapes alone, with warnings. That reads some kernels "
        "otherwise, and takes some other weights for kernels.",
    )
    for name in ("model", "package", "framework"):
        out.add_column(name)
    found = ("kernels", "confirmed", "other weights")
    for name in (*found, "σ − 1, layout", "σ − 1, by name", "read otherwise", "no kernels", "warnings"):
        out.add_column(name, justify="right")
    for r in results:
        color = "green" if r["with"] <= 0.01 else "red"
        out.add_row(
            *(r["name"], f"{r['package']} {r['version']}", r["framework"]),
            *(str(r["kernels"]), str(r["confirmed"]), str(sum(r["skipped"].values()))),
            *(f"[{color}]{r['with']:.1g}[/]", f"{r['without']:.1g}"),
            *(str(len(r["read_otherwise"])), str(len(r["no_kernels"])), str(r["warnings"])),
        )
    return out


def draw(report: dict[str, Any], path: Any) -> None:
    """σ with the layout and without, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = report["results"][::-1]
    figure, ax = plt.subplots(figsize=(8, 0.35 * len(results) + 1.2), layout="constrained")
    for name, label, marker in (("without", "names and shapes", "x"), ("with", "layout", "o")):
        ax.plot(
            [max(r[name], 1e-7) for r in results],
            range(len(results)),
            marker,
            label=label,
        )
    ax.axvline(0.01, color="gray", linewidth=0.8)
    ax.set(xscale="log", xlabel="largest |σ − 1| after SpectralNorm()")
    ax.set_yticks(range(len(results)), [f"{r['package']}: {r['name']}" for r in results])
    ax.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def in_new_process(package: str) -> list[dict[str, Any]] | str:
    """The results of all clients of a package, or why there are none. Some frameworks do not load beside others."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from client_models import CLIENTS
    from script import environment, parser, terminal, write

    accepted = parser(__doc__)
    accepted.add_argument("--only", default="*", metavar="GLOB", help="packages, such as 'google-*' or '[fe]*'")
    accepted.add_argument("--measure", help=argparse.SUPPRESS)
    options = accepted.parse_args()
    if options.measure is not None:
        print(json.dumps([measure(client) for client in CLIENTS if client.package == options.measure]))
        return
    console = terminal(170)
    packages = dict.fromkeys(c.package for c in CLIENTS if fnmatch.fnmatchcase(c.package, options.only))
    if not packages:
        raise SystemExit(f"--only {options.only!r} matches none of {sorted({c.package for c in CLIENTS})}")
    report: dict[str, Any] = {"environment": environment(), "quick": options.quick, "results": [], "skipped": {}}
    for package in packages:
        with console.status(package):
            found = in_new_process(package)
        if isinstance(found, str):
            console.print(f"{package} is skipped: {found}", highlight=False, markup=False)
            report["skipped"][package] = found
        else:
            report["results"] += found
    console.print(table(report["results"]))
    for line in dict.fromkeys(r["line"] for r in report["results"]):
        names = ", ".join(f"{r['name']} ({r['package']})" for r in report["results"] if r["line"] == line)
        console.print(f"{line}\n    {names}", highlight=False, markup=False)
    write(report, options.out, "clients", draw)
    console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
