"""What comes of the critics, as a table in the terminal and a picture."""

from __future__ import annotations

import dataclasses

import matplotlib
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = ("#c0392b", "#d68910", "#1f5fa8")
ROWS, COLUMNS = 6, 6
"""Of the pictures of samples."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One run."""

    samples: np.ndarray
    norms: dict[str, float]
    """Of the critic's layers, as operators, at the end."""
    steps: list[int]
    """When the curves were measured."""
    lower: list[float]
    upper: list[float]
    """Bounds of the critic's Lipschitz constant."""
    gap: float
    """Mean score of real images less that of generated ones."""
    distance: float
    """Fréchet distance."""
    seconds: float
    """A step of the generator and those of the critic before it."""


def progress() -> Progress:
    return Progress(TextColumn("{task.description:>16}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())


def table(title: str, results: dict[str, Result], floor: float, accuracy: float) -> None:
    view = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("critic")
    for heading in ("norms of the layers", "slope at\nleast", "at\nmost", "share of it\nin use", "Fréchet\ndistance"):
        view.add_column(heading, justify="right")
    view.add_column("ms\na step", justify="right")
    for name, r in results.items():
        norms = "  ".join(f"{n:.2f}" for n in r.norms.values())
        low, high = r.lower[-1], r.upper[-1]
        share = f"{100 * low / high:.1f}%"
        view.add_row(name, norms, f"{low:.3g}", f"{high:.3g}", share, f"{r.distance:.2f}", f"{1000 * r.seconds:.0f}")
    view.add_row("held-out real images", "", "", "", "", f"{floor:.2f}", "")
    view.caption = (
        "Slope: the Lipschitz constant of the critic, at least the largest gradient found, at most the product of the "
        "norms of its layers as operators. Fréchet distance to the training images in the hidden layer of a "
        f"classifier of them ({100 * accuracy:.1f}% right), smaller is better."
    )
    console = Console()
    if not console.is_terminal:
        console.width = 110
    console.print(view)


def picture(path: str, title: str, real: np.ndarray, results: dict[str, Result]) -> None:
    """Samples of each run beside real images, and the bounds of the critics' slopes."""
    figure = plt.figure(figsize=(13, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.4, 3])
    panels = top.subplots(1, len(results) + 1)
    shown = [("real images", "", real, "0.25")]
    for (name, r), color in zip(results.items(), COLORS, strict=True):
        shown.append((name, f"Fréchet distance {r.distance:.1f}", r.samples, color))
    for axes, (name, note, images, color) in zip(panels, shown, strict=True):
        axes.imshow(mosaic(images), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"$\\bf{{{name.replace(' ', '~')}}}$\n{note or ' '}", fontsize=11, color=color)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)

    left = bottom.subplots(1, len(results), sharey=True)
    for axes, (name, r), color in zip(left, results.items(), COLORS, strict=True):
        axes.fill_between(r.steps, r.lower, r.upper, color=color, alpha=0.18, lw=0)
        axes.plot(r.steps, r.upper, color=color, lw=1.8)
        axes.plot(r.steps, r.lower, color=color, lw=1.8, ls=(0, (4, 1.5)))
        axes.axhline(1, color="0.6", lw=0.8)
        axes.set_yscale("log")
        axes.set_title(name, color=color, fontsize=11)
        axes.set_xlabel("step of the generator")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.annotate(
            "product of the layers' norms",
            (r.steps[-1], r.upper[-1]),
            (0, 5),
            textcoords="offset points",
            ha="right",
            color=color,
            fontsize=9,
        )
        axes.annotate(
            "largest gradient found",
            (r.steps[-1], r.lower[-1]),
            (0, -12),
            textcoords="offset points",
            ha="right",
            color=color,
            fontsize=9,
        )
    left[0].set_ylabel("Lipschitz constant of the critic")
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def mosaic(images: np.ndarray) -> np.ndarray:
    """(n, h, w, 1) -> one picture of ROWS x COLUMNS of them, a pixel apart."""
    tiles = np.pad(images[: ROWS * COLUMNS, :, :, 0], ((0, 0), (1, 1), (1, 1)), constant_values=1)
    n, h, w = tiles.shape
    return tiles.reshape(ROWS, COLUMNS, h, w).transpose(0, 2, 1, 3).reshape(ROWS * h, COLUMNS * w)
