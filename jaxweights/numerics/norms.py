"""Norms and quotients without overflow, and with finite gradients at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype


def safe_norm(x: jax.Array, axis: Sequence[int], *, keepdims: bool = False) -> jax.Array:
    """Euclidean norm that neither overflows nor underflows, in float32 or wider.

    ‖x‖ = m·√Σ(x/m)², m = max|x|. At x = 0 (and below the smallest normal number) the value and the gradient are 0.
    A NaN or infinite entry gives NaN.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    axis = tuple(axis)
    if math.prod(x.shape[a] for a in axis) == 0:
        return jnp.sum(x, axis, keepdims=keepdims)
    m = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True))
    zero = m < jnp.finfo(x.dtype).tiny
    m = jnp.where(zero, 1, m)
    square = jnp.sum(jnp.square(jnp.where(zero, 0, x) / m), axis, keepdims=True)
    norm = jnp.where(zero, 0, m * jnp.sqrt(jnp.where(zero, 1, square)))
    return norm if keepdims else jnp.squeeze(norm, axis)


@jax.custom_jvp
def safe_divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, or x where y is 0, with finite gradients for both.

    The derivative is computed as (ẋ − (x/y)·ẏ)/y. JAX's own squares y, which overflows or underflows float32 beyond
    1e±19.
    """
    return x / jnp.where(y == 0, 1, y)


@safe_divide.defjvp
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    ratio = safe_divide(x, y)
    return ratio, safe_divide(dx - jnp.where(y == 0, 0, ratio) * dy, y)
