"""Small matrices, (*batch, n, n), by products alone: unlike LAPACK, they suit stacks, meshes and TPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.numerics.norms import safe_divide


def two_leading_vectors(gram: jax.Array) -> jax.Array:
    """The two leading eigenvectors of a positive matrix, (*batch, n, 2), orthonormal or zero.

    Repeated squaring turns G into a multiple of ccᵀ for the leading eigenvector c, unless other eigenvalues are nearly
    as large. Then G is deflated.
    """

    def scaled(p):
        return safe_divide(p, jnp.max(p, (-2, -1), keepdims=True))

    def square(_, p):
        return scaled(jnp.matmul(p, p, precision="highest"))

    def find(gram):
        p = jax.lax.fori_loop(0, 12, square, scaled(gram))
        largest = jax.nn.one_hot(jnp.argmax(jnp.einsum("...ii->...i", p), -1), p.shape[-1], dtype=p.dtype)
        c = jnp.matmul(p, largest[..., None], precision="highest")
        return safe_divide(c, jnp.sqrt(jnp.sum(jnp.square(c), -2, keepdims=True)))

    first = find(gram)
    others = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape) - first * first.mT
    second = find(jnp.matmul(jnp.matmul(others, gram, precision="highest"), others, precision="highest"))
    return jnp.concatenate([first, second], -1)


def inverse_cholesky(gram: jax.Array) -> jax.Array:
    """L⁻¹ of G = LLᵀ, with zeros for vectors that depend on earlier ones, to within √eps."""
    n = gram.shape[-1]
    place, least = jnp.arange(n), jnp.sqrt(jnp.finfo(gram.dtype).eps)

    def eliminate(j, state):
        gram, out = state
        here = place == j
        column = jnp.sum(jnp.where(here, gram, 0), -1)
        pivot = jnp.sum(jnp.where(here, column, 0), -1, keepdims=True)
        inverse = jnp.where(pivot > least, jax.lax.rsqrt(jnp.maximum(pivot, 1e-9)), 0)
        row = jnp.sum(jnp.where(here[:, None], out, 0), -2) * inverse
        below = jnp.where(place > j, column * inverse, 0)[..., None]
        out = jnp.where(here[:, None], row[..., None, :], out - below * row[..., None, :])
        return gram - below * below.mT, out

    identity = jnp.broadcast_to(jnp.eye(n, dtype=gram.dtype), gram.shape)
    _, inverse = jax.lax.fori_loop(0, n, eliminate, (gram, identity))
    return inverse
