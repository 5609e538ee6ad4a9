"""Prune a small network in three ways and show the result: python examples/seeing_sparsity.py.

One layer keeps 2 of every 4 inputs and is stored packed, one keeps a few blocks, and one keeps scattered weights. The
summary shows the pattern and size of each; the picture shows the density of each layer and two of the masks.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import optax
from image_data import batches, digits
from terminal import terminal

import jaxweights as jw

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTHS = (64, 256, 256, 128, 10)


def model(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """An MLP whose kernels are arrays or in sparse storage."""
    for i in range(len(WIDTHS) - 1):
        x = x @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"]
        x = jax.nn.relu(x) if i < len(WIDTHS) - 2 else x
    return x


def masks(params: dict[str, Any]) -> dict[str, jax.Array]:
    """Masks by magnitude: {layer: True where a weight is kept}."""
    kernel = lambda i: params[f"dense{i}"]["kernel"]
    return {
        "dense0": jw.magnitude_mask(kernel(0), (2, 4)),
        "dense1": jw.magnitude_mask(kernel(1), 0.8, structure=jw.pruning.Blocks(32, 32)),
        "dense2": jw.magnitude_mask(kernel(2), 0.9),
    }


def train(params: dict[str, Any], kept: dict[str, jax.Array], steps: int) -> dict[str, Any]:
    """Trains on the digits with Adam; pruned weights are zero after every step."""
    data, tx = digits(), optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    images, labels = jnp.asarray(data.train_images.reshape(-1, 64) / 16), jnp.asarray(data.train_labels)

    @jax.jit
    def step(params, opt, indices):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model(p, images[indices]), labels[indices])
        updates, opt = tx.update(jax.grad(lambda p: loss(p).mean())(params), opt)
        return mask(optax.apply_updates(params, updates), kept), opt

    opt = tx.init(params)
    for indices in batches(len(images), steps, 128, seed=0):
        params, opt = step(params, opt, indices)
    return params


def mask(params: dict[str, Any], kept: dict[str, jax.Array]) -> dict[str, Any]:
    return {n: p | ({"kernel": jnp.where(kept[n], p["kernel"], 0)} if n in kept else {}) for n, p in params.items()}


def accuracy(params: dict[str, Any]) -> float:
    data = digits()
    return float(
        jnp.mean(model(params, jnp.asarray(data.test_images.reshape(-1, 64) / 16)).argmax(-1) == data.test_labels)
    )


def picture(summary: jw.typing.Summary, stored: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(1.25, 1, 1))
    jw.plots.plot_density(summary, panel=panels[0])
    for panel, name in zip(panels[1:], ("dense1", "dense2"), strict=True):
        jw.plots.plot_mask(stored[name]["kernel"], panel=panel)
        panel.set_title(f"{name}/kernel", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> tuple[jw.typing.Summary, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("seeing_sparsity.png"), help="path of the picture")
    parser.add_argument("--steps", type=int, default=200, help="training steps before and after pruning")
    options = parser.parse_args(arguments)

    keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    shapes = itertools.pairwise(WIDTHS)
    params = {
        f"dense{i}": {"kernel": jw.he_normal(keys[i], shape), "bias": jnp.zeros(shape[1])}
        for i, shape in enumerate(shapes)
    }
    dense = train(params, {}, options.steps)
    kept = masks(dense)
    sparse = train(mask(dense, kept), kept, options.steps)
    store = {"dense0": jw.sparse.pack, "dense1": jw.sparse.pack_blocks, "dense2": jw.sparse.to_bcoo}
    stored = {n: p | ({"kernel": store[n](p["kernel"], kept[n])} if n in store else {}) for n, p in sparse.items()}

    console = terminal()
    summary = jw.summarize(stored)
    console.print(summary)
    accuracies = {"dense": accuracy(dense), "sparse": accuracy(sparse), "stored": accuracy(stored)}
    console.print(", ".join(f"{name} {value:.1%}" for name, value in accuracies.items()), "of the test images right")
    picture(jw.summarize(stored, "**/kernel"), stored, options.out)
    return summary, accuracies


if __name__ == "__main__":
    main()
