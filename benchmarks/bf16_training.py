"""Training in bfloat16 beside float32: python benchmarks/bf16_training.py [--quick].

An MLP of 64-128-128-10 units learns scikit-learn's digits with AdamW, from the same initial weights and on the same
batches. The weights are in float32, in bfloat16, or in bfloat16 with `round_stochastically`; in the last case also with
an optimizer that computes in float32. All seeds run in one program.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich.table import Table
from script import environment, parser, terminal, write
from sklearn.datasets import load_digits

import jaxweights as jw

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDES = (64, 128, 128, 10)
BATCH, HELD_OUT, RATE, DECAY = 128, 397, 1e-3, 0.1
POINTS = 40
COLORS = ("#1f5fa8", "#d1495b", "#e0a458", "#2a9d6f")


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer on float32 copies of the gradients and weights: its moments and its updates are float32."""
    return optax.GradientTransformation(
        lambda params: optimizer.init(_float32(params)),
        lambda updates, state, params: optimizer.update(_float32(updates), state, _float32(params)),
    )


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def adamw() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(), jw.add_weight_decay(DECAY), optax.scale_by_learning_rate(RATE))


RUNS: dict[str, tuple[Any, Callable[[jax.Array], optax.GradientTransformation]]] = {
    "float32": (jnp.float32, lambda key: adamw()),
    "bfloat16": (jnp.bfloat16, lambda key: adamw()),
    "bfloat16, round_stochastically": (
        jnp.bfloat16,
        lambda key: optax.chain(adamw(), jw.round_stochastically(key)),
    ),
    "bfloat16, AdamW in float32, round_stochastically": (
        jnp.bfloat16,
        lambda key: optax.chain(in_float32(adamw()), jw.round_stochastically(key)),
    ),
}


def digits() -> tuple[jax.Array, ...]:
    """Training images and labels, then those held out."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return x[HELD_OUT:], y[HELD_OUT:], x[:HELD_OUT], y[:HELD_OUT]


def initial(key: jax.Array, dtype) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(SIDES) - 1)
    return [
        {"kernel": jw.he_normal(k, (m, n)).astype(dtype), "bias": jnp.zeros(n, dtype)}
        for k, m, n in zip(keys, SIDES, SIDES[1:], strict=False)
    ]


def loss(params: list[dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    for i, layer in enumerate(params):
        x = (jax.nn.relu(x) if i else x).astype(layer["kernel"].dtype) @ layer["kernel"] + layer["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), y).mean()


def train(dtype, optimizer: Callable, steps: int, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Training loss and held-out loss, each after every part of the steps."""
    x, y, x_held, y_held = digits()
    weights, rounding, batches = jax.random.split(jax.random.key(seed), 3)
    params, tx = initial(weights, dtype), optimizer(rounding)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(x))
        updates, state = tx.update(jax.grad(loss)(params, x[rows], y[rows]), state, params)
        return (optax.apply_updates(params, updates), state), None

    def part(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, (loss(carry[0], x, y), loss(carry[0], x_held, y_held))

    keys = jax.random.split(batches, (POINTS, steps // POINTS))
    return jax.lax.scan(part, (params, tx.init(params)), keys)[1]


def draw(report: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    at = np.arange(1, POINTS + 1) * report["steps"] // POINTS
    for panel, split in zip(panels, ("train", "held_out"), strict=True):
        for (name, curves), color in zip(report["results"].items(), COLORS, strict=True):
            runs = np.array(curves[split])
            panel.plot(at, np.exp(np.log(runs).mean(0)), color=color, label=name)
            panel.fill_between(at, runs.min(0), runs.max(0), color=color, alpha=0.15, linewidth=0)
        panel.set(title=f"{split.replace('_', '-')} loss", xlabel="step", yscale="log")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    options = parser(__doc__).parse_args()
    steps, seeds = (POINTS, 2) if options.quick else (3000, 5)
    report: dict[str, Any] = {"environment": environment(), "quick": options.quick, "steps": steps, "results": {}}
    table = Table(title=f"loss after {steps:,} steps, mean and standard deviation over {seeds} seeds")
    for heading in ("weights", "training", "held out"):
        table.add_column(heading, justify="left" if heading == "weights" else "right", no_wrap=True)
    for name, (dtype, optimizer) in RUNS.items():
        run = jax.jit(jax.vmap(lambda seed, dtype=dtype, optimizer=optimizer: train(dtype, optimizer, steps, seed)))
        curves = [np.asarray(a, float) for a in run(jnp.arange(seeds))]
        report["results"][name] = dict(zip(("train", "held_out"), (c.tolist() for c in curves), strict=True))
        table.add_row(name, *(f"{c[:, -1].mean():.4f} ± {c[:, -1].std():.4f}" for c in curves))
    terminal(120).print(table)
    write(report, options.out, "bf16_training", draw)


if __name__ == "__main__":
    main()
