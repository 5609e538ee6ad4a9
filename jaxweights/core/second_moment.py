"""Functions of each matrix of a weight and the second moment E[xxᵀ] of its inputs, on which one-shot methods stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxweights.core.axes import Axes, Reading, axes_or_default
from jaxweights.core.checks import check_weight
from jaxweights.core.layer import Layer, stored_matrix
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
    second_moment = _check_second_moment(second_moment, w, axes)

    def all_matrices(w, second_moment, *others):
        results = _over_batch(f, axes.matrix(w), second_moment, *map(axes.matrix, others))
        return jax.tree.map(lambda m: axes.weight(m, w.shape), results)

    return auto_sharded(all_matrices, w, second_moment, *others, like=w)


def stored_with_second_moment(
    f: Callable[..., Any], w: jax.Array, second_moment: jax.Array, *rows: jax.Array, axes: Axes | None
) -> tuple[Any, Layer]:
    """Applies f(matrix, second_moment, *rows) to each matrix of a weight: for the arrays that a stored one consists of.

    Args:
      f: function of a matrix (rows, columns) and its second moment (rows, rows), both in float32 or wider, and of the
        vectors of `rows`. It returns a pytree of arrays.
      w: float array of any shape.
      second_moment: float array (*batch, [groups,] rows, rows).
      *rows: arrays (*batch, [groups,] rows).
      axes: how `w` is read as a matrix.

    Returns:
      (the pytree that `f` returns, of arrays with the batch axes and groups of `w` in front, the layer of `w`).

    Raises:
      TypeError: `second_moment` is not a float array.
      ValueError: `second_moment` or `axes` does not fit the shape of `w`.
    """
    axes = axes_or_default(axes, w.ndim)
    second_moment = _check_second_moment(second_moment, w, axes)
    batch = Reading.of(axes, w.shape).batch
    order = sorted(range(len(batch)), key=batch.__getitem__)
    statistics = [a.transpose(*order, *range(len(order), a.ndim)) for a in (second_moment, *rows)]
    matrix, layer = stored_matrix(w, axes)

    def all_matrices(matrix, *statistics):
        return _over_batch(f, matrix, *statistics)

    *lead, _, columns = jax.typeof(matrix).sharding.spec

    def spec(a: jax.ShapeDtypeStruct) -> jax.sharding.PartitionSpec:
        per_column = a.ndim == matrix.ndim and a.shape[-1] == matrix.shape[-1]
        inner = [None] * (a.ndim - len(lead) - 1) + [columns if per_column else None]
        return jax.sharding.PartitionSpec(*lead, *inner)

    unplaced = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (matrix, *statistics))
    like = jax.tree.map(spec, jax.eval_shape(all_matrices, *unplaced))
    return auto_sharded(all_matrices, matrix, *statistics, like=like), layer


def _over_batch(f: Callable[..., Any], matrix: jax.Array, second_moment: jax.Array, *others: jax.Array) -> Any:
    """f of each matrix, the matrix and the second moment in float32 or wider."""

    def one_matrix(matrix, h, *others):
        return f(matrix.astype(accumulation_dtype(matrix.dtype)), h.astype(accumulation_dtype(h.dtype)), *others)

    for _ in matrix.shape[:-2]:
        one_matrix = jax.vmap(one_matrix)
    return one_matrix(matrix, second_moment, *others)


def _check_second_moment(second_moment: jax.Array, w: jax.Array, axes: Axes) -> jax.Array:
    *batch, rows, _ = jax.eval_shape(axes.matrix, w).shape
    second_moment = check_weight(second_moment, "second_moment")
    if second_moment.shape != (*batch, rows, rows):
        raise ValueError(
            f"second_moment must have shape {(*batch, rows, rows)} for a weight of shape {w.shape}, got "
            f"{second_moment.shape}: take it, and axes, from what capture returns for this weight"
        )
    return second_moment
