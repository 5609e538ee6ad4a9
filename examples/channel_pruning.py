"""Remove channels from a trained residual network: python examples/channel_pruning.py [--data fashion-mnist].

The groups of coupled channels are found by tracing the model: the residual stream, which the stem and every block write
to; the two convolutions of a block and the batch norms between them; the hidden layer after the flatten. Removing the
channels of smallest norm leaves an ordinary, smaller model. It computes the same outputs as the model with those
channels masked, in less time. A short fine-tuning recovers the lost accuracy.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from functools import partial
from typing import Any

import flax.linen as nn
import image_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.table import Table
from terminal import terminal

import jaxweights as jw

BATCH = 128


class ResNet(nn.Module):
    """A stem, residual blocks with a 3x3 and a depthwise convolution, and two dense layers."""

    stem: int = 48
    blocks: tuple[int, ...] = (96, 96)
    hidden: int = 128

    @nn.compact
    def __call__(self, x, train: bool):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
        conv = lambda n, size, name, **options: nn.Conv(n, (size, size), use_bias=False, name=name, **options)
        x = nn.relu(norm("stem_norm")(conv(self.stem, 3, "stem")(x)))
        for i, n in enumerate(self.blocks):
            y = nn.relu(norm(f"expand{i}_norm")(conv(n, 3, f"expand{i}")(x)))
            y = nn.relu(norm(f"depthwise{i}_norm")(conv(n, 3, f"depthwise{i}", feature_group_count=n)(y)))
            x = nn.relu(x + norm(f"project{i}_norm")(conv(self.stem, 1, f"project{i}")(y)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


def model_of(variables: dict[str, Any]) -> ResNet:
    """The model whose widths match these weights."""
    width = lambda name: variables["params"][name]["kernel"].shape[-1]
    return ResNet(width("stem"), tuple(width(f"expand{i}") for i in range(len(ResNet.blocks))), width("hidden"))


def layers(group: jw.units.UnitGroup, reads: bool) -> str:
    """The layers that read the units of a group, or the layers that produce them."""
    kernels = [s.path.split("/") for s in group.slots if s.reads == reads and s.path.endswith("kernel")]
    return ", ".join(path[-2] for path in kernels)


@jax.jit
def logits(variables: dict[str, Any], images: jax.Array) -> jax.Array:
    return model_of(variables).apply(variables, images, False)


def accuracy(variables: dict[str, Any], images: jax.Array, labels: np.ndarray) -> float:
    return float(np.mean([np.mean(logits(variables, x).argmax(-1) == y) for x, y in zip(images, labels, strict=True)]))


def times(models: list[dict[str, Any]], x: jax.Array, rounds: int) -> np.ndarray:
    """Milliseconds per call on `x`, models interleaved, shape (rounds, models)."""
    samples = np.empty((rounds, len(models)))
    for i, j in np.ndindex(samples.shape):
        start = time.perf_counter()
        jax.block_until_ready(logits(models[j], x))
        samples[i, j] = 1e3 * (time.perf_counter() - start)
    return samples


def train(variables: dict[str, Any], data: image_data.Data, steps: int, rate: float) -> dict[str, Any]:
    model, tx = model_of(variables), optax.adam(optax.cosine_decay_schedule(rate, steps))
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)

    @partial(jax.jit, donate_argnums=0)
    def step(state, indices):
        params, stats, opt = state

        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, moved = model.apply(variables, images[indices], True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[indices]).mean(), moved

        grads, moved = jax.grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), moved["batch_stats"], opt

    state = (*(jax.tree.map(jnp.copy, variables[n]) for n in ("params", "batch_stats")), tx.init(variables["params"]))
    for indices in image_data.batches(len(images), steps, BATCH, seed=0):
        state = step(state, indices)
    return {"params": state[0], "batch_stats": state[1]}


@dataclasses.dataclass(frozen=True)
class Result:
    """The model before and after pruning."""

    groups: dict[tuple[str, str], tuple[int, int]]
    """{(layers that produce the units, layers that read them): (units before, units after)}"""
    accuracy: dict[str, float]
    entries: tuple[int, int]
    """Number of weights before and after."""
    batch: int
    milliseconds: tuple[float, ...]
    """Time per batch before and after."""
    ratio: float
    """Time after divided by time before."""
    difference: float
    """Largest difference between the logits of the masked and the smaller model, relative to the largest logit."""


def main(arguments: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--remove", type=float, default=0.6, help="fraction of the units of each group")
    parser.add_argument("--steps", type=int, default=200, help="training steps; fine-tuning takes half as many")
    parser.add_argument("--quick", action="store_true", help="smoke test with few steps")
    options = parser.parse_args(arguments)
    steps = 4 if options.quick else options.steps

    data = image_data.load(options.data)
    size = max(n for n in range(1, 251) if len(data.test_labels) % n == 0)
    images = jnp.asarray(data.test_images.reshape(-1, size, *data.test_images.shape[1:]))
    test = partial(accuracy, images=images, labels=data.test_labels.reshape(-1, size))
    init = jax.jit(partial(ResNet().init, train=False))
    trained = train(init(jax.random.key(0), images[0]), data, steps, 3e-3)

    groups = jw.units.unit_groups(logits, trained, images[0])
    keep = {g: jw.magnitude_mask(jw.units.unit_norms(trained, g), options.remove) for g in groups}
    masked, small = jw.units.mask_units(trained, keep), jw.units.remove_units(trained, keep)
    models = {"as trained": trained, "masked": masked, "removed": small}
    models["trained on"] = train(small, data, max(steps // 2, 1), 1e-3)

    y, expected = logits(small, images[0]), logits(masked, images[0])
    accuracies = {name: test(variables) for name, variables in models.items()}
    seconds = times([trained, small], images[0], 2 if options.quick else 30)
    count = lambda variables: sum(a.size for a in jax.tree.leaves(variables["params"]))
    result = Result(
        {(layers(g, False), layers(g, True)): (g.size, int(keep[g].sum())) for g in groups},
        accuracies,
        (count(trained), count(small)),
        size,
        tuple(np.median(seconds, 0)),
        float(np.median(seconds[:, 1] / seconds[:, 0])),
        float(jnp.abs(y - expected).max() / jnp.abs(expected).max()),
    )
    show(result, options.data)
    return result


def show(r: Result, data: str) -> None:
    console = terminal(100)
    units = Table(title="groups of units, found in the model", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("made by", "read by", "units", "kept"):
        units.add_column(heading, justify="left" if heading.endswith("by") else "right")
    for (made, read), (before, after) in r.groups.items():
        units.add_row(made, read, str(before), str(after))
    console.print(units)
    view = Table(title=f"a residual network on {data}", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("model", "test accuracy", "weights", f"ms for {r.batch} images"):
        view.add_column(heading, justify="left" if heading == "model" else "right")
    rows = zip(r.accuracy.items(), (0, 0, 1, 1), strict=True)
    for (name, accuracy), i in rows:
        view.add_row(name, f"{accuracy:.1%}", f"{r.entries[i]:,}", f"{r.milliseconds[i]:.2f}")
    view.caption = (
        f"Removed and masked differ by {r.difference:.0e} of the largest logit. Time {r.ratio:.2f} of that before."
    )
    console.print(view)


if __name__ == "__main__":
    main()
