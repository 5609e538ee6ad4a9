"""Mean and variance of activations, with counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype

Stats = tuple[jax.Array, jax.Array, jax.Array]
"""(mean, biased variance, count), all of one shape."""


def moments(
    x: jax.Array, axis: Sequence[int], *, where: jax.Array | None = None, axis_name=None, centered: bool = True
) -> Stats:
    """Mean, biased variance and count over `axis`, in float32 or wider, in two passes; three with a mask.

    μ = Σx/n, σ² = Σ(x − μ)²/n over the entries where `where` is true; μ = 0 unless `centered`. Reduced axes are kept
    with size 1. With `axis_name` the sums are over all devices, as of one big batch. With no entries at all the count
    and both moments are 0. Entries that do not count may be NaN. A variance beyond the range of float32 is infinite.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    if where is not None:
        x = jnp.where(where, x, 0)
    count = count_entries(x, axis, where, axis_name)
    average = lambda y: average_entries(y, axis, where, axis_name, count)
    mean = average_entries(x, axis, None, axis_name, count) if centered else None
    if mean is not None and where is not None:
        # A masked sum is less exact: add the mean of what is left. Exactly, that is 0, and so is its derivative.
        mean = mean + jax.lax.stop_gradient(average(x - computed(mean)))
    # XLA for CPUs subtracts within the loop of the sum only so; else it first writes x − μ, or μ broadcast, to memory.
    var = average(jnp.square(x if mean is None else computed(mean) - x))
    return jnp.zeros_like(var) if mean is None else mean, var, jnp.full_like(var, count)


def count_entries(x: jax.Array, axis: Sequence[int], where: jax.Array | None, axis_name) -> int | jax.Array:
    """How many entries of `x` count, over `axis` and all devices: a Python number unless a mask says which."""
    if where is None:
        count = math.prod(x.shape[a] for a in axis)
    else:
        where = jnp.broadcast_to(where, x.shape)
        count = jnp.sum(where, tuple(axis), keepdims=True, dtype=jnp.int32).astype(accumulation_dtype(x.dtype))
    return count if axis_name is None else jax.lax.psum(count, axis_name)


def average_entries(
    y: jax.Array, axis: Sequence[int], where: jax.Array | None, axis_name, count: int | jax.Array
) -> jax.Array:
    """The mean of the `count` entries of `y` that count, over `axis` and all devices; 0 if none does."""
    total = _sum(y if where is None else jnp.where(where, y, 0), axis)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return total / jnp.maximum(jnp.asarray(count, total.dtype), 1)


def _sum(y: jax.Array, axis: Sequence[int]) -> jax.Array:
    """Σy over `axis`, one run of neighbouring axes after the other: over axes apart XLA for CPUs adds term by term."""
    runs = itertools.groupby(enumerate(sorted(axis)), key=lambda place: place[1] - place[0])
    for i, (_, run) in enumerate(runs):
        y = jnp.sum(computed(y) if i else y, tuple(a for _, a in run), keepdims=True)
    return y


def computed(x: jax.Array) -> jax.Array:
    """`x` as a value of its own on CPUs, neither fused with what it is made of nor with what is made of it."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
