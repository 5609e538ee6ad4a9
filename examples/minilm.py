"""Prune a sentence encoder in one shot: all kernels of MiniLM-L6, by magnitude, Wanda and SparseGPT, with and without
least-squares repair. Calibrates on some of Shakespeare's sentences and compares with the dense model on others.

See minilm_model.py for what to install. Nothing is downloaded at run time.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import jax
import matplotlib
import minilm_model
import numpy as np
from rich import box
from rich.progress import track
from rich.table import Table
from terminal import terminal

import jaxweights as jw
from jaxweights.methods import Magnitude, SparseGPT, Wanda

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PATTERNS = {"50%": 0.5, "60%": 0.6, "70%": 0.7, "2:4": (2, 4)}
METHODS = {  # the method at a sparsity, color and line width; a wide line stays visible under the next
    "magnitude": (Magnitude, "#9a9a9a", 2),
    "Wanda": (Wanda, "#8fbfe0", 2),
    "Wanda + repair": (partial(Wanda, reconstruct=True), "#1f5fa8", 6),
    "SparseGPT": (SparseGPT, "#f2b48a", 2),
    "SparseGPT + repair": (partial(SparseGPT, reconstruct=True), "#c8501e", 2),
}
EXAMPLES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=int, default=128, help="sentences of each length to calibrate on")
    parser.add_argument("--held-out", type=int, default=100, help="sentences of each length to compare on")
    parser.add_argument("--quick", action="store_true", help="few sentences, at 2:4 only, without repair")
    parser.add_argument("--out", default="minilm.png", help="path of the picture")
    options = parser.parse_args(arguments)
    if lacking := minilm_model.missing():
        sys.exit("this example needs packages that are not installed:\n  " + "\n  ".join(lacking))
    if options.quick:
        options.calibration, options.held_out = 16, 16
    patterns = {"2:4": PATTERNS["2:4"]} if options.quick else PATTERNS
    methods = [m for m in METHODS if "repair" not in m] if options.quick else list(METHODS)

    model, variables = minilm_model.MiniLM(), minilm_model.weights()
    show_examples(minilm_model.encode(model, variables, EXAMPLES))
    calibration = minilm_model.shakespeare(options.calibration, held_out=False)
    held_out = minilm_model.shakespeare(options.held_out, held_out=True)
    stats = jw.linen.capture(model, variables, calibration, "layers/**/kernel", progress=True)

    apply = jax.jit(model.apply)
    embed = lambda params: np.concatenate([apply({"params": params}, tokens) for tokens in held_out])
    dense = embed(variables["params"])
    cosines: dict[str, dict[str, float]] = {m: {} for m in methods}
    seconds: dict[str, list[float]] = {m: [] for m in methods}
    for pattern, method in track([(p, m) for p in patterns for m in methods], "prune"):
        start = time.perf_counter()
        params = jw.one_shot(variables["params"], METHODS[method][0](patterns[pattern]), stats)
        seconds[method].append(time.perf_counter() - start)
        cosines[method][pattern] = float(np.mean(np.sum(embed(params) * dense, 1)))
    table(cosines, seconds, sum(t.size for t in calibration), len(dense))
    picture(options.out, cosines)
    return cosines


def show_examples(embeddings: jax.Array) -> None:
    """Shows that similar sentences have similar embeddings."""
    view = Table(title="MiniLM-L6 in Flax: cosines", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "1", "2", "3"):
        view.add_column(heading, justify="right" if heading else "left")
    for i, cosines in enumerate(np.asarray(embeddings @ embeddings.T)):
        view.add_row(f"{i + 1}  {EXAMPLES[i]}", *(f"{c:.4f}" for c in cosines))
    print_table(view)


def table(cosines: dict[str, dict[str, float]], seconds: dict[str, list[float]], tokens: int, sentences: int) -> None:
    title = "Mean cosine to the dense model's embeddings"
    view = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    view.add_column("pruned by")
    patterns = list(next(iter(cosines.values())))
    for pattern in patterns:
        view.add_column(pattern, justify="right")
    view.add_column("time", justify="right")
    best = {p: max(c[p] for c in cosines.values()) for p in patterns}
    for method, of_method in cosines.items():
        cells = [f"[bold cyan]{c:.4f}[/]" if c == best[p] else f"{c:.4f}" for p, c in of_method.items()]
        view.add_row(method, *cells, f"{np.median(seconds[method]):.1f} s")
    view.caption = (
        f"All kernels of attention and of the perceptrons, {minilm_model.KERNELS:,} weights. Calibrated on {tokens:,} "
        f"tokens, compared on {sentences:,} sentences of other works. Time: of the whole model, with compiling."
    )
    print_table(view)


def print_table(view: Table) -> None:
    terminal(100).print(view)


def picture(path: str, cosines: dict[str, dict[str, float]]) -> None:
    """Draws cosine against sparsity, and cosine at 2:4."""
    figure, (curves, bars) = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=[3, 2], sharey=True
    )
    fractions = [p for p in PATTERNS if p != "2:4" and p in next(iter(cosines.values()))]
    for method, (_, color, width) in METHODS.items():
        if method not in cosines:
            continue
        values = [cosines[method][p] for p in fractions]
        curves.plot(fractions, values, "o-", color=color, lw=width, ms=width + 4, label=method)
        bar = bars.bar(method.replace(" + ", "\n+ "), cosines[method]["2:4"], color=color, width=0.7)
        bars.bar_label(bar, fmt="%.3f", padding=2, fontsize=9)
    curves.set(xlabel="weights set to zero", ylabel="mean cosine to the dense embeddings", title="any weights")
    curves.legend(frameon=False, loc="lower left")
    bars.set_title("2 of every 4 inputs kept")
    bars.tick_params(axis="x", length=0, labelsize=8)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    figure.suptitle("MiniLM-L6 sentence embeddings after one-shot pruning", x=0.01, ha="left", weight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
