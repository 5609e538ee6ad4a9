"""The triangular factor of the inverse of a second moment, finite where the matrix is singular."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.numerics.batching import map_matrices


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
