"""Reports the results of the critics as a table and a picture."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from terminal import terminal

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = ("#c0392b", "#d68910", "#1f5fa8")
ROWS = 8
SHOWN = ROWS * ROWS
"""Number of samples in the picture."""


class Curves(NamedTuple):
    """Measurements over training."""

    steps: list[int]
    lower: list[float]
    upper: list[float]
    """`lower` and `upper` bound the critic's Lipschitz constant."""
    gap: list[float]
    """Mean score of real images minus that of generated ones."""
    distance: list[float]
    """Fréchet distance of generated images to real ones."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one run."""

    samples: np.ndarray
    norms: dict[str, float]
    """Final operator norms of the critic's layers."""
    curves: Curves
    seconds: float
    """Time per generator step, including its critic steps."""
    held_out: float
    """Fréchet distance of real images that are held out."""


def progress() -> Progress:
    return Progress(TextColumn("{task.description:>16}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())


def table(title: str, results: dict[str, Result], floor: float, accuracy: float) -> None:
    view = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("critic", no_wrap=True)
    view.add_column("norms of the layers", no_wrap=True)
    for heading in ("slope at\nleast", "at\nmost", "Wasserstein\nat least", "Fréchet\ndistance", "ms\na step"):
        view.add_column(heading, justify="right")
    for name, r in results.items():
        _, low, high, gap, distance = (curve[-1] for curve in r.curves)
        norms = "  ".join(f"{n:.3f}" for n in r.norms.values())
        ends = (f"{gap / high:.2f}", f"{distance:.2f}", f"{1000 * r.seconds:.0f}")
        view.add_row(name, norms, f"{low:.3f}", f"{high:.3f}", *ends)
    view.add_row("(real, held out)", "", "", "", "", f"{floor:.2f}", "")
    view.caption = (
        "Slope: the Lipschitz constant of the critic, at most the product of its layers' norms as operators. Its score "
        "of real images less that of generated ones, over the larger, is at most their Wasserstein distance. Fréchet "
        f"distance to the training images in the hidden layer of a classifier ({100 * accuracy:.1f}% right): smaller "
        "is better."
    )
    terminal().print(view)


def picture(path: str, title: str, real: np.ndarray, results: dict[str, Result]) -> None:
    """Draws samples next to real images, and the slope bounds and distances over training."""
    figure = plt.figure(figsize=(13, 7.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.6, 3])
    notes = [f"Fréchet distance {r.curves.distance[-1]:.1f}" for r in results.values()]
    shown = [("real images", "held out", real, "0.25")]
    shown += [(n, note, r.samples, c) for (n, r), note, c in zip(results.items(), notes, COLORS, strict=False)]
    for axes, (name, note, images, color) in zip(top.subplots(1, len(shown)), shown, strict=True):
        axes.imshow(mosaic(images), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"$\\bf{{{name.replace(' ', '~')}}}$\n{note}", fontsize=11, color=color)
        axes.set_axis_off()

    slope, told, quality = bottom.subplots(1, 3)
    for (name, r), color in zip(results.items(), COLORS, strict=False):
        c = r.curves
        slope.fill_between(c.steps, c.lower, c.upper, color=color, alpha=0.18, lw=0)
        slope.plot(c.steps, c.upper, color=color, lw=1.6)
        slope.plot(c.steps, c.lower, color=color, lw=1.6, ls=(0, (4, 1.5)))
        told.plot(c.steps, np.divide(c.gap, c.upper), color=color, lw=1.8, label=name)
        quality.plot(c.steps, c.distance, color=color, lw=1.8, label=name)
    slope.set_title("Lipschitz constant of the critic", fontsize=11)
    told.set_title("Wasserstein distance that the critic proves", fontsize=11)
    quality.set_title("Fréchet distance to real images", fontsize=11)
    slope.plot([], [], color="0.4", lw=1.6, label="at most: product of the layers' norms")
    slope.plot([], [], color="0.4", lw=1.6, ls=(0, (4, 1.5)), label="at least: largest gradient found")
    for axes in (slope, told, quality):
        axes.set_xlabel("step of the generator")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=9, loc="upper left" if axes is slope else "upper right")
    for axes in (slope, quality):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 3) if axes is quality else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    slope.set_ylim(top=8 * max(max(r.curves.upper) for r in results.values()))  # room for the legend
    told.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=12)
    figure.set_dpi(100)
    figure.canvas.draw()
    # 256 colors suffice and take a third of the bytes.
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(256).save(path, optimize=True)
    plt.close(figure)


def mosaic(images: np.ndarray) -> np.ndarray:
    """Tiles images (n, h, w, 1) in a ROWS x ROWS grid with a border of one pixel."""
    tiles = np.pad(images[:SHOWN, :, :, 0], ((0, 0), (1, 1), (1, 1)), constant_values=1)
    h, w = tiles.shape[1:]
    return tiles.reshape(ROWS, ROWS, h, w).transpose(0, 2, 1, 3).reshape(ROWS * h, ROWS * w)
