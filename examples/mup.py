"""Coordinate check of muP: activation size against network width during training.

    python examples/mup.py

Trains MLPs of several widths on scikit-learn's digits with Adam at one learning rate, under the standard
parametrization and under muP, and measures the mean |activation| of every layer after every step. Under muP it does not
depend on the width, so hyper-parameters tuned on a narrow network transfer to a wide one. Under the standard
parametrization it grows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import flax.linen as nn
import image_data
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich import box
from rich.progress import track
from rich.table import Table
from terminal import terminal

import jaxweights as jw

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LAYERS = ("hidden 1", "hidden 2", "hidden 3", "logits")
WAYS = {"standard": "standard parametrization", "muP": "muP"}
RATE = 0.001
BATCH = 128
BASE = 64
"""The base width, at which both parametrizations coincide."""


class MLP(nn.Module):
    """Returns the activations of every layer; the last are the logits."""

    width: int

    @nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        activations = []
        for _ in LAYERS[:-1]:
            activations.append(nn.Dense(self.width)(x))
            x = nn.relu(activations[-1])
        return [*activations, nn.Dense(10, kernel_init=jw.initializers.zeros)(x)]


def sizes(width: int, way: str, images: np.ndarray, labels: np.ndarray, seeds: range) -> np.ndarray:
    """Mean |activation| of shape (seed, step, layer); step 0 is before the first batch."""
    model, tx = MLP(width), optax.adam(RATE)
    base = jax.eval_shape(MLP(BASE).init, jax.random.key(0), images[0])
    if way == "muP":
        tx = optax.chain(tx, jw.scale_by_mup(base))

    def loss(params, images, labels):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images)[-1], labels).mean()

    def measure(params):
        return jnp.stack([jnp.abs(a).mean() for a in model.apply(params, images[0])])

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(jax.grad(loss)(params, *batch), opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), measure(params)

    @jax.jit
    @jax.vmap
    def train(key):
        params = model.init(key, images[0])
        if way == "muP":
            params = jw.mup_init(params, base)
        _, measured = jax.lax.scan(step, (params, tx.init(params)), (images, labels))
        return jnp.concatenate([measure(params)[None], measured])

    return np.asarray(train(jax.vmap(jax.random.key)(jnp.array(seeds))))


def slopes(widths: Sequence[int], measured: np.ndarray) -> np.ndarray:
    """Slope of log |activation| against log width at the last step, per layer; `measured` is (width, step, layer)."""
    return np.polyfit(np.log(widths), np.log(measured[:, -1]), 1)[0]


def table(widths: Sequence[int], measured: dict[str, np.ndarray]) -> None:
    steps = next(iter(measured.values())).shape[1] - 1
    view = Table(title=f"Mean |activation| after {steps} steps of Adam", title_justify="left", box=box.SIMPLE_HEAD)
    view.add_column("parametrization")
    view.add_column("layer")
    for width in widths:
        view.add_column(f"width\n{width}", justify="right")
    view.add_column("slope\nin log-log", justify="right")
    for way, sizes in measured.items():
        for i, (layer, slope) in enumerate(zip(LAYERS, slopes(widths, sizes), strict=True)):
            cells = [f"{size:.3g}" for size in sizes[:, -1, i]]
            last = layer == LAYERS[-1]
            view.add_row(WAYS[way] if i == 0 else "", layer, *cells, f"[bold cyan]{slope:+.2f}[/]", end_section=last)
    terminal().print(view)


def picture(path: str, widths: Sequence[int], measured: dict[str, np.ndarray]) -> None:
    """Draws size against width, one line per step, one row per parametrization and one column per layer."""
    steps = next(iter(measured.values())).shape[1] - 1
    colors = plt.get_cmap("viridis")(np.linspace(0.0, 0.92, steps + 1))
    figure, axes = plt.subplots(
        len(measured), len(LAYERS), figsize=(11, 5.8), layout="constrained", sharex=True, sharey="col", squeeze=False
    )
    for i in range(1, len(LAYERS) - 1):
        axes[0, i].sharey(axes[0, 0])
    for row, (way, sizes) in enumerate(measured.items()):
        for i, (a, slope) in enumerate(zip(axes[row], slopes(widths, sizes), strict=True)):
            for step in range(steps + 1):
                if sizes[:, step, i].min() > 0:  # the logits are 0 before the first step
                    a.plot(widths, sizes[:, step, i], "o-", ms=3, lw=1.5, color=colors[step])
            a.set_xscale("log", base=2)
            a.set_yscale("log", base=2 if i < len(LAYERS) - 1 else 10)
            a.set_xticks(widths, [str(w) if n % 2 == 0 else "" for n, w in enumerate(widths)])
            a.minorticks_off()
            a.grid(color="0.92")
            a.spines[["top", "right"]].set_visible(False)
            a.text(0.04, 0.97, f"slope {slope:+.2f}", transform=a.transAxes, va="top", weight="bold")
            if row == 0:
                a.set_title(LAYERS[i], weight="bold", fontsize=11)
            if row == len(measured) - 1:
                a.set_xlabel("width")
        axes[row, 0].set_ylabel(f"$\\bf{{{WAYS[way].replace(' ', '~')}}}$\nmean |activation|")
    for a in axes.flat:  # last, since setting the scale of a shared axis resets the formatter
        a.yaxis.set_major_formatter("{x:g}")
    norm = matplotlib.colors.BoundaryNorm(np.arange(-0.5, steps + 1), steps + 1)
    shown = matplotlib.cm.ScalarMappable(norm, matplotlib.colors.ListedColormap(colors))
    figure.colorbar(shown, ax=axes, label="step of Adam", ticks=range(0, steps + 1, max(1, steps // 5)), aspect=40)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the slopes at the last step, per layer, for each parametrization."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="number of initializations to average over")
    parser.add_argument("--out", default="mup.png", help="path of the picture")
    args = parser.parse_args(argv)

    data = image_data.load("digits")
    index = image_data.batches(len(data.train_labels), args.steps, BATCH, seed=0)
    images, labels = data.train_images[index], data.train_labels[index]
    work = [(way, width) for way in WAYS for width in args.widths]
    measured = {way: [] for way in WAYS}
    for way, width in track(work, description="training"):
        each = sizes(width, way, images, labels, range(args.seeds))
        measured[way].append(each.mean(0))
    measured = {way: np.stack(found) for way, found in measured.items()}
    table(args.widths, measured)
    picture(args.out, args.widths, measured)
    return {way: slopes(args.widths, found) for way, found in measured.items()}


if __name__ == "__main__":
    main()
