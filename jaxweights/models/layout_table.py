"""The table of a layout, in any width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxweights.core.axes import in_words
from jaxweights.models.summary_table import shortened

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

    from jaxweights.models.layout import Layout, Weight

CAPTION = (
    "all: every technique; conv: ConvSpectralNorm too, on images of the shape that the layer gets. "
    "entrywise: decay, clipping, pruning, quantization and sharing, which need no axes."
)


def layout_table(layout: Layout, console: Console, options: ConsoleOptions) -> Iterator[Table | str]:
    """The table, and what its words mean. Where it is too wide, the paths get shorter."""
    from rich.measure import Measurement  # a dependency of Flax, imported only to show a table

    paths = [w.path for w in layout.weights]
    wide = options.update(max_width=1000)
    without = Measurement.get(console, wide, _table(layout, [""] * len(paths))).maximum
    yield _table(layout, shortened(paths, max(options.max_width - without + len("weight"), 12)))
    yield CAPTION


def _table(layout: Layout, paths: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for heading in ("weight", "shape", "axes", "techniques"):
        table.add_column(heading, no_wrap=True)
    table.add_column("why")
    for path, w in zip(paths, layout.weights, strict=True):
        table.add_row(path, "×".join(map(str, w.shape)), in_words(w.axes, w.shape), _techniques(w), w.why)
    return table


def _techniques(w: Weight) -> str:
    """Which techniques apply to a weight."""
    if w.axes is None:
        return "entrywise"
    return "all, conv" if w.convolution else "all"
