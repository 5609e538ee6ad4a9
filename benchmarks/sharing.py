"""Shared weights: python benchmarks/sharing.py [--quick].

Times x @ w for weights that share values by a pattern, by the structured product and by a dense product with the weight
built ahead, and the gradient in the codebook of both. And `ShareWeights.apply` on 100 million weights against a copy of
them: the means of groups, and the look-up in a learned codebook.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.table import Table
from script import environment, parser, terminal, write
from timing import Comparison, Effort, compare, function

import jaxweights as jw
from jaxweights.sharing import Circulant, Convolution, Toeplitz

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = 16  # of x
GROUPS = (16, 64, 256)
GOAL = 3
"""Copies that applying `ShareWeights` to 100 million weights may take."""


def patterns(quick: bool) -> dict[str, Any]:
    n, side, channels = (256, 8, 4) if quick else (4096, 32, 16)
    return {
        f"circulant, {n}×{n}": Circulant(shape=(n, n)),
        f"Toeplitz, {n}×{n}": Toeplitz(shape=(n, n)),
        f"convolution 3×3, {side}×{side}×3 to {channels}": Convolution((3, 3, 3, channels), (side, side, 3)),
        f"convolution 5×5, {side}×{side}×3 to {channels}": Convolution((5, 5, 3, channels), (side, side, 3)),
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    size, effort = (10**5, Effort(2, 1)) if options.quick else (10**8, Effort(15, 30))
    console = terminal(130)
    report: dict[str, Any] = {"environment": environment(), "quick": options.quick, "weights": size}
    report["products"] = []
    for name, pattern in patterns(options.quick).items():
        with console.status(name):
            report["products"].append({"pattern": name} | product(pattern, effort))
    with console.status(f"ShareWeights, {size:,} weights"):
        report["apply"] = applied(size, effort)
    console.print(products_table(report["products"]), apply_table(report))
    write(report, options.out, "sharing", draw)


def product(pattern: Any, effort: Effort) -> dict[str, Any]:
    """The structured product over the dense one, forwards and for the gradient in the codebook."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((ROWS, pattern.shape[0])), jnp.float32)
    codebook = jnp.asarray(rng.standard_normal(pattern.n_values), jnp.float32)
    w, dy = jw.share(codebook, pattern), jnp.ones((ROWS, pattern.shape[1]))

    def gradient(build: Any) -> Any:
        return jax.grad(lambda codebook, x: jnp.sum(build(x, codebook) * dy))

    dense = lambda x, codebook: jnp.matmul(x, jw.share(codebook, pattern), precision="highest")
    exact = np.float64(x) @ np.float64(w)
    found = compare(function(pattern.matmul, x, codebook), function(jnp.matmul, x, w), effort)
    backwards = compare(function(gradient(pattern.matmul), codebook, x), function(gradient(dense), codebook, x), effort)
    return {
        "values": codebook.size,
        "entries": w.size,
        "forward": figures(found),
        "gradient": figures(backwards),
        "error": float(np.linalg.norm(pattern.matmul(x, codebook) - exact) / np.linalg.norm(exact)),
    }


def applied(size: int, effort: Effort) -> list[dict[str, Any]]:
    """`ShareWeights.apply` over a copy of as many weights."""
    rng = np.random.default_rng(0)
    w, copy = jnp.asarray(rng.standard_normal(size, np.float32)), lambda w: jnp.copy(w)
    rows = []
    for n in GROUPS:
        state = {"index": jnp.asarray(rng.integers(0, n, size), jw.ShareWeights(n).init(w[:n], None)["index"].dtype)}
        run = function(jw.ShareWeights(n).apply, w, state)
        rows.append({"groups": n, "learned": False} | figures(compare(run, function(copy, w), effort)))
        learned = jw.ShareWeights(n, codebook_gradient="sum")
        run = function(learned.apply, w, state | {"codebook": jnp.arange(n, dtype=jnp.float32)})
        rows.append({"groups": n, "learned": True} | figures(compare(run, function(copy, w), effort)))
    return rows


def figures(found: Comparison) -> dict[str, Any]:
    ms = {"ours_ms": found.ours.median * 1e3, "theirs_ms": found.theirs.median * 1e3}
    return {"ratio": dataclasses.asdict(found.ratio), "rounds": found.rounds} | ms


def spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} \\[{ratio['low']:.2f}, {ratio['high']:.2f}]"


def products_table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title=f"x @ w for {ROWS} rows, time over that of the dense weight", title_justify="left")
    for name in ("pattern", "values", "entries", "forward", "ms", "gradient", "ms", "error"):
        out.add_column(name, justify="left" if name == "pattern" else "right", no_wrap=True)
    for r in rows:
        cells = [c for way in ("forward", "gradient") for c in (spread(r[way]["ratio"]), f"{r[way]['ours_ms']:.2f}")]
        out.add_row(r["pattern"], f"{r['values']:,}", f"{r['entries']:,}", *cells, f"{r['error']:.0e}")
    return out


def apply_table(report: dict[str, Any]) -> Table:
    title = f"ShareWeights.apply on {report['weights']:,} weights, over a copy; goal {GOAL}"
    out = Table(title=title, title_justify="left")
    for name in ("groups", "value", "time", "ms", "copy, ms"):
        out.add_column(name, justify="left" if name == "value" else "right", no_wrap=True)
    for r in report["apply"]:
        value = "learned" if r["learned"] else "mean of the group"
        out.add_row(f"{r['groups']}", value, spread(r["ratio"]), f"{r['ours_ms']:.0f}", f"{r['theirs_ms']:.0f}")
    return out


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the milliseconds of structured and dense products, forwards and backwards."""
    rows = report["products"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.5 * len(rows) + 1.3), sharey=True, layout="constrained")
    for panel, way in zip(panels, ("forward", "gradient"), strict=True):
        for offset, side, color in ((-0.2, "ours_ms", "#1f5fa8"), (0.2, "theirs_ms", "#b0562b")):
            times = [r[way][side] for r in rows]
            label = "structured" if side == "ours_ms" else "dense"
            panel.barh([i + offset for i in range(len(rows))], times, 0.38, color=color, label=label)
            for i, ms in enumerate(times):
                panel.text(ms, i + offset, f" {ms:.3g} ms", va="center", fontsize=7)
        panel.set_xscale("log")
        panel.set_xlim(right=3 * max(r[way]["theirs_ms"] for r in rows))
        panel.set_title("x @ w" if way == "forward" else "gradient in the codebook", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [r["pattern"] for r in rows], fontsize=8)
    panels[0].invert_yaxis()
    panels[1].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Weights that share values by a pattern, {ROWS} rows of x: milliseconds", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
