"""Reports the results of the runs as a table and a picture."""

from __future__ import annotations

import dataclasses
from typing import Any

import matplotlib
import numpy as np
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from terminal import terminal

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOR = "#1f5fa8"
KERNEL = "conv2/kernel"
"""The kernel shown in the picture."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one run. Weight statistics are those of the kernels as the model uses them."""

    technique: Any
    curve: list[float]
    """Test accuracy after each round."""
    kernels: dict[str, np.ndarray]
    sigma: float
    """Largest singular value over all kernels."""
    largest: float
    values: int
    """Largest number of distinct values in a kernel."""
    zeros: float
    norm: float
    bytes: int
    stored_accuracy: float
    """Test accuracy with the stored weights."""
    cost: float
    """Time per step relative to the baseline."""

    @property
    def early(self) -> float:
        return self.curve[0]

    @property
    def accuracy(self) -> float:
        return self.curve[-1]


def progress() -> Progress:
    return Progress(TextColumn("{task.description:>9}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())


def table(title: str, results: dict[str, Result], steps_per_round: int) -> None:
    columns = {
        "early": (f"after\n{steps_per_round} steps", lambda r: f"{100 * r.early:.1f}%"),
        "accuracy": ("test\naccuracy", lambda r: f"{100 * r.accuracy:.1f}%"),
        "sigma": ("largest\nσ", lambda r: f"{r.sigma:.3f}"),
        "largest": ("largest\n|w|", lambda r: f"{r.largest:.3f}"),
        "values": ("distinct\nvalues", lambda r: f"{r.values:,}"),
        "zeros": ("zeros", lambda r: f"{100 * r.zeros:.1f}%"),
        "bytes": ("kB", lambda r: f"{r.bytes / 1000:.1f}"),
        "norm": ("‖w‖", lambda r: f"{r.norm:.1f}"),
        "cost": ("time\na step", lambda r: f"×{r.cost:.2f}"),
    }
    view = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("run", no_wrap=True)
    view.add_column("promise")
    for heading, _ in columns.values():
        view.add_column(heading, justify="right")
    for name, r in results.items():
        cells = [
            f"[bold cyan]{show(r)}[/]" if column == r.technique.column else show(r)
            for column, (_, show) in columns.items()
        ]
        view.add_row(name, r.technique.promise, *cells, end_section=name in ("baseline", list(results)[-2]))
    stored = ", ".join(
        f"{name} {100 * r.stored_accuracy:.1f}%" for name, r in results.items() if r.technique.stored_bits
    )
    view.caption = (
        "In colour: the promise. Measured on the kernels the model computes with; σ and values are those of the "
        "kernel with most. kB: all that evaluation needs, in float32, or kernels as jw.quantize stores them (codes "
        f"and scales; accuracy from those: {stored}). Zeros and shared values are not packed."
    )
    terminal().print(view)


def picture(path: str, results: dict[str, Result], steps_per_round: int) -> None:
    """Draws the accuracy of each run on top of the baseline's, and below it a histogram of one kernel."""
    baseline = results["baseline"]
    columns = -(-len(results) // 2)
    figure, axes = plt.subplots(
        4,
        columns,
        figsize=(2.5 * columns, 9),
        layout="constrained",
        height_ratios=[4, 3, 4, 3],
        sharex="row",
        sharey="row",
    )
    figure.get_layout_engine().set(h_pad=0.06)
    steps = steps_per_round * np.arange(1, len(baseline.curve) + 1)
    limit = max(np.quantile(np.abs(r.kernels[KERNEL]), 0.999) for r in results.values())
    for i, (name, r) in enumerate(results.items()):
        block, column = divmod(i, columns)
        curve, histogram = axes[2 * block, column], axes[2 * block + 1, column]
        curve.plot(steps, [100 * a for a in baseline.curve], color="0.75", lw=3, label="baseline")
        curve.plot(steps, [100 * a for a in r.curve], color=COLOR, lw=1.5)
        curve.set_title(f"$\\bf{{{name.replace(' ', '~')}}}$\n{r.technique.promise or ' '}", fontsize=11)
        curve.text(0.97, 0.06, f"{100 * r.accuracy:.1f}%", transform=curve.transAxes, ha="right", color=COLOR)
        curve.set_ylim(min(80, 100 * min(baseline.curve) - 5), 100.5)
        curve.set_xlabel("step")
        histogram.hist(r.kernels[KERNEL].ravel(), bins=np.linspace(-limit, limit, 202), color=COLOR, log=True)
        histogram.set_xlabel("weight")
        for a in (curve, histogram):
            a.spines[["top", "right"]].set_visible(False)
            a.grid(axis="y", color="0.92")
            a.set_axisbelow(True)
            a.minorticks_off()
        if column == 0:
            curve.set_ylabel("test accuracy, %")
            histogram.set_ylabel(f"weights of\n{KERNEL}")
            curve.legend(loc="lower left", frameon=False, labelcolor="0.5", handlelength=1)
    figure.savefig(path, dpi=110)
    plt.close(figure)
