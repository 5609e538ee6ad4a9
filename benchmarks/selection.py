"""Magnitude masks against sorting: python benchmarks/selection.py [--quick].

Masks the k smallest of n weights by counting digits, as `magnitude_mask` does, interleaved with a stable argsort and
`lax.top_k`. All select the same set. Temporary memory is what the compiled program allocates besides its argument and
result.
"""

from __future__ import annotations

import dataclasses
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
from timing import Effort, compare, function, temporary_bytes

import jaxweights as jw

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SPARSITY = 0.9
OURS, SORT, TOP = "#1f5fa8", "#d1495b", "#e0a458"


def by_argsort(k: int, w: jax.Array) -> jax.Array:
    order = jnp.argsort(jnp.abs(w), stable=True)
    return jnp.ones(w.shape, bool).at[order[:k]].set(False)


def by_top_k(k: int, w: jax.Array) -> jax.Array:
    # Reversed, since on ties top_k keeps the first but the mask prunes the first.
    kept = jax.lax.top_k(jnp.abs(w)[::-1], w.size - k)[1]
    return jnp.zeros(w.shape, bool).at[kept].set(True)[::-1]


OTHERS: dict[str, tuple[Callable[[int, jax.Array], jax.Array], str]] = {
    "argsort": (by_argsort, SORT),
    "top_k": (by_top_k, TOP),
}


def measure(size: int, dtype: Any, other: str, effort: Effort) -> dict[str, Any]:
    w = jnp.asarray(np.random.default_rng(0).standard_normal(size, np.float32), dtype)
    ours, theirs = lambda w: jw.magnitude_mask(w, SPARSITY), partial(OTHERS[other][0], round(SPARSITY * size))
    result = compare(function(ours, w), function(theirs, w), effort)
    same = bool(jax.jit(lambda w: jnp.array_equal(ours(w), theirs(w)))(w))
    return {
        "size": size,
        "dtype": jnp.dtype(dtype).name,
        "other": other,
        "speedup": dataclasses.asdict(result.ratio),
        "ours_s": result.ours.median,
        "theirs_s": result.theirs.median,
        "rounds": result.rounds,
        "same": same,
        "temporary": temporary_bytes(ours, w) / w.nbytes,
        "their_temporary": temporary_bytes(theirs, w) / w.nbytes,
    }


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    sizes = (10_000, 30_000) if options.quick else (1_000_000, 10_000_000, 100_000_000)
    effort = Effort(2, 0.1) if options.quick else Effort(10, 10)
    console = terminal()

    report: dict[str, Any] = {"environment": environment(), "quick": options.quick, "results": []}
    for size in sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            for other in OTHERS:
                with console.status(f"{size:,} {jnp.dtype(dtype).name} against {other}"):
                    report["results"].append(measure(size, dtype, other, effort))
    console.print(table(report["results"]))
    write(report, options.out, "selection", draw)


def table(results: list[dict[str, Any]]) -> Table:
    out = Table(title=f"the mask of {SPARSITY:.0%} zeros: how many times as fast as the other", title_justify="left")
    for name in ("weights", "dtype", "against", "times as fast", "ours, s", "other, s", "same set", "temporary / w"):
        out.add_column(name, justify="right", no_wrap=True)
    for r in results:
        q = r["speedup"]
        out.add_row(
            f"{r['size']:,}",
            r["dtype"],
            r["other"],
            f"{1 / q['median']:.1f} \\[{1 / q['high']:.1f}, {1 / q['low']:.1f}]",
            f"{r['ours_s']:.4f}",
            f"{r['theirs_s']:.3f}",
            "yes" if r["same"] else "[red]no[/]",
            f"{r['temporary']:.2f}, {r['their_temporary']:.2f}",
        )
    return out


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws seconds against size on logarithmic axes, one panel per dtype."""
    results = report["results"]
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    figure, panels = plt.subplots(1, len(dtypes), figsize=(9.5, 3.8), sharey=True, layout="constrained")
    for panel, dtype in zip(panels, dtypes, strict=True):
        of_dtype = [r for r in results if r["dtype"] == dtype]
        first = [r for r in of_dtype if r["other"] == next(iter(OTHERS))]
        panel.plot(
            [r["size"] for r in first], [r["ours_s"] for r in first], "o-", color=OURS, lw=2, label="by counting"
        )
        for other, (_, color) in OTHERS.items():
            those = [r for r in of_dtype if r["other"] == other]
            panel.plot([r["size"] for r in those], [r["theirs_s"] for r in those], "o-", color=color, lw=2, label=other)
            for r in those if other == "argsort" else []:
                panel.annotate(
                    f"{1 / r['speedup']['median']:.0f}×", (r["size"], r["theirs_s"]), (0, 6), fontsize=9,
                    textcoords="offset points", ha="center", color=color,
                )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="weights", title=dtype)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
    panels[0].set_ylabel("seconds for one mask")
    panels[0].legend(frameon=False)
    e = report["environment"]
    figure.suptitle(f"The mask of the smallest {SPARSITY:.0%}\n{e['device']}, jax {e['jax']}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
