"""What a tree of weights is like: a table of sizes, zeros, patterns, values and norms."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxweights.core.axes import Axes, axes_or_default, infer_axes
from jaxweights.core.stored import Stored, nbytes
from jaxweights.levels.paths import Where, flatten, is_weight, select

if TYPE_CHECKING:
    from rich.table import Table


class WeightSummary(NamedTuple):
    """What one weight is like.

    Attributes:
      path: in the tree.
      shape: of the weight.
      form: its dtype, or the name of the type that stores it.
      nbytes: bytes that are stored.
      density: fraction of entries that are not 0.
      pattern: the tightest n:m, n <= m/2 and m one of 2, 4, 8, 16, that the entries along the input keep to, if any
        accounts for the density: at least 9 in 10 of the entries that it allows are there.
      values: how many distinct values there are.
      sigma: the largest singular value of the matrix that it is read as, or of all if it is a stack.
      norm: the Euclidean norm of all entries.
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


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of `summarize`, and what they come to. `print` and rich show a table.

    Attributes:
      rows: one for each weight.
    """

    rows: tuple[WeightSummary, ...]

    @property
    def size(self) -> int:
        """How many entries all weights have."""
        return sum(math.prod(r.shape) for r in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored for all of them."""
        return sum(r.nbytes for r in self.rows)

    @property
    def density(self) -> float:
        """Fraction of all entries that are not 0."""
        return sum(round(r.density * math.prod(r.shape)) for r in self.rows) / max(self.size, 1)

    @property
    def norm(self) -> float:
        """The Euclidean norm of all entries of all weights."""
        return math.hypot(*(r.norm for r in self.rows))

    def __rich__(self) -> Table:
        from rich import box  # Flax brings it; most calls do without
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1, 0, 0))
        table.add_column("weight", f"{self.size:,} entries", no_wrap=True)
        table.add_column("shape")
        table.add_column("form")
        for heading, footer in (
            ("kB", f"{self.nbytes / 1000:,.1f}"),
            ("density", f"{self.density:.1%}"),
            ("n:m", ""),
            ("values", ""),
            ("σ", ""),
            ("‖w‖", f"{self.norm:.3g}"),
        ):
            table.add_column(heading, footer, justify="right")
        for r in self.rows:
            shape = "×".join(map(str, r.shape))
            numbers = (f"{r.nbytes / 1000:,.1f}", f"{r.density:.1%}", r.pattern or "", f"{r.values:,}")
            table.add_row(r.path, shape, r.form, *numbers, f"{r.sigma:.3g}", f"{r.norm:.3g}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as text:
            console.print(self)
        return text.get()


def summarize(params: Any, where: Where | None = None) -> Summary:
    """Density, pattern, distinct values, σ and norm of every weight, and the bytes it takes.

    For looking at a model: it is computed on the host, one weight after the other, σ by a singular value decomposition.

    Args:
      params: any pytree of weights: arrays, or stored ones such as a `PackedArray`, a `QuantizedArray` or a BCOO.
      where: the weights to show, as for `on_tree`; by default every floating-point array.

    Returns:
      A `Summary`: `print` it, give it to rich, or read its `rows`. Attention and stacks of layers are read as such.

    Raises:
      ValueError: `where` selects nothing, or there is nothing to show.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w = jnp.tile(jnp.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0], [0.0, 0.0]]), (2, 1))
    >>> (row,) = summarize({"dense": {"kernel": jw.sparse.pack(w, sparsity=(1, 4))}}).rows
    >>> print(row.path, row.form, row.nbytes, row.density, row.pattern, row.values, round(row.sigma, 3))
    dense/kernel PackedArray 18 0.25 1:4 3 5.657
    """
    paths, stored, _ = flatten(params, is_leaf=_is_stored)
    dense = [a.todense() if _is_stored(a) else a for a in stored]
    inferred = infer_axes({p: a.shape for p, a in zip(paths, dense, strict=True) if is_weight(a)})
    chosen = select(paths, dense, [(_every_weight, True)], where)
    rows = []
    for i in chosen:
        axes = getattr(stored[i], "axes", None) or inferred.get(paths[i])
        form = type(stored[i]).__name__ if _is_stored(stored[i]) else str(dense[i].dtype)
        rows.append(_row(paths[i], np.asarray(dense[i]), form, nbytes(stored[i]), axes))
    return Summary(tuple(rows))


def _row(path: str, w: np.ndarray, form: str, size: int, axes: Axes | None) -> WeightSummary:
    w = w.astype(np.promote_types(w.dtype, np.float32) if w.dtype.kind == "f" else np.float32)
    matrix = np.asarray(axes_or_default(axes, w.ndim).matrix(w))
    sigma = np.linalg.norm(matrix, 2, (-2, -1)).max(initial=0) if w.size and np.isfinite(w).all() else w.sum()
    density = int(np.count_nonzero(w)) / max(w.size, 1)
    values, norm = np.unique(w).size, float(np.linalg.norm(w.astype(np.float64)))
    return WeightSummary(path, w.shape, form, size, density, _pattern(matrix != 0), values, float(sigma), norm)


def _pattern(kept: np.ndarray) -> str | None:
    *_, rows, columns = kept.shape
    found = []
    for m in (2, 4, 8, 16):
        if rows % m == 0 and kept.any():
            n = int(kept.reshape(-1, m, columns).sum(1).max())
            full = kept.sum() >= 0.9 * n / m * kept.size
            found += [(n / m, f"{n}:{m}")] if 2 * n <= m and full else []
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _every_weight(path: str, w: Any) -> bool:
    return True


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)
