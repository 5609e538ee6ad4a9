"""Looks at the tensors of a file, one at a time, and shows what it found."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxweights.command import source
from jaxweights.command.forms import form
from jaxweights.command.page import check_picture, draw_page
from jaxweights.command.portrait import Portrait, portrait
from jaxweights.command.progress import bar
from jaxweights.command.source import Source
from jaxweights.command.statistics import Statistics, is_number, statistics
from jaxweights.command.table import chosen, count, nbytes, percent, print_json, print_table, shown
from jaxweights.core.axes import Axes, Reading, in_words
from jaxweights.core.inference import infer
from jaxweights.core.stored import is_stored

if TYPE_CHECKING:
    from rich.table import Table


class Row(NamedTuple):
    """What there is to show of a tensor.

    Attributes:
      name: its name.
      shape: of the weight.
      dtype: its dtype or format.
      nbytes: in the file.
      statistics: of its values; None if they are no numbers.
      axes: the role of each axis in words; "" of what is no matrix.
      is_guess: whether another reading fits, of which σ is another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    statistics: Statistics | None
    axes: str
    is_guess: bool

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


def inspect(
    file: str, where: Sequence[str] | None = None, order: str = "file", *, json: bool = False, plot: str | None = None
) -> None:
    """Prints the table or the JSON of the tensors of a file, and draws the page.

    Args:
      file: the model.
      where: globs of the names to show; all without any.
      order: "file", "name", "bytes", "density", "sigma" or "outliers".
      json: whether to print JSON.
      plot: where to draw the page.
    """
    if plot is not None:
        check_picture(Path(plot))
    model = source.open(file)
    rows, portraits = _looked_at(model, chosen(model.items, where), plot is not None)
    if plot is not None:
        draw_page(Path(plot), Path(file).name, rows, portraits)
    rows = _sorted(rows, order)
    if json:
        print_json(_report(file, rows))
    else:
        _print(rows)


def _looked_at(model: Source, names: Sequence[str], plot: bool) -> tuple[list[Row], list[Portrait]]:
    """The rows of the tensors of these names, and the portraits of those that are weights if there is a page to draw.

    The tensors are read one at a time.
    """
    shapes = {name.replace(".", "/"): item.shape for name, item in model.items.items() if item.shape is not None}
    inferred = infer(shapes)
    rows, portraits = [], []
    with bar("inspect", sum(model.items[name].nbytes for name in names)) as advance:
        for name in names:
            value, path = model.read(name), name.replace(".", "/")
            dtype, n = form(model.items[name], value), model.items[name].nbytes
            if is_stored(value):
                axes, others, value = getattr(value, "axes", None), (), np.asarray(value.todense())
            else:  # alone, if only reading told its shape, or names differ in "." and "/" alone
                found = inferred if shapes.get(path) == value.shape else infer({path: value.shape})
                axes, others, value = found[path].axes, found[path].others, np.asarray(value)
            rows.append(_row(name, value, dtype, n, axes, others))
            if plot and axes is not None and rows[-1].statistics and rows[-1].statistics.std:
                drawn = portrait(name, value, axes)
                portraits += [] if drawn is None else [drawn]
            advance(n)
    return rows, portraits


def _row(name: str, value: np.ndarray, dtype: str, nbytes: int, axes: Axes | None, others: Sequence[Axes]) -> Row:
    shape, told = tuple(value.shape), None
    if is_number(value):
        told = statistics(value, axes)
    if value.dtype.kind in "biu" and told is not None:
        told = Statistics(told.density)
    readings = [Reading.of(one, shape) for one in (axes, *others) if one is not None]
    is_guess = any(not one.same_matrices(readings[0]) for one in readings)
    return Row(name, shape, dtype, nbytes, told, in_words(axes, shape), is_guess)


def _sorted(rows: list[Row], order: str) -> list[Row]:
    """The rows in order. Those without a number come last."""
    if order == "file":
        return rows
    if order == "name":
        return sorted(rows, key=lambda row: row.name)

    def number(row: Row) -> float:
        value = row.nbytes if order == "bytes" else getattr(row.statistics, order, None)
        return -math.inf if value is None else value

    return sorted(rows, key=number, reverse=True)


def _totals(rows: Sequence[Row]) -> dict[str, Any]:
    size = sum(row.size for row in rows)
    kept = sum(row.size * row.statistics.density for row in rows if row.statistics)
    known = sum(row.size for row in rows if row.statistics)
    return {
        "tensors": len(rows),
        "size": size,
        "nbytes": sum(row.nbytes for row in rows),
        "density": kept / known if known else 1.0,
        "not_finite": sum(row.statistics.not_finite for row in rows if row.statistics),
    }


def _report(file: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What `--json` prints."""
    tensors = []
    for row in rows:
        told = {key: value for key, value in row._asdict().items() if key != "statistics"} | {"size": row.size}
        tensors.append(told | (row.statistics._asdict() if row.statistics else {}))
    return {"file": file, "tensors": tensors, "totals": _totals(rows)}


def _print(rows: Sequence[Row]) -> None:
    """Prints the table and what there is to say of it."""
    print_table([row.name for row in rows], functools.partial(_table, rows))
    guesses = [row for row in rows if row.is_guess]
    if guesses:
        one = guesses[0]
        print(f"? {count(len(guesses), 'weight')} could be read otherwise: {shown(one.name)} was read as {one.axes}")
    if broken := [row.name for row in rows if row.statistics and row.statistics.not_finite]:
        print(
            f"NaN or infinity in {count(len(broken), 'tensor')}: {shown(broken[0])}" + (", ..." if broken[1:] else "")
        )


def _table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    totals = _totals(rows)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_footer=True, padding=(0, 1, 0, 0), pad_edge=False)
    footers = {
        "tensor": count(len(rows), "tensor"),
        "shape": f"{totals['size']:,}",
        "dtype": "",
        "density": percent(totals["density"]),
        "σ": "",
        "outliers": "",
        "bytes": nbytes(totals["nbytes"]),
    }
    for heading, footer in footers.items():
        justify = "left" if heading in ("tensor", "shape", "dtype") else "right"
        table.add_column(heading, footer, justify=justify, no_wrap=True)
    for row, name in zip(rows, names, strict=True):
        shape = "×".join(map(str, row.shape)) or "()"
        table.add_row(*map(Text, (shown(name), shape, row.dtype, *_numbers(row), nbytes(row.nbytes))))
    return table


def _numbers(row: Row) -> tuple[str, str, str]:
    """Density, σ and outliers of a tensor, as far as they have a meaning."""
    s = row.statistics
    if s is None:
        return "", "", ""
    if s.not_finite:
        return percent(s.density), "", "not finite"
    sigma = "" if s.sigma is None else f"{'≥' if s.is_bound else ''}{s.sigma:.3g}{'?' if row.is_guess else ''}"
    return percent(s.density), sigma, "" if s.outliers is None else percent(s.outliers)
