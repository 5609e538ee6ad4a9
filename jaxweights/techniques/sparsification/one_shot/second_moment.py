"""What one-shot methods share: functions of a weight and the second moment E[xxᵀ] of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_weight
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.sharding import auto_sharded


def with_second_moment(
    f: Callable[..., Any], w: jax.Array, second_moment: jax.Array, *others: jax.Array, axes: Axes | None
) -> Any:
    """Applies f(matrix, second_moment, *others) to each matrix of a weight and lays out the results like the weight.

    Args:
      f: function of a matrix (rows, columns) and its second moment (rows, rows), both in float32 or wider, and of the
        matrices of `others` in their own dtypes. It returns a pytree of matrices (rows, columns).
      w: float array of any shape.
      second_moment: float array (*batch, [groups,] rows, rows).
      *others: arrays of the shape of `w`.
      axes: how `w` is read as a matrix.

    Returns:
      The pytree that `f` returns, of arrays of the shape of `w`.

    Raises:
      TypeError: `second_moment` is not a float array.
      ValueError: `second_moment` or `axes` does not fit the shape of `w`.
    """
    axes = axes_or_default(axes, w.ndim)
    *batch, rows, _ = jax.eval_shape(axes.matrix, w).shape
    second_moment = check_weight(second_moment, "second_moment")
    if second_moment.shape != (*batch, rows, rows):
        raise ValueError(
            f"second_moment must have shape {(*batch, rows, rows)} for a weight of shape {w.shape}, got "
            f"{second_moment.shape}: take it, and axes, from what capture returns for this weight"
        )

    def one_matrix(matrix, h, *others):
        return f(matrix.astype(accumulation_dtype(w.dtype)), h.astype(accumulation_dtype(h.dtype)), *others)

    def all_matrices(w, second_moment, *others):
        mapped = one_matrix
        for _ in batch:
            mapped = jax.vmap(mapped)
        results = mapped(axes.matrix(w), second_moment, *map(axes.matrix, others))
        return jax.tree.map(lambda m: axes.weight(m, w.shape), results)

    return auto_sharded(all_matrices, w, second_moment, *others, like=w)
