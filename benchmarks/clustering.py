"""Clusters of weight values against scikit-learn and kmeans1d: python benchmarks/clustering.py [--quick].

Times `jw.cluster` from every start, and the k-means of the peers from one start each, with their default options, on
the same normal values. The error is Σ(w − codebook[index])² in float64, over that of our default. kmeans1d is exact; it
is left out where its tables would not fit, and where it is not installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.table import Table
from script import environment, parser, terminal, write
from sklearn.cluster import KMeans, MiniBatchKMeans
from timing import Comparison, Effort, compare, seconds

import jaxweights as jw

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STARTS = ("optimal", "linear", "density", "k-means++")
SIZES = ((10_000_000, 64), (1_000_000, 16), (10_000, 16))
MOST_FOR_EXACT = 20_000
"""Entries, with kmeans1d."""
PEERS = {"scikit-learn KMeans": KMeans, "scikit-learn MiniBatchKMeans": MiniBatchKMeans}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    sizes, effort = (((20_000, 8),), Effort(2, 5)) if options.quick else (SIZES, Effort(9, 60))
    console = terminal(120)
    exact = importlib.util.find_spec("kmeans1d") is not None
    versions = environment("scikit-learn", *(["kmeans1d"] if exact else []))
    report: dict[str, Any] = {"environment": versions, "quick": options.quick, "results": []}
    for size, n in sizes:
        with console.status(f"{size:,} entries in {n} clusters") as shown:
            report["results"] += measure(size, n, effort, exact and size <= MOST_FOR_EXACT, shown.update)
    console.print(table(report["results"]))
    if not exact:
        console.print("kmeans1d is not installed: left out")
    write(report, options.out, "clustering", draw)


def measure(size: int, n: int, effort: Effort, exact: bool, status: Callable[[str], Any]) -> list[dict[str, Any]]:
    """Rows: the default, then every other start and peer with its time over that of the default, in alternation."""
    w = np.random.default_rng(0).standard_normal(size, np.float32)
    arrays = jnp.asarray(w), jax.random.key(0)
    rows, programs = [], {}
    for start in STARTS:
        status(f"{size:,} entries in {n} clusters: {start}")
        compiled = jax.jit(ours(start, n)).lower(*arrays).compile()
        programs[start] = repeated(lambda compiled=compiled: jax.block_until_ready(compiled(*arrays)))
        row = {"method": f"jaxweights, {start}", "error": inertia(w, *compiled(*arrays))}
        rows.append(row | {"temporaries": compiled.memory_analysis().temp_size_in_bytes / w.nbytes})
    default, least = programs["optimal"], rows[0]["error"]
    for start, row in zip(STARTS, rows, strict=True):
        row |= {"error": row["error"] / least} | timed(compare(programs[start], default, effort))
    for name, method in PEERS.items():
        status(f"{size:,} entries in {n} clusters: {name}")
        fitted = method(n, n_init=1, random_state=0)
        run = repeated(partial(fitted.fit, w[:, None]))
        rows.append({"method": name} | timed(compare_once(run, default, effort)))
        rows[-1]["error"] = inertia(w, fitted.cluster_centers_.ravel(), fitted.labels_) / least
    if exact:
        import kmeans1d

        values = w.tolist()
        index, codebook = kmeans1d.cluster(values, n)
        run = repeated(partial(kmeans1d.cluster, values, n))
        rows.append({"method": "kmeans1d"} | timed(compare_once(run, default, effort)))
        rows[-1]["error"] = inertia(w, codebook, index) / least
    return [{"size": size, "clusters": n} | row for row in rows]


def ours(start: str, n: int) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    def f(w, key):
        return jw.cluster(w, n, start=start, key=key if start == "k-means++" else None)

    return f


def repeated(f: Callable[[], Any]) -> Callable[[int], None]:
    def run(n: int) -> None:
        for _ in range(n):
            f()

    return run


def compare_once(theirs: Callable[[int], None], default: Callable[[int], None], effort: Effort) -> Comparison:
    """Their first run, between runs of ours; more rounds of both if time is left."""
    default(1)
    before, slow, after = seconds(default, 1), seconds(theirs, 1), seconds(default, 1)
    if slow > effort.seconds / 4:
        return Comparison.of([(slow, before), (slow, after)])
    return compare(theirs, default, effort)


def timed(found: Comparison) -> dict[str, Any]:
    return {"seconds": found.ours.median, "ratio": dataclasses.asdict(found.ratio), "rounds": found.rounds}


def inertia(w: np.ndarray, codebook: Any, index: Any) -> float:
    return float(np.sum(np.square(np.float64(w) - np.asarray(codebook, np.float64)[np.asarray(index)])))


def table(results: list[dict[str, Any]]) -> Table:
    title = "k-means of normal values: seconds, time over ours, Σ(w − codebook[index])² over ours"
    out = Table(title=title, title_justify="left")
    for name in ("entries", "clusters", "method", "seconds", "time over ours", "error over ours", "temporaries"):
        out.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for i, r in enumerate(results):
        ratio, memory = r["ratio"], r.get("temporaries")
        out.add_row(
            f"{r['size']:,}",
            str(r["clusters"]),
            r["method"],
            f"{r['seconds']:.3g}",
            f"{ratio['median']:.2f} \\[{ratio['low']:.2f}, {ratio['high']:.2f}]",
            f"{r['error']:.6f}",
            "" if memory is None else f"{memory:.2f} w",
            end_section=i + 1 == len(results) or results[i + 1]["size"] != r["size"],
        )
    return out


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the time of every method over ours, one panel per size."""
    results = report["results"]
    sizes = list(dict.fromkeys((r["size"], r["clusters"]) for r in results))
    figure, panels = plt.subplots(1, len(sizes), figsize=(4.4 * len(sizes), 2.6), layout="constrained", squeeze=False)
    for panel, (size, n) in zip(panels[0], sizes, strict=True):
        rows = [r for r in results if (r["size"], r["clusters"]) == (size, n)]
        times = [r["seconds"] for r in rows]
        colors = ["#1f5fa8" if r["method"].startswith("jaxweights") else "#b0562b" for r in rows]
        panel.barh(range(len(rows)), times, color=colors, height=0.7)
        for place, r in enumerate(rows):
            words = f" {r['seconds']:.2g} s, error {r['error']:.4f}"
            panel.text(r["seconds"], place, words, va="center", fontsize=7)
        panel.set_xscale("log")
        panel.set_xlim(min(times) / 2, max(times) * 30)
        panel.set_yticks(range(len(rows)), [r["method"] for r in rows], fontsize=7)
        panel.set_title(f"{size:,} entries, {n} clusters", fontsize=9)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    e = report["environment"]
    figure.suptitle(f"k-means of normal values; the error is over that of the optimal start\n{e['device']}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
