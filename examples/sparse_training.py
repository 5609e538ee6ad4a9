"""Train a CNN to 90%, 95% and 98% sparsity in three ways: python examples/sparse_training.py [--data fashion-mnist].

- one-shot: trains dense for half of the steps, prunes by magnitude once, and fine-tunes;
- gradual: prunes by magnitude during training, on Zhu and Gupta's cubic schedule;
- RigL: sparse throughout. Starts from a random mask (Erdős–Rényi-kernel densities), then repeatedly drops the smallest
  weights and grows those with the largest gradient.

Each is a spec for `jw.confine`, which wraps Adam, and trains for as many steps as the dense baseline. Magnitudes are
compared across all layers. All sparsities and seeds of a method train in one program. The accuracies are in
docs/measurements/sparsity.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import image_data
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table
from small_cnn import linen_model
from terminal import terminal

import jaxweights as jw

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH = 128
KERNELS = "*/kernel"
COLORS = {"one-shot": "#c0504d", "gradual": "#d9902f", "RigL": "#1f5fa8"}


def one_shot(sparsity: jax.Array, steps: int) -> jw.Transform:
    return jw.Prune(lambda step: sparsity * (step >= steps // 2), distribution=jw.pruning.Global())


def gradual(sparsity: jax.Array, steps: int) -> jw.Transform:
    ramp = jw.pruning.PolynomialSparsity(1.0, steps // 10, 7 * steps // 10, every=max(steps // 60, 1))
    return jw.Prune(lambda step: sparsity * ramp(step), distribution=jw.pruning.Global())


def rigl(sparsity: jax.Array, steps: int) -> jw.Transform:
    start = jw.Prune(sparsity, score=jw.scores.random, distribution=jw.pruning.ErdosRenyi())
    fraction = optax.cosine_decay_schedule(0.3, 3 * steps // 4)
    return jw.Regrow(start, grow=jw.scores.gradient, fraction=fraction, every=max(steps // 60, 1))


METHODS = {"one-shot": one_shot, "gradual": gradual, "RigL": rigl}


def train(
    method: Callable[[jax.Array, int], jw.Transform] | None,
    data: image_data.Data,
    rate: float,
    sparsity: jax.Array,
    seed: jax.Array,
    order: jax.Array,
) -> tuple[Any, jax.Array]:
    """Returns (weights, test accuracy) after training on the batches listed in `order`."""
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    steps = len(order)
    model = linen_model(images.shape[1:], ("batch", "batch", "batch"), jw.he_normal, seed=seed)
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    if method is not None:
        tx = jw.confine(tx, method(sparsity, steps), KERNELS, seed=seed)

    def loss(params, rest, batch):
        logits, rest = model.forward(params, rest, images[batch], True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean(), rest

    def step(state, batch):
        params, rest, opt = state
        grads, rest = jax.grad(loss, has_aux=True)(params, rest, batch)
        updates, opt = tx.update(grads, opt, params)
        return (optax.apply_updates(params, updates), rest, opt), None

    (params, rest, _), _ = jax.lax.scan(step, (model.params, model.rest, tx.init(model.params)), order)
    size = max(n for n in range(1, 1001) if len(data.test_labels) % n == 0)
    parts = jnp.asarray(data.test_images.reshape(-1, size, *images.shape[1:]))
    guesses = jax.lax.map(lambda part: jnp.argmax(model.forward(params, rest, part, False)[0], -1), parts)
    return params, jnp.mean(guesses.ravel() == data.test_labels)


class Result(NamedTuple):
    """The result of a method. All arrays have a leading axis of sparsities, then one of seeds."""

    params: Any
    accuracy: np.ndarray
    sparsity: np.ndarray
    """Measured sparsity of the kernels."""


def run(method, data: image_data.Data, rate: float, sparsities: list[float], seeds: int, steps: int) -> Result:
    """Trains with every sparsity and seed in one program."""
    orders = np.stack([image_data.batches(len(data.train_labels), steps, BATCH, seed) for seed in range(seeds)])
    pairs = [np.repeat(np.float32(sparsities), seeds), np.tile(np.arange(seeds), len(sparsities))]
    runs = jax.jit(jax.vmap(partial(train, method, data, rate)))(*pairs, orders[pairs[1]])
    params, accuracy = jax.tree.map(lambda a: np.asarray(a).reshape(len(sparsities), seeds, *a.shape[1:]), runs)
    kernels = [layer["kernel"] for layer in params.values() if "kernel" in layer]
    zeros = sum((w == 0).sum(tuple(range(2, w.ndim))) for w in kernels)
    return Result(params, accuracy, zeros / sum(w[0, 0].size for w in kernels))


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-3, help="initial learning rate")
    parser.add_argument("--out", default="sparse_training.png", help="path of the picture")
    options = parser.parse_args(arguments)

    data = image_data.load(options.data)
    go = partial(run, data=data, rate=options.rate, seeds=options.seeds, steps=options.steps)
    console = terminal(100)
    with console.status("training") as status:
        results = {"dense": go(None, sparsities=[0.0])}
        for name, method in METHODS.items():
            status.update(f"training: {name}")
            results[name] = go(method, sparsities=options.sparsity)
    show(console, results, options)
    picture(results, options)
    return results


def show(console: Console, results: dict[str, Result], options: argparse.Namespace) -> None:
    last = jax.tree.map(lambda a: a[-1, 0], results["RigL"].params)
    console.print(f"A network trained by RigL at {options.sparsity[-1]:.0%} zeros:")
    console.print(jw.summarize(last, KERNELS))
    title = f"test accuracy on {options.data}, {options.seeds} seeds, {options.steps} steps"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("zeros in the kernels", no_wrap=True)
    for sparsity in options.sparsity:
        table.add_column(f"{sparsity:.0%}", justify="right")
    spread = lambda a: f"{100 * a.mean():.1f} ± {100 * a.std():.1f}%"
    for name in METHODS:
        table.add_row(name, *(spread(a) for a in results[name].accuracy))
    table.caption = f"Dense: {spread(results['dense'].accuracy[0])}. Mean and standard deviation over the seeds."
    console.print(table)


def picture(results: dict[str, Result], options: argparse.Namespace) -> None:
    """Draws accuracy by sparsity, layer densities of the sparsest RigL network, and the mask of its largest layer."""
    figure, (curves, layers, mask) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=[5, 4, 4])
    places = np.arange(len(options.sparsity))
    dense = 100 * results["dense"].accuracy[0]
    curves.axhspan(dense.mean() - dense.std(), dense.mean() + dense.std(), color="0.9", lw=0)
    curves.axhline(dense.mean(), color="0.5", lw=1)
    curves.text(places[-1] + 0.3, dense.mean(), "dense", color="0.4", va="bottom", ha="right", fontsize=9)
    for i, name in enumerate(METHODS):
        accuracy, x, color = 100 * results[name].accuracy, places + 0.09 * (i - 1), COLORS[name]
        curves.errorbar(x, accuracy.mean(1), accuracy.std(1), color=color, lw=1.5, capsize=3, marker="o", label=name)
        curves.plot(np.repeat(x, options.seeds), accuracy.ravel(), ".", color=color, alpha=0.35, ms=5)
    curves.set_xticks(places, [f"{s:.0%}" for s in options.sparsity])
    curves.set_xlim(-0.35, places[-1] + 0.35)
    curves.set_xlabel("zeros in the kernels")
    curves.set_ylabel("test accuracy, %")
    curves.set_title(f"{options.data}, {options.seeds} seeds", loc="left", fontsize=11)
    curves.legend(frameon=False, loc="lower left")
    curves.spines[["top", "right"]].set_visible(False)
    curves.grid(axis="y", color="0.93")
    curves.set_axisbelow(True)
    network = jax.tree.map(lambda a: a[-1, 0], results["RigL"].params)
    jw.plots.plot_density(network, KERNELS, panel=layers)
    layers.set_title(f"RigL, {options.sparsity[-1]:.0%}: what each layer keeps", loc="left", fontsize=11)
    jw.plots.plot_mask(network["hidden"]["kernel"], panel=mask)
    mask.set_title("hidden/kernel: the weights it keeps", loc="left", fontsize=11)
    figure.savefig(options.out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
