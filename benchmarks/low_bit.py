"""Products with low-bit weights against the float32 product: python benchmarks/low_bit.py [--quick].

Times x @ q for every format and several numbers of rows of x, interleaved with x @ w in float32, and for clustered
weights also with a product after the whole weight was looked up. Between two products with a weight lie those with all
the others, more than caches hold, so that weights are read from memory. A ratio below 1 means that the product with the
stored weight is faster.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.table import Table
from script import environment, parser, terminal, write
from timing import Comparison, temporary_bytes

import jaxweights as jw
from jaxweights import formats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FORMATS = {
    "int8": formats.integers(8),
    "int8, blocks of 128": formats.integers(8, block=128),
    "int6, blocks of 128": formats.integers(6, block=128),
    "int4": formats.integers(4),
    "int4, blocks of 128": formats.integers(4, block=128),
    "int4, blocks of 32": formats.integers(4, block=32),
    "int4, blocks of 128, zero points": formats.integers(4, block=128, symmetric=False),
    "int3, blocks of 128": formats.integers(3, block=128),
    "int2, blocks of 64": formats.integers(2, block=64),
    "nf4": formats.NF4,
    "fp8_e4m3": formats.FP8_E4M3,
    "mxfp4": formats.MXFP4,
    "nvfp4": formats.NVFP4,
    "binary": formats.BINARY,
}
CLUSTERS = {"16 clusters": 16, "64 clusters": 64, "256 clusters": 256}
DYNAMIC = ("int8", "int4, blocks of 128")
GOALS = {
    ("int8", 1): 0.48,
    ("int4, blocks of 128", 1): 0.45,
    ("nf4", 1): 1.3,
    **{
        (name, rows): goal
        for name in ("int8", "int4, blocks of 128")
        for rows, goal in ((4, 0.6), (16, 0.75), (128, 1.2))
    },
}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    side, rows, rounds = (256, (1, 4), 2) if options.quick else (4096, (1, 4, 16, 128), 41)
    console = terminal(140)
    report: dict[str, Any] = {"environment": environment(), "quick": options.quick, "side": side, "results": []}
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((side, side)), jnp.float32)
    stored: dict[str, Any] = {name: jw.quantize(w, form) for name, form in FORMATS.items()}
    stored |= {name: jw.store_clusters(*jw.cluster(w, n), has_zeros=False) for name, n in CLUSTERS.items()}
    for n in rows:
        x = jnp.asarray(rng.standard_normal((n, side)), jnp.float32)
        with console.status(f"{n} rows of x"):
            report["results"] += measure(w, x, stored, rounds)
    console.print(table(report["results"]))
    write(report, options.out, "low_bit", draw)


def measure(w: jax.Array, x: jax.Array, stored: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Rounds of one product each, of the float32 product and of every format, in alternating order."""
    functions = {"float32": (jnp.matmul, w), **{name: (jw.matmul, q) for name, q in stored.items()}}
    functions |= {f"{name}, int8 x": (jw.int8_matmul, stored[name]) for name in DYNAMIC}
    functions |= {f"{name}, looked up ahead": (look_up_ahead, stored[name]) for name in CLUSTERS}
    programs = {name: jax.jit(f).lower(x, weight).compile() for name, (f, weight) in functions.items()}
    exact = np.asarray(x, np.float64)
    errors = {
        name: relative_error(programs[name](x, q), exact @ np.asarray(dense(q), np.float64))
        for name, (_, q) in functions.items()
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds):
        for name in list(programs)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            jax.block_until_ready(programs[name](x, functions[name][1]))
            times[name].append(time.perf_counter() - start)
    results = []
    for name, (f, q) in functions.items():
        if name == "float32":
            continue
        found = Comparison.of(list(zip(times[name], times["float32"], strict=True)))
        results.append(
            {
                "format": name,
                "rows": len(x),
                "ratio": dataclasses.asdict(found.ratio),
                "goal": GOALS.get((name, len(x))),
                "ours_ms": found.ours.median * 1e3,
                "dense_ms": found.theirs.median * 1e3,
                "rounds": found.rounds,
                "error": errors[name],
                "temporaries": temporary_bytes(f, x, q),
                "bytes": sum(a.nbytes for a in jax.tree.leaves(q)) / w.nbytes,
            }
        )
    return results


def look_up_ahead(x: jax.Array, q: Any) -> jax.Array:
    return jnp.matmul(x, jax.lax.optimization_barrier(q.todense()), precision="highest")


def dense(q: Any) -> jax.Array:
    return q if isinstance(q, jax.Array) else q.todense()


def relative_error(y: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


def table(results: list[dict[str, Any]]) -> Table:
    out = Table(title="time of x @ q over x @ w in float32: median \\[quartiles]", title_justify="left")
    for name in ("format", "rows", "time", "goal", "ours, ms", "float32, ms", "error", "temporaries", "bytes"):
        out.add_column(name, justify="left" if name == "format" else "right", no_wrap=True)
    for i, r in enumerate(results):
        q, goal = r["ratio"], r["goal"]
        color = "default" if goal is None else "green" if q["median"] <= goal else "red"
        out.add_row(
            r["format"],
            str(r["rows"]),
            f"[{color}]{q['median']:.2f}[/] \\[{q['low']:.2f}, {q['high']:.2f}]",
            "" if goal is None else f"{goal:g}",
            f"{r['ours_ms']:.2f}",
            f"{r['dense_ms']:.2f}",
            f"{r['error']:.0e}",
            f"{r['temporaries'] / 2**20:.1f} MiB",
            f"{r['bytes']:.3f}",
            end_section=i + 1 == len(results) or results[i + 1]["rows"] != r["rows"],
        )
    return out


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the ratio of every format, one panel per number of rows of x. Looking up ahead is too slow to be seen."""
    results = [r for r in report["results"] if not r["format"].endswith("ahead")]
    names, rows = (list(dict.fromkeys(r[key] for r in results)) for key in ("format", "rows"))
    found = {(r["format"], r["rows"]): r["ratio"] for r in results}
    size = (2.6 * len(rows) + 2, 0.27 * len(names) + 1.5)
    figure, panels = plt.subplots(1, len(rows), figsize=size, sharey=True, layout="constrained")
    for panel, n in zip(panels, rows, strict=True):
        ratios = [found[name, n] for name in names]
        medians = np.array([r["median"] for r in ratios])
        spread = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        colors = ["#1f5fa8" if m <= 1 else "#b0562b" for m in medians]
        panel.barh(range(len(names)), medians, xerr=spread, color=colors, ecolor="0.6", height=0.7)
        for place, ratio in enumerate(ratios):
            panel.text(ratio["high"] + 0.03, place, f"{ratio['median']:.2f}", va="center", fontsize=7)
        panel.axvline(1, color="black", lw=1)
        panel.set_xlim(0, max(1.25, 1.2 * max(r["high"] for r in ratios)))
        panel.set_title(f"{n} row{'s' if n > 1 else ''} of x", fontsize=10)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    e = report["environment"]
    side = report["side"]
    title = f"x @ q, {side}×{side}, time over the float32 product"
    figure.suptitle(f"{title}\n{e['device']}, jax {e['jax']}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
