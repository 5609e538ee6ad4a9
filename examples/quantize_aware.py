"""Train a small convolutional net for 4, 3 and 2 bits, with its batch norms folded while it trains.

    python examples/quantize_aware.py
    python examples/quantize_aware.py --quick

Batch norms disappear into the kernels before these are stored in few bits. So the loss folds them first and quantizes
what comes out: the gradient reaches kernels, scales and offsets, and training sees the weights that are stored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import image_data
import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.table import Table
from small_cnn import LinenCNN
from terminal import terminal

import jaxweights as jw

BATCH = 128
HE = jax.nn.initializers.he_normal()
NORMED, PLAIN = LinenCNN(("batch",) * 3, HE), LinenCNN(("none",) * 3, HE)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def minimize(loss: Any, params: Any, rest: Any, data: image_data.Data, steps: int, rate: float) -> tuple[Any, Any]:
    """Trains with Adam and a decaying rate. `loss(params, rest, images, labels)` returns (loss, rest)."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params, rest, state, key):
        i = jax.random.choice(key, len(images), (BATCH,))
        grads, rest = jax.grad(loss, has_aux=True)(params, rest, images[i], labels[i])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state

    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    state = tx.init(params)
    for key in jax.random.split(jax.random.key(1), steps):
        params, rest, state = step(params, rest, state, key)
    return params, rest


def train(data: image_data.Data, steps: int) -> tuple[Any, Any]:
    """The net with batch norms, trained in float32: (parameters, running statistics)."""

    def loss(params, stats, images, labels):
        variables = {"params": params, "batch_stats": stats}
        logits, new = NORMED.apply(variables, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, labels), new["batch_stats"]

    variables = NORMED.init(jax.random.key(0), data.train_images[:1], train=True)
    return minimize(loss, variables["params"], variables["batch_stats"], data, steps, 3e-3)


def train_quantized(params: Any, stats: Any, folds: Any, form: str, data: image_data.Data, steps: int) -> Any:
    """Goes on training the folded net on quantized kernels. The running statistics stay as they are."""
    fake = jw.on_tree(jw.FakeQuantize(form), where="**/kernel")

    def loss(params, stats, images, labels):
        folded = jw.fold_batch_norms(params, stats, folds)
        rounded = fake.apply(folded, fake.init(folded, jax.random.key(0)))
        return cross_entropy(PLAIN.apply({"params": rounded}, images, train=False), labels), stats

    params, _ = minimize(loss, params, stats, data, steps, 1e-3)
    return jw.fold_batch_norms(params, stats, folds)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains, prints the table, and returns {form: {way: accuracy, "kB": kilobytes}}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train for a few steps")
    quick = parser.parse_args(arguments).quick
    steps, data = (150 if quick else 600), image_data.load("digits")
    forms = ("int3", "int2") if quick else ("int4", "int3", "int2")

    @jax.jit
    def run(params, images):
        return jw.with_stored(lambda params, x: PLAIN.apply({"params": params}, x, train=False))(params, images)

    def accuracy(params) -> float:
        return float((run(params, data.test_images).argmax(1) == data.test_labels).mean())

    def stored(params, form):
        return jw.one_shot(params, jw.methods.RoundToNearest(form), where="**/kernel", layout=layout)

    def kilobytes(params) -> float:
        return sum(a.nbytes for a in jax.tree.leaves(params)) / 1000

    params, stats = train(data, steps)
    variables = {"params": params, "batch_stats": stats}
    images = data.test_images[:1]
    folds = jw.norm_folds(
        lambda params, stats, x: NORMED.apply({"params": params, "batch_stats": stats}, x, train=False),
        *variables.values(),
        images,
    )
    folded = jw.fold_batch_norms(params, stats, folds)
    layout = jw.layout(lambda params, x: PLAIN.apply({"params": params}, x, train=False), folded, images)

    found = {"float32": {"as trained": accuracy(folded), "kB": kilobytes(folded)}}
    for form in forms:
        rounded = stored(folded, form)
        corrected = jw.correct_biases(
            lambda params, x: PLAIN.apply({"params": params}, x, train=False),
            folded,
            rounded,
            [data.train_images[:512]],
        )
        aware = stored(train_quantized(params, stats, folds, form, data, steps), form)
        found[form] = {"rounded": accuracy(rounded), "biases corrected": accuracy(corrected), "kB": kilobytes(aware)}
        found[form]["trained for it"] = accuracy(aware)

    ways = ("as trained", "rounded", "biases corrected", "trained for it")
    table = Table(title="Digits: accuracy on images held out", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("kernels")
    for heading in ("kB", *ways):
        table.add_column(heading, justify="right")
    for form, row in found.items():
        cells = [f"{100 * row[way]:.1f}%" if way in row else "" for way in ways]
        table.add_row(form, f"{row['kB']:.1f}", *cells)
    terminal().print(table)
    return found


if __name__ == "__main__":
    main()
