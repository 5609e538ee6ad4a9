"""Sparse matmul against the dense product: python benchmarks/sparse_matmul.py [--quick].

Times x @ w for every format, at several sizes, for 1 and 64 rows, interleaved with the dense float32 product of the
same weight. A ratio above 1 means that the dense product is faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.table import Table
from script import environment, parser, terminal, write
from timing import Effort, compare, function

import jaxweights as jw

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#7a8ca3", "#1f5fa8", "#12325a")


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is pruned and stored."""

    name: str
    prune: Callable[[np.ndarray], np.ndarray]
    store: Callable[[jax.Array], Any]


def entries(density: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: np.where(np.random.default_rng(1).random(w.shape) < density, w, 0)


def blocks(density: float, size: int) -> Callable[[np.ndarray], np.ndarray]:
    def prune(w):
        kept = np.random.default_rng(1).random((w.shape[0] // size, w.shape[1] // size)) < density
        return np.where(kept.repeat(size, 0).repeat(size, 1), w, 0)

    return prune


def two_of_four(w: np.ndarray) -> np.ndarray:
    groups = np.abs(w.reshape(-1, 4, w.shape[1]))
    kept = np.argsort(np.argsort(groups, 1), 1) >= 2
    return np.where(kept.reshape(w.shape), w, 0)


FORMATS = [
    Format("packed 2:4", two_of_four, jw.sparse.pack),
    *(
        Format(
            f"{size}x{size} blocks, {density:.0%}",
            blocks(density, size),
            lambda w, s=size: jw.sparse.pack_blocks(w, block=(s, s)),
        )
        for size in (32, 128)
        for density in (0.25, 0.1)
    ),
    *(
        Format(f"{name}, {density:.0%}", entries(density), store)
        for name, store in (("BCOO", jw.sparse.to_bcoo), ("CSR", jw.sparse.to_csr))
        for density in (0.1, 0.01)
    ),
]


def measure(form: Format, side: int, rows: int, effort: Effort) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    w = jnp.asarray(form.prune(rng.standard_normal((side, side)).astype(np.float32)))
    x, stored = jnp.asarray(rng.standard_normal((rows, side)), jnp.float32), form.store(w)
    result = compare(function(jw.matmul, x, stored), function(jnp.matmul, x, w), effort)
    return {
        "format": form.name,
        "side": side,
        "rows": rows,
        "ratio": dataclasses.asdict(result.ratio),
        "ours_ms": result.ours.median * 1e3,
        "dense_ms": result.theirs.median * 1e3,
        "rounds": result.rounds,
        "bytes": sum(a.nbytes for a in jax.tree.leaves(stored)) / w.nbytes,
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    sides, rows = ((256,), (1, 4)) if options.quick else ((1024, 2048, 4096), (1, 64))
    effort = Effort(2, 0.1) if options.quick else Effort(20, 2)
    console = terminal(120)

    report: dict[str, Any] = {"environment": environment(), "quick": options.quick, "results": []}
    for form in FORMATS:
        for side in sides:
            for n in rows:
                with console.status(f"{form.name}, {n} x {side}² "):
                    report["results"].append(measure(form, side, n, effort))
    console.print(table(report["results"]))
    write(report, options.out, "sparse_matmul", draw)


def table(results: list[dict[str, Any]]) -> Table:
    out = Table(title="time of x @ w over the dense product: median \\[quartiles]", title_justify="left")
    for name in ("format", "side", "rows", "time", "ours, ms", "dense, ms", "bytes"):
        out.add_column(name, justify="left" if name == "format" else "right", no_wrap=True)
    for i, r in enumerate(results):
        q = r["ratio"]
        color = "green" if q["median"] < 1 else "red"
        last = i + 1 == len(results) or results[i + 1]["format"] != r["format"]
        out.add_row(
            r["format"],
            str(r["side"]),
            str(r["rows"]),
            f"[{color}]{q['median']:.2f}[/] \\[{q['low']:.2f}, {q['high']:.2f}]",
            f"{r['ours_ms']:.3f}",
            f"{r['dense_ms']:.3f}",
            f"{r['bytes']:.3f}",
            end_section=last,
        )
    return out


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the ratio of every format, one panel per number of rows, one bar per size, with bytes next to the names."""
    results = report["results"]
    names = list(dict.fromkeys(r["format"] for r in results))
    sides, rows = (sorted({r[key] for r in results}) for key in ("side", "rows"))
    found = {(r["format"], r["side"], r["rows"]): r for r in results}
    figure, panels = plt.subplots(
        1, len(rows), figsize=(11, 0.52 * len(names) + 1.4), sharex=True, sharey=True, layout="constrained"
    )
    height = 0.8 / len(sides)
    for panel, n in zip(panels, rows, strict=True):
        for i, (side, color) in enumerate(zip(sides, COLORS, strict=False)):
            quartiles = [found[name, side, n]["ratio"] for name in names]
            medians = np.array([q["median"] for q in quartiles])
            error = [[q["median"] - q["low"] for q in quartiles], [q["high"] - q["median"] for q in quartiles]]
            places = np.arange(len(names)) + (i - (len(sides) - 1) / 2) * height
            panel.barh(
                places,
                medians - 1,
                left=1,
                xerr=error,
                height=height * 0.9,
                color=color,
                ecolor="0.55",
                label=f"{side}²",
            )
            for place, q in zip(places, quartiles, strict=True):
                slower = q["median"] > 1
                x = q["high"] * 1.1 if slower else q["low"] / 1.1
                panel.text(x, place, f"{q['median']:.2g}", va="center", ha="left" if slower else "right", fontsize=7)
        panel.axvline(1, color="black", lw=1)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_title(f"{n} row{'s' if n > 1 else ''} of x", fontsize=10)
        panel.set_xlabel("← faster than dense (1)   slower →", fontsize=9)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
    share = [found[name, sides[-1], rows[0]]["bytes"] for name in names]
    panels[0].set_yticks(
        range(len(names)), [f"{n}\n{b:.1%} of the bytes" for n, b in zip(names, share, strict=True)], fontsize=8
    )
    panels[0].invert_yaxis()
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(low / 2, high * 2)
    panels[-1].legend(title="w", fontsize=8, title_fontsize=8, frameon=False, loc="lower right")
    e = report["environment"]
    figure.suptitle(
        f"x @ w from sparse storage, time over the dense float32 product\n{e['device']}, jax {e['jax']}", fontsize=10
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
