"""Deep Compression on Fashion-MNIST: prune, share, retrain the codebook, entropy-code, and read the file back.

    python benchmarks/deep_compression.py --work FOLDER

Both LeNets are trained dense with each seed. That is the baseline. The mean of the dense LeNet-5's is the teacher in
what follows, where half of the loss of LeNet-300-100, and all that of LeNet-5, is by its logits: gradual pruning by
magnitude, then k-means of the weights that are left, then training of the codebooks. The result is saved with
`entropy_coding=True`; it is the loaded file that is tested. The control, "distilled", is the dense network trained on
with the teacher: what the teacher alone gives.

With --validation, the last 5,000 training images are held out and tested instead of the test images: the recipes were
chosen so. FOLDER keeps the files and results of each run, and a run that is in it is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compression_others as others
import compression_stages as stages
import jax
import jax.numpy as jnp
import lenets
import numpy as np
from compression_stages import RECIPES, Recipe
from deep_compression_chart import draw
from deep_compression_figures import STAGES
from lenets import Images
from rich import box
from rich.table import Table
from script import environment, parser, terminal, write

import jaxweights as jw
from jaxweights import files

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import image_data

SEEDS = (0, 1, 2)
TEACHERS, OTHERS = "LeNet-5", "LeNet-300-100"
"""The network whose dense weights are the teacher, and the one for which other ways are measured."""
PAPER = {
    "LeNet-300-100": {"dense": 1070, "file": 27, "pruned": 12, "shared": 32, "coded": 40, "error": (1.64, 1.58)},
    "LeNet-5": {"dense": 1720, "file": 44, "pruned": 12, "shared": 33, "coded": 39, "error": (0.80, 0.74)},
}
"""KB, ratios and errors in % on MNIST (Han, Mao and Dally, arXiv:1510.00149)."""


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    return tree_a == tree_b and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One network with one seed, in a folder of its own.

    Attributes:
      recipe, seed: what is run.
      data, test: the images.
      folder: where files and results are kept.
    """

    recipe: Recipe
    seed: int
    data: Images
    test: Images
    folder: Path

    def path(self, name: str, suffix: str = "safetensors") -> Path:
        return self.folder / f"{self.recipe.network.name}-{self.seed}-{name}.{suffix}"

    def made(self, name: str, make: Callable[[], Any], entropy_coding: bool = False) -> Any:
        """The weights in the file of this name; `make` makes them, once."""
        path = self.path(name)
        if not path.exists():
            files.save(path, make(), entropy_coding=entropy_coding)
        return files.load(path)

    def measured(self, name: str) -> dict[str, Any]:
        """Accuracy and bytes of the file of this name."""
        path = self.path(name)
        weights = jw.densify(files.load(path))
        return {
            "accuracy": lenets.accuracy(self.recipe.network.forward, weights, self.test),
            "bytes": path.stat().st_size,
            "zeros": {layer: float(jnp.mean(w["kernel"] == 0)) for layer, w in weights.items()},
        }

    def dense(self) -> Any:
        return self.made("dense", lambda: stages.train_dense(self.recipe, self.data, self.seed))

    def result(self, teacher: np.ndarray) -> dict[str, Any]:
        """All stages: accuracy and bytes of each."""
        recipe, dense = self.recipe, self.dense()
        training = (self.data, teacher, self.seed)
        self.made("distilled", lambda: stages.train_on(recipe, dense, *training))
        pruned = self.made("pruned", lambda: stages.prune(recipe, dense, *training), entropy_coding=True)
        shared, index = stages.share(recipe, pruned)
        self.made("shared", lambda: stages.stored(shared, index))
        retrained = self.made(
            "retrained", lambda: stages.stored(stages.retrain(recipe, shared, index, *training), index)
        )
        coded = self.made("coded", lambda: retrained, entropy_coding=True)
        found = {name: self.measured(name) for name in STAGES}
        return {
            "network": recipe.network.name,
            "seed": self.seed,
            "stages": found,
            "ratio": found["dense"]["bytes"] / found["coded"]["bytes"],
            "gain": found["coded"]["accuracy"] - found["dense"]["accuracy"],
            "same": same(coded, retrained),
        }

    def others(self, teacher: np.ndarray) -> dict[str, Any]:
        """Accuracy and bytes of other ways."""
        pruned = files.load(self.path("pruned"))
        found = {}
        for i, (name, make) in enumerate(others.ways(self.recipe, self.dense(), pruned, self.data, teacher, self.seed)):
            self.made(f"other{i}", make, entropy_coding=True)
            found[name] = self.measured(f"other{i}")
        return found


def remembered(path: Path, run: Callable[[], Any]) -> Any:
    """The result in the file `path`, made by `run` and written if there is none."""
    if not path.exists():
        path.write_text(json.dumps(run(), indent=1))
    return json.loads(path.read_text())


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
    recipes = RECIPES
    if options.validation:
        data, test = Images(*(a[:-5000] for a in data)), Images(*(a[-5000:] for a in data))
    if options.quick:
        data, test = Images(*(a[:512] for a in data)), Images(*(a[:500] for a in test))
        options.only, options.seeds = ["LeNet-300-100"], [0]
        recipes = {name: dataclasses.replace(recipe, epochs=(1, 1, 1, 1)) for name, recipe in RECIPES.items()}
    console = terminal()
    results, other = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        runs = {
            name: [Run(recipe, seed, data, test, work) for seed in options.seeds] for name, recipe in recipes.items()
        }
        teacher = np.mean([stages.logits_of(run.recipe.network, run.dense(), data) for run in runs[TEACHERS]], 0)
        for run in (run for name in options.only for run in runs[name]):
            results.append(remembered(run.path("stages", "json"), lambda: run.result(teacher)))  # noqa: B023
            show(console, results[-1])
        if OTHERS in options.only:
            first = runs[OTHERS][0]
            other = remembered(first.path("others", "json"), lambda: first.others(teacher))
            show_others(console, other, results[0]["stages"]["dense"])
    if not options.validation:
        report = {
            "quick": options.quick,
            "environment": environment("constriction"),
            "paper": PAPER,
            "results": results,
            "others": {"network": OTHERS, "seed": options.seeds[0], "ways": other},
        }
        write(report, options.out, "deep_compression", draw)


def columns(title: str, first: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in (first, "accuracy", "bytes", "ratio"):
        table.add_column(column, justify="left" if column == first else "right")
    return table


def cells(found: dict[str, Any], dense: dict[str, Any]) -> tuple[str, str, str]:
    return f"{100 * found['accuracy']:.2f}%", f"{found['bytes']:,}", f"{dense['bytes'] / found['bytes']:.1f}"


def show(console: Any, run: dict[str, Any]) -> None:
    """Prints the stages of a run."""
    table = columns(f"{run['network']}, seed {run['seed']}", "stage")
    for name, title in STAGES.items():
        table.add_row(title, *cells(run["stages"][name], run["stages"]["dense"]))
    console.print(table)


def show_others(console: Any, ways: dict[str, Any], dense: dict[str, Any]) -> None:
    """Prints the other ways."""
    table = columns(f"{OTHERS}: other ways, entropy-coded", "way")
    for name, found in ways.items():
        table.add_row(name, *cells(found, dense))
    console.print(table)


if __name__ == "__main__":
    main()
