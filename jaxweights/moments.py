"""Mean and variance of activations, with counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.numerics import wide


def moments(
    x: jax.Array, axis: Sequence[int], *, where: jax.Array | None = None, axis_name=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, biased variance and count over `axis`, in float32 or wider, in two passes.

    μ = Σx/n, σ² = Σ(x − μ)²/n over the entries where `where` is true. Reduced axes are kept with size 1. With
    `axis_name` the moments of all devices are merged by their counts (Welford; Chan et al. 1983):
    n = Σnᵢ, μ = Σnᵢμᵢ/n, σ² = Σnᵢ(σᵢ² + (μᵢ − μ)²)/n. With no entries at all the count and both moments are 0.
    Entries that do not count may be NaN. A variance beyond the range of float32 is infinite.
    """
    x = x.astype(wide(x.dtype))
    axis = tuple(axis)
    if where is None:
        size = math.prod(x.shape[a] for a in axis)
        count = jnp.full([1 if a in axis else s for a, s in enumerate(x.shape)], size, x.dtype)
        total = lambda y: jnp.sum(y, axis, keepdims=True)
    else:
        where = jnp.broadcast_to(where, x.shape)
        x = jnp.where(where, x, 0)
        count = jnp.sum(where, axis, keepdims=True, dtype=jnp.int32).astype(x.dtype)
        total = lambda y: jnp.sum(jnp.where(where, y, 0), axis, keepdims=True)
    n = jnp.maximum(count, 1)
    mean = total(x) / n
    var = total(jnp.square(x - mean)) / n
    if axis_name is not None:
        count_all = jax.lax.psum(count, axis_name)
        n = jnp.maximum(count_all, 1)
        mean_all = jax.lax.psum(count * mean, axis_name) / n
        var = jax.lax.psum(count * (var + jnp.square(mean - mean_all)), axis_name) / n
        mean, count = mean_all, count_all
    return mean, var, count
