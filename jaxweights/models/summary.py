"""Summaries of a tree of weights: the size, sparsity, distinct values and norms of each."""

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
    """The summary of one weight.

    Attributes:
      path: path in the tree.
      shape: shape of the weight.
      form: its dtype, or the name of the type that stores it.
      nbytes: bytes of storage.
      density: fraction of entries that are not 0.
      pattern: the tightest n:m pattern along the input that the entries fit, with n <= m/2 and m one of 2, 4, 8, 16.
        None unless the pattern explains the density: at least 9 of 10 entries that it allows are not 0.
      values: number of distinct values.
      sigma: largest singular value of the matrix that the weight is read as; for a stack, the largest of all matrices.
      norm: Euclidean norm of all entries.
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

    def __rich__(self) -> Table:
        from rich import box  # a dependency of Flax, imported only to show a table
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
    """Summarizes the weights of a tree: bytes, density, pattern, distinct values, σ and norm of each.

    Meant for inspection: it runs on the host, one weight at a time, with a singular value decomposition for σ.

    Args:
      params: any pytree of weights: arrays, or stored weights such as a `PackedArray`, a `QuantizedArray` or a BCOO.
      where: the weights to show, as for `on_tree`; by default every floating-point array.

    Returns:
      A `Summary`: `print` it, pass it to rich, or read its `rows`. Attention kernels and stacks of layers are
      recognized by the other weights of their module and read as such.

    Raises:
      ValueError: `where` selects nothing, or the tree has no floating-point array.

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


def _row(path: str, w: np.ndarray, form: str, n_bytes: int, axes: Axes | None) -> WeightSummary:
    w = w.astype(np.promote_types(w.dtype, np.float32) if w.dtype.kind == "f" else np.float32)
    matrix = np.asarray(axes_or_default(axes, w.ndim).matrix(w))
    sigma = np.linalg.norm(matrix, 2, (-2, -1)).max(initial=0) if w.size and np.isfinite(w).all() else w.sum()
    density = int(np.count_nonzero(w)) / max(w.size, 1)
    values, norm = np.unique(w).size, float(np.linalg.norm(w.astype(np.float64)))
    return WeightSummary(path, w.shape, form, n_bytes, density, _pattern(matrix != 0), values, float(sigma), norm)


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


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)
