"""Compress a sentence encoder by recipes: the weights of MiniLM-L6 in memory, and the same in a file by the command.

For each recipe: the size of the file, the cosine of its sentence embeddings to those of the original on sentences of
Shakespeare, and the time. See minilm_model.py for what to install. Nothing is downloaded at run time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax
import matplotlib
import minilm_model
import numpy as np
from rich import box
from rich.table import Table
from terminal import terminal

import jaxweights as jw
from jaxweights.command.main import main as command

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RECIPES = {
    "8 bits": """
[[rules]]
weights = "*"
bits = 8
""",
    "4 bits, embeddings 8": """
[[rules]]
weights = "*embedding*"
bits = 8

[[rules]]
weights = "*"
bits = 4
block = 32
""",
    "NF4": """
[[rules]]
weights = "*"
format = "nf4"
""",
    "32 values": """
[[rules]]
weights = "*"
cluster = 32
""",
    "30% zeros, 16 values": """
[[rules]]
weights = "*"
prune = 0.3
cluster = 16
""",
}
LAYOUT = '\n[output]\nto = "jaxweights"\n'
"""Our own layout, which holds all of these. Without it, the layout is one that other tools read, where there is one."""


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=50, help="sentences of each length to compare on")
    parser.add_argument("--quick", action="store_true", help="few sentences, and one recipe")
    parser.add_argument("--out", default="compress_minilm.png", help="path of the picture")
    options = parser.parse_args(arguments)
    if lacking := minilm_model.missing():
        sys.exit("this example needs packages that are not installed:\n  " + "\n  ".join(lacking))
    recipes = {"NF4": RECIPES["NF4"]} if options.quick else RECIPES

    model, variables = minilm_model.MiniLM(), minilm_model.weights()
    params = variables["params"]
    sentences = minilm_model.shakespeare(16 if options.quick else options.sentences, held_out=True)
    axes = jw.linen.layout(model, variables, sentences[0])
    apply = jax.jit(model.apply)
    embed = lambda params: np.concatenate([apply({"params": params}, tokens) for tokens in sentences])
    original = embed(params)

    folder = Path(tempfile.mkdtemp())
    jw.files.save(folder / "float32.safetensors", params)
    size = (folder / "float32.safetensors").stat().st_size
    results = {"float32": {"bytes": size, "cosine": 1.0}}
    for name, text in recipes.items():
        start = time.perf_counter()
        recipe = jw.recipes.Recipe.parse(text)
        small = jw.one_shot(params, recipe.methods(params), layout=axes)
        jw.files.save(folder / "tree.safetensors", small)
        seconds = time.perf_counter() - start
        loaded = jw.densify(jw.files.load(folder / "tree.safetensors"))

        (folder / "recipe.toml").write_text(text + LAYOUT)
        start = time.perf_counter()
        by_command(folder, "compress", minilm_model.file(), "command.safetensors", "--recipe", folder / "recipe.toml")
        command_seconds = time.perf_counter() - start
        by_command(folder, "expand", folder / "command.safetensors", "expanded.safetensors")
        expanded = minilm_model.weights(folder / "expanded.safetensors")["params"]

        cosine = lambda params: float(np.mean(np.sum(embed(params) * original, 1)))
        results[name] = {
            "bytes": (folder / "tree.safetensors").stat().st_size,
            "cosine": cosine(loaded),
            "seconds": seconds,
            "command_bytes": (folder / "command.safetensors").stat().st_size,
            "command_cosine": cosine(expanded),
            "command_seconds": command_seconds,
        }
    shutil.rmtree(folder)
    table(results, len(original))
    picture(options.out, results)
    return results


def by_command(folder: Path, name: str, path: Path, out: str, *options: str | Path) -> None:
    """Runs a subcommand of `jaxweights` in this process, as from a shell, without its summary."""
    line = [name, str(path), "-o", str(folder / out), "--force", *map(str, options)]
    with contextlib.redirect_stdout(io.StringIO()):
        code = command(line)
    if code:
        sys.exit(f"jaxweights {' '.join(line)} failed")


def table(results: dict[str, dict[str, float]], sentences: int) -> None:
    view = Table(title="MiniLM-L6 by recipes", title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    view.add_column("recipe")
    for heading in ("MB", "smaller", "cosine", "time", "command: MB", "cosine", "time"):
        view.add_column(heading, justify="right")
    before = results["float32"]["bytes"]
    for name, r in results.items():
        cells = [f"{r['bytes'] / 1e6:.1f}", f"{before / r['bytes']:.2f}×", f"{r['cosine']:.4f}"]
        if "seconds" in r:
            cells += [f"{r['seconds']:.1f} s", f"{r['command_bytes'] / 1e6:.1f}"]
            cells += [f"{r['command_cosine']:.4f}", f"{r['command_seconds']:.1f} s"]
        view.add_row(name, *cells)
    view.caption = (
        f"Mean cosine to the original's embeddings of {sentences:,} sentences. Left: jw.one_shot on the tree of Flax, "
        f"and jw.files.save. Right: jaxweights compress on the file of PyTorch. Time with compiling."
    )
    terminal(100).print(view)


def picture(path: str, results: dict[str, dict[str, float]]) -> None:
    """Draws bars of the sizes, with the cosines beside them."""
    names = list(results)[::-1]
    figure, (sizes, cosines) = plt.subplots(
        1, 2, figsize=(10, 0.5 * len(names) + 1.5), layout="constrained", sharey=True
    )
    colors = ["#9a9a9a" if name == "float32" else "#1f5fa8" for name in names]
    bars = sizes.barh(names, [results[name]["bytes"] / 1e6 for name in names], color=colors, height=0.7)
    before = results["float32"]["bytes"]
    smaller = [f"{before / results[name]['bytes']:.1f}× smaller" * (name != "float32") for name in names]
    sizes.bar_label(bars, smaller, padding=4)
    sizes.set(xlabel="file, MB", xlim=(0, 1.05 * before / 1e6))
    cosines.plot([results[name]["cosine"] for name in names], names, "o", color="#1f5fa8", ms=9)
    for name in names:
        cosines.annotate(
            f"{results[name]['cosine']:.3f}",
            (results[name]["cosine"], name),
            (-10, 0),
            ha="right",
            va="center",
            textcoords="offset points",
        )
    cosines.set(xlabel="mean cosine to the original's embeddings")
    lowest = min(r["cosine"] for r in results.values())
    cosines.set_xlim(lowest - 0.35 * (1.001 - lowest), 1 + 0.06 * (1.001 - lowest))
    for axes in (sizes, cosines):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    figure.suptitle("MiniLM-L6 sentence embeddings, compressed by recipes", x=0.01, ha="left", weight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
