"""What one-shot methods share: functions of a weight and the second moment E[xxᵀ] of its inputs."""

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


def inverse_factor(h: jax.Array, damping: float | jax.Array) -> jax.Array:
    """The upper triangular U with UᵀU = (H + λI)⁻¹, λ = damping·mean(diag H), of a positive semidefinite H.

    An input that never occurs, H_jj = 0, gets the mean in place of this 0, which decouples it from the others. The mean
    is taken over the other inputs.

    Where H + λI is singular to rounding, because inputs are linearly dependent and the damping does not make up for it,
    its diagonal is raised by the least fraction from n·ε, 10n·ε, ... at which the pivots can be told from rounding
    errors. An input that depends on later ones then has a large U_ii, so it is the first to be pruned, and no input
    leans on it. So U is finite for every finite H.
    """
    diagonal = jnp.diagonal(h)
    dead = diagonal <= 0
    mean = jnp.sum(jnp.where(dead, 0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1).astype(h.dtype)
    mean = jnp.where(mean > 0, mean, 1)
    h = h / mean + jnp.diag(dead.astype(h.dtype) + jnp.asarray(damping, h.dtype))
    # With a diagonal of 1, a raised diagonal is the same for all inputs, and dependence shows in the pivots alone.
    scale = jnp.sqrt(jnp.diagonal(h))[None]
    return map_matrices(_reverse_inverse, h / scale / scale.T) / (scale * jnp.sqrt(mean))


def _reverse_inverse(a: jax.Array) -> jax.Array:
    """R⁻¹ for the factor R of A."""
    return jax.scipy.linalg.solve_triangular(_reverse_cholesky(a), jnp.eye(len(a), dtype=a.dtype), lower=False)


def _reverse_cholesky(a: jax.Array) -> jax.Array:
    """The upper triangular R with RRᵀ = A + rise·I, for A of diagonal 1 and the least `rise` that gives sound pivots.

    That is the Cholesky factor in reverse order of rows and columns. In exact arithmetic the square of each pivot is at
    least `rise`. One that is much smaller consists of rounding errors.
    """
    least = len(a) * jnp.finfo(a.dtype).eps

    def factor(rise):
        raised = a + rise * jnp.eye(len(a), dtype=a.dtype)
        return jnp.linalg.cholesky(raised[::-1, ::-1])[::-1, ::-1]

    def unsound(state):
        rise, r = state
        pivots = jnp.square(jnp.diagonal(r))
        return (rise < len(a)) & ~jnp.all(pivots >= jnp.maximum(rise, least) / 2)

    def raise_more(state):
        rise, _ = state
        rise = jnp.maximum(10 * rise, least)
        return rise, factor(rise)

    none = jnp.zeros((), a.dtype)
    return jax.lax.while_loop(unsound, raise_more, (none, factor(none)))[1]
