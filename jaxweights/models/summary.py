"""Summaries of a tree of weights: the size, sparsity, distinct values and norms of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxweights.core.axes import Axes, Reading, axes_or_default
from jaxweights.core.checks import naming
from jaxweights.core.guesses import warn
from jaxweights.core.inference import infer
from jaxweights.core.stored import is_stored, nbytes
from jaxweights.levels.paths import Where, check_layout, flatten, is_weight, select
from jaxweights.models.summary_table import printed, summary_table
from jaxweights.techniques.quantization.array import QuantizedArray

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table


class WeightSummary(NamedTuple):
    """The summary of one weight.

    Attributes:
      path: path in the tree.
      shape: shape of the weight.
      form: its dtype; of a `QuantizedArray` its format; of other stored weights the name of their type.
      nbytes: bytes of storage.
      density: fraction of entries that are not 0.
      pattern: the tightest n:m pattern along the input that the entries fit, with n <= m/2 and m one of 2, 4, 8, 16.
        None unless the pattern explains the density: at least 9 of 10 entries that it allows are not 0.
      values: number of distinct values.
      sigma: largest singular value of the matrix that the weight is read as; for a stack or a grouped convolution, the
        largest of all matrices. For a convolution it is that of the kernel as (window·in, out), not of the layer on an
        image: see `conv_spectral_norm`.
      norm: Euclidean norm of all entries.
      axes: how the weight is read as a matrix; None for a bias, a scale, a token or a position by name or shape.
      guess: whether another reading fits its name and shape as well.
    """

    path: str
    shape: tuple[int, ...]
    form: str
    nbytes: int
    density: float
    pattern: str | None
    values: int
    sigma: float
    norm: float
    axes: Axes | None = None
    guess: bool = False


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of `summarize` and their totals. `print` and rich show it as a table.

    Attributes:
      rows: one row per weight.
    """

    rows: tuple[WeightSummary, ...]

    @property
    def size(self) -> int:
        """Number of entries of all weights."""
        return sum(math.prod(r.shape) for r in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of storage of all weights."""
        return sum(r.nbytes for r in self.rows)

    @property
    def density(self) -> float:
        """Fraction of all entries that are not 0."""
        return sum(round(r.density * math.prod(r.shape)) for r in self.rows) / max(self.size, 1)

    @property
    def norm(self) -> float:
        """Euclidean norm of all entries of all weights."""
        return math.hypot(*(r.norm for r in self.rows))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield summary_table(self, console, options)

    def __str__(self) -> str:
        """The table in the width of the terminal, or in 80 columns without one."""
        return printed(self)


def summarize(params: Any, where: Where | None = None, *, layout: Mapping[str, Axes] | None = None) -> Summary:
    """Summarizes the weights of a tree: axes, bytes, density, pattern, distinct values, σ and norm of each.

    Meant for inspection: it runs on the host, one weight at a time, with a singular value decomposition for σ.

    Args:
      params: any pytree of weights: arrays, or stored weights such as a `PackedArray`, a `QuantizedArray` or a BCOO.
      where: the weights to show, as for `on_tree`; by default every floating-point array.
      layout: how a program reads the weights, from `jaxweights.layout`, or {path: Axes}. Without it, axes follow from
        names and shapes, as `jaxweights.describe` says. Those that are a guess are marked with "?".

    Returns:
      A `Summary`: `print` it, pass it to rich, or read its `rows`.

    Raises:
      TypeError: `layout` is not a mapping of `Axes`.
      ValueError: `where` selects nothing, the tree has no floating-point array, or `layout` names a path that is not in
        the tree or axes that do not fit.

    Warns:
      AxesWarning: once a weight, if its axes are a guess that σ depends on.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w = jnp.tile(jnp.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0], [0.0, 0.0]]), (2, 1))
    >>> (row,) = summarize({"dense": {"kernel": jw.sparse.pack(w, sparsity=(1, 4))}}).rows
    >>> print(row.path, row.form, row.nbytes, row.density, row.pattern, row.values, round(row.sigma, 3))
    dense/kernel PackedArray 18 0.25 1:4 3 5.657
    """
    check_layout(layout)
    summary, shapes = read(params, where, layout)
    warn({row.path: _other_sigma for row in summary.rows if row.guess}, shapes)
    return summary


def read(
    params: Any, where: Where | None, known: Mapping[str, Axes] | None
) -> tuple[Summary, dict[str, tuple[int, ...]]]:
    """The summary, and the shapes of all weights."""
    paths, stored, _ = flatten(params)
    dense = [a.todense() if is_stored(a) else a for a in stored]
    shapes = {p: tuple(a.shape) for p, a in zip(paths, dense, strict=True) if is_weight(a)}
    if not shapes:
        raise ValueError(f"params has no floating-point array, got {type(params).__name__}: pass a tree of weights")
    known = _fitting(known or {}, shapes)
    found = infer(shapes)
    rows = []
    for i in select(paths, dense, [(_every_weight, True)], where):
        path = paths[i]
        axes = known.get(path) or getattr(stored[i], "axes", None)
        guess = axes is None and bool(found[path].others)
        form = _form(stored[i])
        rows.append(_row(path, np.asarray(dense[i]), form, nbytes(stored[i]), axes or found[path].axes, guess))
    return Summary(tuple(rows)), shapes


def _fitting(known: Mapping[str, Axes], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Axes]:
    """The readings given. Raises unless they are of weights of the tree and fit them."""
    for path, reading in known.items():
        if path not in shapes:
            raise ValueError(f"layout names {path!r}, which is not in the tree. It has: {', '.join(shapes)}")
        with naming("summarize", path):
            Reading.of(reading, shapes[path])
    return known


def _other_sigma(a: Reading, b: Reading) -> bool:
    """Whether σ depends on which of two readings is right."""
    return not a.same_matrices(b)


def _form(leaf: Any) -> str:
    if isinstance(leaf, QuantizedArray):
        return str(leaf.format)
    return type(leaf).__name__ if is_stored(leaf) else str(leaf.dtype)


def _row(path: str, w: np.ndarray, form: str, n_bytes: int, axes: Axes | None, guess: bool) -> WeightSummary:
    w = w.astype(np.promote_types(w.dtype, np.float32) if w.dtype.kind == "f" else np.float32)
    matrix = np.asarray(axes_or_default(axes, w.ndim).matrix(w))
    sigma = np.linalg.norm(matrix, 2, (-2, -1)).max(initial=0) if w.size and np.isfinite(w).all() else w.sum()
    density = int(np.count_nonzero(w)) / max(w.size, 1)
    values, norm = np.unique(w).size, float(np.linalg.norm(w.astype(np.float64)))
    pattern = _pattern(matrix != 0)
    return WeightSummary(path, w.shape, form, n_bytes, density, pattern, values, float(sigma), norm, axes, guess)


def _pattern(kept: np.ndarray) -> str | None:
    """The `pattern` of `WeightSummary`, of a boolean matrix or a stack of them."""
    *_, rows, columns = kept.shape
    tightest, pattern = 1.0, None
    for m in (2, 4, 8, 16):
        if rows % m or not kept.any():
            continue
        n = int(kept.reshape(-1, m, columns).sum(1).max())
        explains_density = 2 * n <= m and kept.sum() >= 0.9 * n / m * kept.size
        if explains_density and n / m < tightest:
            tightest, pattern = n / m, f"{n}:{m}"
    return pattern


def _every_weight(path: str, w: Any) -> bool:
    return True
