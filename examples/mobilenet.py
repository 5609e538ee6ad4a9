"""Fold MobileNetV2's 52 batch norms into its convolutions: same logits on real photos, fewer operations.

    python examples/mobilenet.py
    python examples/mobilenet.py --quick

The weights come from a Python package, the photos from scikit-learn. Shows the classes predicted for the photos, the
error of the folded model's logits, and the effect on channels whose running variance is close to 0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from mobilenet_v2 import MEAN, STD, MobileNetV2, pretrained, torch_names
from rich import box
from rich.table import Table
from sklearn.datasets import load_sample_image
from terminal import terminal

import jaxweights as jw

SHORT_SIDE, CROP = 256, 224
EPS = 1e-5
DENORMAL = float(np.finfo(np.float32).tiny)
"""Smallest normal float32. XLA flushes smaller values to 0."""
NAMES = {
    108: "sea anemone",
    442: "bell cote",
    580: "greenhouse",
    599: "honeycomb",
    663: "monastery",
    687: "organ",
    698: "palace",
    738: "pot",
    947: "mushroom",
    975: "lakeside",
    985: "daisy",
    995: "earthstar",
    996: "hen-of-the-woods",
}
"""Names of the classes that appear below; the package has none."""


class Outcome(NamedTuple):
    """The numbers in the tables, and the logits they come from."""

    logits: np.ndarray
    """Logits of all crops, with batch norms."""
    top: dict[str, list[tuple[int, float]]]
    """Top five (class, probability) for the center crop of each photo."""
    error: float
    """Largest difference of a logit, relative to the largest logit of its crop."""
    same_class: float
    """Fraction of crops with the same top class in both models."""
    parameters: tuple[int, int]
    seconds: tuple[float, float]
    """Time per crop, with batch norms and folded."""
    channels: dict[str, dict[str, Any]]
    """{range of running variances: measurements of the channels in it}."""


def crops(photo: np.ndarray, n: int) -> jax.Array:
    """Takes `n` crops from left to right, preprocessed as in training: shape (n, 224, 224, 3)."""
    scale = SHORT_SIDE / min(photo.shape[:2])
    height, width = (round(scale * s) for s in photo.shape[:2])
    small = jax.image.resize(jnp.float32(photo) / 255, (height, width, 3), "linear")
    top = (height - CROP) // 2
    lefts = np.linspace(0, width - CROP, n).round().astype(int)
    found = jnp.stack([small[top : top + CROP, left : left + CROP] for left in lefts])
    return (found - jnp.array(MEAN)) / jnp.array(STD)


def seconds_in_turn(first: Callable[[], jax.Array], second: Callable[[], jax.Array], rounds: int) -> np.ndarray:
    """Median time of each. Runs are interleaved, so background load affects both."""
    times = np.empty((rounds, 2))
    for row in times:
        for i, run in enumerate((first, second)):
            start = time.perf_counter()
            run().block_until_ready()
            row[i] = time.perf_counter() - start
    return np.median(times, 0)


def layer_outputs(model: MobileNetV2, variables: Any, images: jax.Array, layer: str) -> dict[str, np.ndarray]:
    """The output of every `layer` submodule: {name of its ConvNorm: (n, height, width, features)}."""
    wanted = lambda module, _: module.name == layer
    run = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=wanted)[1]["intermediates"])
    found = flatten_dict(run(variables, images), sep="/")
    return {path.removesuffix(f"/{layer}/__call__"): np.asarray(y[0]) for path, y in found.items()}


def channels_by_variance(variables: Any, folded: Any, images: jax.Array) -> dict[str, dict[str, Any]]:
    """Measures the effect of folding on channels, grouped by running variance."""
    params, stats = (flatten_dict(variables[c], sep="/") for c in ("params", "batch_stats"))
    new = flatten_dict(folded, sep="/")
    before = layer_outputs(MobileNetV2(), variables, images, "norm")
    after = layer_outputs(MobileNetV2(norm=False), {"params": folded}, images, "conv")
    names = list(torch_names())
    each = lambda f: np.concatenate([np.asarray(f(name), np.float64) for name in names])
    over = (0, 1, 2)
    var = each(lambda name: stats[f"{name}/norm/var"])
    values = {
        "factor": np.abs(each(lambda name: params[f"{name}/norm/scale"])) / np.sqrt(var + EPS),
        "kernel": each(lambda name: np.abs(new[f"{name}/conv/kernel"]).max(over)),
        "moves": each(lambda name: np.abs(before[name] - params[f"{name}/norm/bias"]).max(over)),
        "error": each(lambda name: np.abs(after[name] - before[name]).max(over)),
    }
    layer = each(lambda name: np.full(stats[f"{name}/norm/var"].shape, names.index(name)))
    ranges = {"denormal": var < DENORMAL, "under 1e-8": (var >= DENORMAL) & (var < 1e-8), "the others": var >= 1e-8}
    return {
        name: {"channels": int(which.sum()), "layers": len(np.unique(layer[which])), "least": var[which].min()}
        | {key: value[which].max() for key, value in values.items()}
        for name, which in ranges.items()
    }


def show(outcome: Outcome, n_crops: int) -> None:
    console = terminal()
    look = {"title_justify": "left", "caption_justify": "left", "box": box.SIMPLE_HEAD}

    view = Table(title="What the network sees in the middle of each photo", **look)
    for heading in outcome.top:
        view.add_column(heading)
    for row in zip(*outcome.top.values(), strict=True):
        view.add_row(*(f"{100 * p:4.1f}%  {i} {NAMES.get(i, '')}" for i, p in row))
    console.print(view)

    slow, fast = outcome.seconds
    view = Table(title="With batch norms, and with all 52 folded away", **look)
    for heading, justify in (("model", "left"), ("numbers", "right"), ("ms a crop", "right"), ("logits", "left")):
        view.add_column(heading, justify=justify)
    view.add_row("batch norms", f"{outcome.parameters[0]:,}", f"{1000 * slow:.1f}", "")
    verdict = f"off by {outcome.error:.1e} of the largest, same first class on {100 * outcome.same_class:.0f}%"
    view.add_row("folded", f"{outcome.parameters[1]:,}", f"{1000 * fast:.1f}", f"[bold cyan]{verdict}[/]")
    view.caption = f"Over {n_crops} crops. Time: {fast / slow:.2f} of that with batch norms, measured in turn."
    console.print(view)

    view = Table(title="Running variances, and what becomes of their channels", **look)
    columns = {
        "channels": ("channels", "{:,}"),
        "layers": ("layers", "{}"),
        "least": ("least σ²", "{:.1e}"),
        "factor": ("largest\n|scale|/√(σ²+ε)", "{:.1f}"),
        "kernel": ("largest\nfolded |w|", "{:.2f}"),
        "moves": ("farthest\nfrom its bias", "{:.1e}"),
        "error": ("largest\ndifference", "{:.1e}"),
    }
    view.add_column("σ²")
    for heading, _ in columns.values():
        view.add_column(heading, justify="right")
    for name, entry in outcome.channels.items():
        view.add_row(name, *(form.format(entry[key]) for key, (_, form) in columns.items()))
    view.caption = (
        "In training, a channel of next to no variance was always 0 before the norm, so it was the bias after it. ε "
        "bounds the factor: it folds like the others. In the middle of the photos: how far a channel is from that bias "
        "after the norm, and from itself in the folded model."
    )
    console.print(view)


def main(argv: Sequence[str] | None = None) -> Outcome:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=9, help="crops per photo")
    parser.add_argument("--rounds", type=int, default=7, help="timing rounds")
    parser.add_argument("--quick", action="store_true", help="3 crops, 1 round")
    args = parser.parse_args(argv)
    n, rounds = (3, 1) if args.quick else (args.crops, args.rounds)

    variables = pretrained()
    images = {name: crops(load_sample_image(name), n) for name in ("china.jpg", "flower.jpg")}
    batch = jnp.concatenate(list(images.values()))
    folds = jw.linen.norm_folds(MobileNetV2(), variables, batch)
    folded = jax.jit(lambda v: jw.fold_batch_norms(v["params"], v["batch_stats"], folds))(variables)

    original, plain = jax.jit(MobileNetV2().apply), jax.jit(MobileNetV2(norm=False).apply)
    run = lambda: original(variables, batch), lambda: plain({"params": folded}, batch)
    logits, new = (np.asarray(f()) for f in run)

    top = {}
    for i, name in enumerate(images):
        p = np.asarray(jax.nn.softmax(logits[i * n + n // 2]))
        top[name] = [(int(c), float(p[c])) for c in np.argsort(-p)[:5]]
    outcome = Outcome(
        logits=logits,
        top=top,
        error=float((np.abs(new - logits).max(1) / np.abs(logits).max(1)).max()),
        same_class=float(np.mean(new.argmax(1) == logits.argmax(1))),
        parameters=tuple(sum(a.size for a in jax.tree.leaves(tree)) for tree in (variables, folded)),
        seconds=tuple(seconds_in_turn(*run, rounds) / len(batch)),
        channels=channels_by_variance(variables, folded, batch[n // 2 :: n]),
    )
    show(outcome, len(batch))
    return outcome


if __name__ == "__main__":
    main()
