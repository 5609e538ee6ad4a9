"""Weights beside the second moment E[xxᵀ] of their inputs: matrices with their own, and its inverse by factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_weight
from jaxweights.numerics.batching import map_matrices
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.sharding import auto_sharded


def with_second_moment(
    f: Callable[..., Any], w: jax.Array, second_moment: jax.Array, *others: jax.Array, axes: Axes | None
) -> Any:
    """f(matrix, second_moment, *others) for each matrix of a weight, its results laid out as the weight.

    Args:
      f: a function of a matrix (rows, columns), of (rows, rows), both in float32 or wider, and of the others as they
        are, to a pytree of matrices (rows, columns).
      w: float array of any shape.
      second_moment: float array (*batch, [groups,] rows, rows).
      *others: arrays of the shape of `w`.
      axes: how `w` is read as matrices.

    Raises:
      TypeError: `second_moment` is not a float array.
      ValueError: its shape does not fit, or `axes` does not fit `w`.
    """
    axes = axes_or_default(axes, w.ndim)
    *batch, rows, _ = jax.eval_shape(axes.matrix, w).shape
    second_moment = check_weight(second_moment, "second_moment")
    if second_moment.shape != (*batch, rows, rows):
        raise ValueError(
            f"second_moment must have shape {(*batch, rows, rows)} for a weight of shape {w.shape}, got "
            f"{second_moment.shape}: take it, and axes, from what capture returns for this weight"
        )

    def run(w, second_moment, *others):
        g = lambda m, h, *o: f(m.astype(accumulation_dtype(w.dtype)), h.astype(accumulation_dtype(h.dtype)), *o)
        for _ in batch:
            g = jax.vmap(g)
        out = g(axes.matrix(w), second_moment, *map(axes.matrix, others))
        return jax.tree.map(lambda m: axes.weight(m, w.shape), out)

    return auto_sharded(run, w, second_moment, *others, like=w)


def inverse_factor(h: jax.Array, damping: float | jax.Array) -> jax.Array:
    """The upper triangular U with UᵀU = (H + λI)⁻¹, λ = damping·mean(diag H), of a symmetric H.

    A feature that never occurs, H_jj = 0, has the mean in place of its 0, and so has nothing to do with the others.
    H is scaled to 1 first, so that none is too large or too small.
    """
    diagonal = jnp.diagonal(h)
    dead = diagonal <= 0
    mean = jnp.sum(jnp.where(dead, 0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1)
    mean = jnp.where(mean > 0, mean, 1)
    h = h / mean + jnp.diag(dead + jnp.asarray(damping, h.dtype))
    # H = RRᵀ with an upper triangular R, which is the Cholesky factor from the last row up. Then U = R⁻¹.
    return map_matrices(_inverse_cholesky, h) / jnp.sqrt(mean)


def _inverse_cholesky(h: jax.Array) -> jax.Array:
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(r, jnp.eye(len(h), dtype=h.dtype), lower=False)
