"""The page of pictures of `jaxweights inspect --plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxweights.command.portrait import BITS, EDGES, MOST_OUTPUTS, Portrait
from jaxweights.command.table import nbytes, shown
from jaxweights.files.writing import replacing
from jaxweights.models.plots import plot_density
from jaxweights.models.summary import Summary, WeightSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Panel

    from jaxweights.command.inspecting import Row

SUFFIXES = (".png", ".svg", ".pdf")
_BARS, _MANY = 16, 16
_COLOR, _OTHER, _GRAY = "#1f5fa8", "#c8501e", "#8a94a0"


def check_picture(path: Path) -> None:
    """Raises if no picture can be written there."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot must end in {', '.join(SUFFIXES)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise ImportError("--plot needs matplotlib, which is not installed: pip install matplotlib") from e


def draw_page(path: Path, title: str, rows: Sequence[Row], portraits: Sequence[Portrait]) -> None:
    """Writes the page. The file appears once it is whole."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = [panel for row in np.ravel(np.asarray(figure.subfigures(2, 1))) for panel in row.subplots(1, 2)]
    size, n_bytes = sum(row.size for row in rows), sum(row.nbytes for row in rows)
    figure.suptitle(f"{_plain(title)}: {len(rows)} tensors, {size:,} entries, {nbytes(n_bytes)}", fontsize=14)
    for draw, panel in zip((draw_histogram, draw_spectrum, draw_errors), panels[:3], strict=True):
        draw(panel, portraits)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    draw_densities(panels[3], rows)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=130)


def draw_histogram(panel: Panel, portraits: Sequence[Portrait]) -> None:
    """The entries that are not 0, in standard deviations of their weight, beside the normal distribution."""
    panel.set_title("entries, in standard deviations of their weight")
    panel.set_xlabel("w / std; the outer bins hold all that lies beyond")
    panel.set_ylabel("share of entries in a bin")
    if not portraits:
        return
    middles = (EDGES[:-1] + EDGES[1:]) / 2
    together = sum(p.counts for p in portraits)
    normal = np.exp(-(middles**2) / 2) / np.sqrt(2 * np.pi) * (EDGES[1] - EDGES[0])
    panel.stairs(together / np.sum(together), EDGES, fill=True, color=_COLOR, alpha=0.75, label="all weights")
    panel.plot(middles, normal, color=_OTHER, lw=1.5, ls="--", label="normal distribution")
    panel.set_yscale("log")
    panel.set_ylim(0.3 / np.sum(together), 1)
    panel.set_xlim(EDGES[0], EDGES[-1])
    panel.legend(frameon=False, fontsize=9)


def draw_spectrum(panel: Panel, portraits: Sequence[Portrait]) -> None:
    """The singular values of each weight over its largest."""
    panel.set_title("singular values")
    panel.set_xlabel(f"index / number of them (of {MOST_OUTPUTS:,} outputs where there are more)")
    panel.set_ylabel("σ / largest σ")
    drawn = [p for p in portraits if len(p.singular_values) > 1 and p.singular_values[0] > 0]
    if not drawn:
        return

    def flatness(p: Portrait) -> float:
        return float(np.sum(p.singular_values**2) / p.singular_values[0] ** 2 / len(p.singular_values))

    many = [p for p in drawn if len(p.singular_values) >= _MANY] or drawn
    marked = {id(min(many, key=flatness)): _OTHER, id(max(many, key=flatness)): _COLOR}
    for p in sorted(drawn, key=lambda p: id(p) in marked):
        values = np.maximum(p.singular_values / p.singular_values[0], 1e-6)
        _line(panel, np.linspace(0, 1, len(values)), values, marked.get(id(p)), p.name)
    panel.set_yscale("log")
    panel.set_ylim(1e-4, 1.5)
    panel.legend(frameon=False, fontsize=8, loc="lower left", title="steepest and flattest", title_fontsize=8)


def draw_errors(panel: Panel, portraits: Sequence[Portrait]) -> None:
    """The error of rounding each weight to 2 to 8 bits."""
    panel.set_title("error of rounding, with a scale per output unit")
    panel.set_xlabel("bits")
    panel.set_ylabel("‖q − w‖ / ‖w‖")
    if not portraits:
        return
    middle = np.median([p.errors for p in portraits], axis=0)
    worst = max(portraits, key=lambda p: p.errors[BITS.index(4)])
    for p in portraits:
        _line(panel, BITS, p.errors, None, p.name)
    _line(panel, BITS, worst.errors, _OTHER, worst.name)
    _line(panel, BITS, middle, _COLOR, "median")
    if np.min([p.errors for p in portraits]) > 0:
        panel.set_yscale("log")
    panel.set_xticks(BITS)
    panel.yaxis.set_major_formatter(
        lambda y, _: f"{y:.3%}" if y < 0.001 else f"{y:.2g}" if y > 1 else f"{100 * y:.3g}%"
    )
    panel.legend(frameon=False, fontsize=8, loc="lower left", title="at 4 bits the worst, and all", title_fontsize=8)


def draw_densities(panel: Panel, rows: Sequence[Row]) -> None:
    """The density of the weights with the most zeros."""
    weights = [row for row in rows if row.statistics and row.axes and row.statistics.std is not None]
    weights = sorted(weights, key=lambda row: row.statistics.density if row.statistics else 1.0)[:_BARS]
    panel.set_title("density" if len(weights) < _BARS else f"density of the {_BARS} weights with the most zeros")
    if not weights:
        panel.set_axis_off()
        return
    plot_density(Summary(tuple(_summary(row) for row in weights)), panel=panel)


def _summary(row: Row) -> WeightSummary:
    """A row as `plot_density` takes it, which looks at name and density alone."""
    assert row.statistics is not None
    density = row.statistics.density
    name = _short(row.name)
    return WeightSummary(name, row.shape, row.dtype, row.nbytes, density, None, 0, 0.0, 0.0, None, row.is_guess)


def _line(panel: Panel, x: Any, y: Any, color: str | None, name: str) -> None:
    """A line in the background without a color; else one with a label."""
    if color is None:
        panel.plot(x, y, color=_GRAY, lw=0.8, alpha=0.45)
    else:
        panel.plot(x, y, color=color, lw=2, label=_short(name))


def _short(name: str, width: int = 44) -> str:
    """The end of a name, which tells most."""
    name = _plain(name)
    return name if len(name) <= width else "…" + name[-width + 1 :]


def _plain(text: str) -> str:
    """Text in which "$" does not start a formula."""
    return shown(text).replace("$", r"\$")
