"""Compares the tensors of two files, one at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxweights.command import source
from jaxweights.command.expanding import original_of
from jaxweights.command.forms import form
from jaxweights.command.progress import bar
from jaxweights.command.source import Source
from jaxweights.command.statistics import is_number, parts
from jaxweights.command.table import chosen, count, nbytes, print_json, print_table, shown
from jaxweights.core.stored import is_stored

if TYPE_CHECKING:
    from rich.table import Table

CHANGES = ("only in A", "only in B", "shape", "dtype", "values")


class Change(NamedTuple):
    """How one tensor differs. What has no meaning is None.

    Attributes:
      name: its name in both files.
      changes: what is different; empty if nothing is.
      shapes: its shape in A and in B.
      dtypes: its dtype or format in A and in B.
      nbytes: in A and in B.
      error: ‖B − A‖ / ‖A‖; infinite if A is 0 and B is not.
      cosine: of the angle between A and B; None if one is 0.
      largest: the largest difference of two entries.
    """

    name: str
    changes: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    nbytes: tuple[int | None, int | None]
    error: float | None = None
    cosine: float | None = None
    largest: float | None = None

    @property
    def snr(self) -> float | None:
        """The ratio of signal to noise in dB."""
        if self.error is None or math.isnan(self.error):
            return None
        return -20 * math.log10(self.error) if 0 < self.error < math.inf else math.inf if not self.error else -math.inf


def compare(a: str, b: str, where: Sequence[str] | None = None, *, json: bool = False) -> bool:
    """Prints how the tensors of two files differ. Returns whether any does.

    Args:
      a: one model.
      b: the other.
      where: globs of the names to compare; all without any.
      json: whether to print JSON.
    """
    one, other = (_Named.of(source.open(path)) for path in (a, b))
    names = chosen(dict.fromkeys((*one.places, *other.places)), where)
    changes = []
    with bar("diff", sum(one.nbytes(name) + other.nbytes(name) for name in names)) as advance:
        for name in names:
            changes.append(_compare(name, one.read(name), other.read(name)))
            advance(one.nbytes(name) + other.nbytes(name))
    if json:
        print_json(_report(a, b, changes))
    else:
        _print(a, b, changes)
    return any(change.changes for change in changes)


class _Tensor(NamedTuple):
    values: np.ndarray
    dtype: str
    nbytes: int


class _Named(NamedTuple):
    """A model whose tensors have the names and the shapes of the model that it was made of, if `compress` says so."""

    model: Source
    places: dict[str, tuple[str, bool]]

    @classmethod
    def of(cls, model: Source) -> _Named:
        original = original_of(model.metadata)
        told = {name: original.get(name, {}) for name in model.items}
        places = {of.get("name", name): (name, of.get("transposed", False)) for name, of in told.items()}
        if len(places) < len(told):
            raise ValueError(f"{model.path.name} says of two tensors that they had one name before: it is damaged")
        return cls(model, places)

    def nbytes(self, name: str) -> int:
        return self.model.items[self.places[name][0]].nbytes if name in self.places else 0

    def read(self, name: str) -> _Tensor | None:
        """A tensor as values; None if the model has none of this name."""
        if name not in self.places:
            return None
        own, transposed = self.places[name]
        item, value = self.model.items[own], self.model.read(own)
        values = np.asarray(value.todense() if is_stored(value) else value)
        return _Tensor(np.swapaxes(values, -1, -2) if transposed else values, form(item, value), item.nbytes)


def _compare(name: str, a: _Tensor | None, b: _Tensor | None) -> Change:
    """How a tensor differs in two files, one of which has it."""
    shapes = a and a.values.shape, b and b.values.shape
    dtypes, nbytes = (a and a.dtype, b and b.dtype), (a and a.nbytes, b and b.nbytes)
    if a is None or b is None:
        return Change(name, ("only in A" if b is None else "only in B",), shapes, dtypes, nbytes)
    if a.values.shape != b.values.shape:
        return Change(name, ("shape", "dtype") if a.dtype != b.dtype else ("shape",), shapes, dtypes, nbytes)
    same, *distances = distances_of(a.values, b.values)
    changes = [what for what, differs in (("dtype", a.dtype != b.dtype), ("values", not same)) if differs]
    return Change(name, tuple(changes), shapes, dtypes, nbytes, *distances)


def distances_of(a: np.ndarray, b: np.ndarray) -> tuple[bool, float | None, float | None, float | None]:
    """(whether the values are the same, the error, the cosine, the largest difference) of two arrays of one shape."""
    if not is_number(a) or not is_number(b):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes(), None, None, None
    same = bool(np.array_equal(a, b)) if a.dtype.kind in "iub" and b.dtype.kind in "iub" else True
    largest_of = [float(np.abs(x).max(initial=0, where=np.isfinite(x))) for both in parts(a, b) for x in both]
    scale = max(largest_of, default=0) or 1.0  # squares of larger numbers may overflow
    aa = bb = ab = dd = largest = 0.0
    for one, other in parts(a, b):
        same = same and bool(np.array_equal(one, other, equal_nan=True))
        one, other = one / scale, other / scale
        with np.errstate(invalid="ignore"):  # infinity less infinity
            change = other - one
            aa, bb, ab = aa + float(one @ one), bb + float(other @ other), ab + float(one @ other)
            dd, largest = dd + float(change @ change), max(largest, float(np.abs(change).max()))
    if not math.isfinite(aa + bb):
        return same, None, None, None
    error = math.sqrt(dd / aa) if aa else math.inf if bb else 0.0
    cosine = min(1.0, ab / math.sqrt(aa) / math.sqrt(bb)) if aa and bb else None
    return same, error, cosine, largest * scale


def _report(a: str, b: str, changes: Sequence[Change]) -> dict[str, Any]:
    """What `--json` prints."""
    tensors = [change._asdict() | {"snr": change.snr} for change in changes]
    return {"a": a, "b": b, "tensors": tensors, "totals": _totals(changes)}


def _totals(changes: Sequence[Change]) -> dict[str, Any]:
    return {
        "tensors": len(changes),
        "same": sum(not change.changes for change in changes),
        **{what.replace(" ", "_"): sum(what in change.changes for change in changes) for what in CHANGES},
        "nbytes": [sum(change.nbytes[side] or 0 for change in changes) for side in (0, 1)],
    }


def _print(a: str, b: str, changes: Sequence[Change]) -> None:
    """Prints a table of what differs, and a summary."""
    different = [change for change in changes if change.changes]
    if different:
        print(f"A {a}\nB {b}\n")
        print_table([change.name for change in different], functools.partial(_table, different))
        print()
    totals = _totals(changes)
    counts = {what: totals[what.replace(" ", "_")] for what in CHANGES}
    told = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    words = f"{totals['same']} the same, {len(different)} different" + (f" ({told})" if told else "")
    print(f"{count(len(changes), 'tensor')}: {words}")
    one, other = totals["nbytes"]
    print(f"bytes: {nbytes(one)} in A, {nbytes(other)} in B" + (f" ({other / one:.1%})" if one else ""))


def _table(changes: Sequence[Change], names: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("tensor", "change", "shape", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("error", "cosine", "max |Δ|", "SNR", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change, name in zip(changes, names, strict=True):
        shapes = ["×".join(map(str, shape)) or "()" for shape in change.shapes if shape is not None]
        numbers = [
            f"{change.error:.3g}" if change.error is not None else "",
            f"{change.cosine:.6f}" if change.cosine is not None else "",
            f"{change.largest:.3g}" if change.largest is not None else "",
            f"{change.snr:.1f} dB" if change.snr is not None and math.isfinite(change.snr) else "",
        ]
        cells = [
            ", ".join(change.changes),
            _arrow(shapes),
            _arrow([dtype for dtype in change.dtypes if dtype is not None]),
            *numbers,
            _arrow([nbytes(n) for n in change.nbytes if n is not None]),
        ]
        table.add_row(*map(Text, (shown(name), *cells)))
    return table


def _arrow(sides: Sequence[str]) -> str:
    """What is in A and in B, once if it is the same."""
    return " → ".join(dict.fromkeys(sides))
