"""Deep Compression on Fashion-MNIST: prune, share, retrain the codebook, entropy-code, and read the file back.

    python benchmarks/deep_compression.py --work FOLDER

Each network is trained dense. That is the baseline, and the teacher in what follows, where half of the loss is by
the teacher's logits: gradual pruning by magnitude, then k-means of the weights that are left, then training of the
codebooks. The result is saved with `entropy_coding=True`; it is the loaded file that is tested.

With --validation, the last 5,000 training images are held out and tested instead of the test images. FOLDER keeps the
files and results of each run, and a run that is in it is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lenets
import numpy as np
import optax
from deep_compression_chart import draw
from lenets import Images, Network
from rich import box
from rich.table import Table
from script import environment, parser, terminal, write

import jaxweights as jw
from jaxweights import files

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import image_data

SEEDS = (0, 1, 2)
PAPER = {
    "LeNet-300-100": {"dense": 1070, "file": 27, "shared": 32, "coded": 40, "error": (1.64, 1.58), "goal": 40},
    "LeNet-5": {"dense": 1720, "file": 44, "shared": 33, "coded": 39, "error": (0.80, 0.74), "goal": 39},
}
"""KB, ratios and errors in % on MNIST (tables 1 to 3 of Han, Mao and Dally, arXiv:1510.00149)."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained and compressed.

    Attributes:
      network: the network.
      epochs: of the dense training, of pruning, and of training the codebooks.
      sparsity: the fraction of zeros of each layer.
      values: the number of shared values of each layer, besides 0.
      rate: the highest learning rate; a tenth of it for codebooks.
      decay: weight decay of the dense training, in units of the learning rate. After it there is none.
    """

    network: Network
    epochs: tuple[int, int, int]
    sparsity: dict[str, float]
    values: dict[str, int]
    rate: float = 2e-3
    decay: float = 1e-4


RECIPES = {
    "LeNet-300-100": Recipe(
        lenets.LENET_300_100,
        (30, 30, 8),
        {"fc1": 0.915, "fc2": 0.87, "fc3": 0.5},
        {"fc1": 8, "fc2": 8, "fc3": 8},
        decay=0.1,
    ),
    "LeNet-5": Recipe(
        lenets.LENET_5,
        (8, 6, 2),
        {"conv1": 0.34, "conv2": 0.85, "fc1": 0.915, "fc2": 0.81},
        {"conv1": 16, "conv2": 16, "fc1": 8, "fc2": 8},
    ),
}


def optimizer(recipe: Recipe, epochs: int, data: Images, scale: float = 1.0) -> optax.GradientTransformation:
    """Adam with weight decay. The learning rate rises for a twentieth of the steps, and falls along a cosine."""
    steps = steps_of(epochs, data)
    rate = optax.warmup_cosine_decay_schedule(0, scale * recipe.rate, steps // 20, steps)
    return optax.adamw(rate, weight_decay=recipe.decay)


def steps_of(epochs: int, data: Images) -> int:
    return max(epochs * (len(data.labels) // lenets.BATCH), 1)


def train_dense(recipe: Recipe, data: Images, seed: int) -> Any:
    first = recipe.network.init(jax.random.key(seed))
    epochs = recipe.epochs[0]
    return lenets.fit(recipe.network.forward, first, optimizer(recipe, epochs, data), data, epochs, seed)


def prune(recipe: Recipe, dense: Any, data: Images, teacher: np.ndarray, seed: int) -> Any:
    """Prunes by magnitude, from a tenth to six tenths of the steps."""
    epochs = recipe.epochs[1]
    steps = steps_of(epochs, data)
    rules = {
        f"{layer}/kernel": jw.Prune(
            jw.pruning.PolynomialSparsity(sparsity, steps // 10, 6 * steps // 10, every=max(steps // 50, 1))
        )
        for layer, sparsity in recipe.sparsity.items()
    }
    tx = jw.confine(optimizer(dataclasses.replace(recipe, decay=0.0), epochs, data), rules)
    return lenets.fit(recipe.network.forward, dense, tx, data, epochs, seed + 100, teacher)


def share(recipe: Recipe, weights: Any) -> tuple[Any, Any]:
    """({layer: codebook, bias}, {layer: index}): k-means of the weights that are not 0."""
    shared, index = {}, {}
    for layer, w in weights.items():
        codebook, index[layer] = jw.cluster(w["kernel"], recipe.values[layer], start="optimal", keep_zeros=True)
        shared[layer] = {"codebook": codebook, "bias": w["bias"]}
    return shared, index


def looked_up(shared: Any, index: Any) -> Any:
    """The weights of codebooks."""
    return {layer: {"kernel": jw.share(w["codebook"], index[layer]), "bias": w["bias"]} for layer, w in shared.items()}


def retrain(recipe: Recipe, shared: Any, index: Any, data: Images, teacher: np.ndarray, seed: int) -> Any:
    """Trains the codebooks and biases. The gradient of a value is the sum over the weights that share it."""
    epochs = recipe.epochs[2]

    def forward(shared, images):
        return recipe.network.forward(looked_up(shared, index), images)

    tx = optimizer(dataclasses.replace(recipe, decay=0.0), epochs, data, 0.25)
    return lenets.fit(forward, shared, tx, data, epochs, seed + 200, teacher)


def stored(shared: Any, index: Any) -> Any:
    """The weights as they are saved: codes and codebooks, and biases of 16 bits."""
    return {
        layer: {
            "kernel": jw.store_clusters(w["codebook"], index[layer], has_zeros=True),
            "bias": w["bias"].astype(jnp.float16),
        }
        for layer, w in shared.items()
    }


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    return tree_a == tree_b and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def teacher_logits(network: Network, dense: Any, data: Images) -> np.ndarray:
    """The logits of all images and of their mirror images."""
    return np.stack([lenets.logits(network.forward, dense, x) for x in (data.images, data.images[:, :, ::-1])])


def compress(recipe: Recipe, data: Images, test: Images, seed: int, work: Path) -> dict[str, Any]:
    """All stages for one seed: accuracy and bytes of each."""
    network = recipe.network
    stages: dict[str, Any] = {}

    def stage(name: str, weights: Any, entropy_coding: bool = False) -> Path:
        path = work / f"{network.name}-{seed}-{name}.safetensors"
        files.save(path, weights, entropy_coding=entropy_coding)
        dense = jw.densify(files.load(path))
        stages[name] = {
            "accuracy": lenets.accuracy(network.forward, dense, test),
            "bytes": path.stat().st_size,
            "zeros": {layer: float(jnp.mean(w["kernel"] == 0)) for layer, w in dense.items()},
        }
        return path

    known = work / f"{network.name}-{seed}-dense.safetensors"
    dense = files.load(known) if known.exists() else train_dense(recipe, data, seed)
    stage("dense", dense)
    teacher = teacher_logits(network, dense, data)
    pruned = prune(recipe, dense, data, teacher, seed)
    stage("pruned", pruned, entropy_coding=True)
    shared, index = share(recipe, pruned)
    stage("shared", stored(shared, index))
    result = stored(retrain(recipe, shared, index, data, teacher, seed), index)
    stage("retrained", result)
    path = stage("coded", result, entropy_coding=True)
    return {
        "network": network.name,
        "seed": seed,
        "stages": stages,
        "ratio": stages["dense"]["bytes"] / stages["coded"]["bytes"],
        "gain": stages["coded"]["accuracy"] - stages["dense"]["accuracy"],
        "same": same(files.load(path), result),
    }


def remembered(path: Path, run: Callable[[], Any]) -> Any:
    """The result in the file `path`, made by `run` and written if there is none."""
    if not path.exists():
        path.write_text(json.dumps(run(), indent=1))
    return json.loads(path.read_text())


def quick(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, epochs=(1, 1, 1))


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--work", type=Path, help="where files and results of each run are kept")
    options.add_argument("--validation", action="store_true", help="hold out training images; leave the test images")
    options.add_argument("--only", choices=tuple(RECIPES), nargs="+", default=tuple(RECIPES))
    options.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = options.parse_args(arguments)
    everything = image_data.load("fashion-mnist")
    data = Images(everything.train_images, everything.train_labels)
    test = Images(everything.test_images, everything.test_labels)
    if options.validation:
        data, test = Images(*(a[:-5000] for a in data)), Images(*(a[-5000:] for a in data))
    if options.quick:
        data, test = Images(*(a[:512] for a in data)), Images(*(a[:500] for a in test))
        options.only, options.seeds = options.only[:1], [0]
    console = terminal()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            recipe = quick(RECIPES[name]) if options.quick else RECIPES[name]
            for seed in options.seeds:
                path = work / f"{name}-{seed}.json"
                runs.append(remembered(path, lambda: compress(recipe, data, test, seed, work)))  # noqa: B023
                show(console, runs[-1])
    if not options.validation:
        report = {"quick": options.quick, "environment": environment("constriction"), "paper": PAPER, "results": runs}
        write(report, options.out, "deep_compression", draw)


STAGES = {
    "dense": "dense, float32",
    "pruned": "pruned, zeros coded",
    "shared": "shared, stored codes",
    "retrained": "codebooks retrained",
    "coded": "entropy-coded",
}


def show(console: Any, run: dict[str, Any]) -> None:
    """Prints the stages of a run."""
    table = Table(title=f"{run['network']}, seed {run['seed']}", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("stage", "accuracy", "bytes", "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    dense = run["stages"]["dense"]["bytes"]
    for name, title in STAGES.items():
        s = run["stages"][name]
        table.add_row(title, f"{100 * s['accuracy']:.2f}%", f"{s['bytes']:,}", f"{dense / s['bytes']:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
