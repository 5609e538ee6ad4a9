"""Export to the sparse matrices of JAX: coordinates (BCOO) and compressed rows (CSR)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.techniques.sparsification.storage.kept import capacity, kept_matrix, nan_unless

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO, CSR


def to_bcoo(w: jax.Array, mask: jax.Array | None = None, *, nse: int | None = None, axes: Axes | None = None) -> BCOO:
    """Stores the kept entries of a weight as a `jax.experimental.sparse.BCOO` matrix: values, rows and columns.

    Args:
      w: float array of any shape, without batch axes, read as a matrix.
      mask: boolean array of the shape of `w`, true where a weight is kept; by default where `w` is not 0.
      nse: number of entries to allocate, by default as many as are kept. Required under jit.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      A BCOO matrix (rows, columns) with sorted indices. Its `todense()` is `where(mask, w, 0)` bit for bit, except that
      -0.0 becomes +0. Without a mask, -0.0 counts as 0 and NaN is kept. Under jit, all entries become NaN if `nse` is
      too small.

    Raises:
      TypeError: `w` is not a float array, `mask` is not a boolean array, or `nse` is not an integer.
      ValueError: `nse` is too small, or `w` has batch axes or groups.

    >>> import jax.numpy as jnp
    >>> s = to_bcoo(jnp.array([[0.0, 2.0], [3.0, 0.0]]))
    >>> print(s.data, s.indices.tolist())
    [2. 3.] [[0, 1], [1, 0]]
    """
    from jax.experimental.sparse import BCOO  # takes a third of a second to import

    data, rows, columns, shape = _entries(w, mask, nse, axes)
    indices = jnp.stack([rows, columns], 1)
    return BCOO((data, indices), shape=shape, indices_sorted=True, unique_indices=True)


def to_csr(w: jax.Array, mask: jax.Array | None = None, *, nse: int | None = None, axes: Axes | None = None) -> CSR:
    """Stores the kept entries of a weight as a `jax.experimental.sparse.CSR` matrix: an index per entry and per row.

    Arguments, result and errors are as for `to_bcoo`. JAX multiplies a CSR matrix from the left only, `csr @ x`; for
    the product x @ csr use `jw.matmul(x, csr)`.

    >>> import jax.numpy as jnp
    >>> s = to_csr(jnp.array([[0.0, 2.0], [3.0, 0.0]]))
    >>> print(s.data, s.indices, s.indptr)
    [2. 3.] [1 0] [0 1 2]
    """
    from jax.experimental.sparse import CSR

    data, rows, columns, shape = _entries(w, mask, nse, axes)
    starts = jnp.searchsorted(rows, jnp.arange(shape[0] + 1)).astype(jnp.int32)
    return CSR((data, columns, starts), shape=shape)


def _entries(w, mask, nse: int | None, axes: Axes | None) -> tuple[jax.Array, jax.Array, jax.Array, tuple[int, ...]]:
    """(values, rows, columns, shape of the matrix); entries are in order of rows, then of columns."""
    matrix, kept, _ = kept_matrix(w, mask, axes)
    if matrix.ndim > 2:
        raise ValueError(f"w has batch axes or groups: export it under jax.vmap, with nse, got {axes}")
    data, rows, columns = _gather(matrix, kept, capacity("nse", kept, nse))
    return data, rows, columns, matrix.shape


@functools.partial(jax.jit, static_argnums=2)
def _gather(matrix: jax.Array, kept: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, columns = (i.astype(jnp.int32) for i in jnp.nonzero(kept, size=size, fill_value=matrix.shape))
    data = matrix.at[rows, columns].get(mode="fill", fill_value=0)
    return nan_unless(jnp.sum(kept) <= size, data), rows, columns
