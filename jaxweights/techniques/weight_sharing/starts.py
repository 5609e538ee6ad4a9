"""Where the centroids of k-means start, but for the optimum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.techniques.weight_sharing.cells import Cells


def linear_start(cells: Cells, n: int) -> jax.Array:
    """Centroids evenly spaced over the range of the values."""
    counted = cells.size > 0
    largest = jnp.finfo(cells.value.dtype).max
    low = jnp.min(cells.value, where=counted, initial=largest)
    high = jnp.max(cells.value, where=counted, initial=-largest)
    low, high = (jnp.where(jnp.any(counted), end, 0) for end in (low, high))
    fraction = jnp.linspace(0, 1, n, dtype=cells.value.dtype)
    return low * (1 - fraction) + high * fraction


def density_start(cells: Cells, n: int) -> jax.Array:
    """The values in the middle of n ranges of as many entries each."""
    passed = jnp.cumsum(shares(cells.size))
    middle = (jnp.arange(n, dtype=passed.dtype) + passed.dtype.type(0.5)) / n
    return cells.value[jnp.minimum(jnp.searchsorted(passed, middle), cells.value.size - 1)]


def plus_plus_start(cells: Cells, draws: jax.Array) -> jax.Array:
    """The values of entries drawn one after the other, each by its square distance from the nearest one before it.

    Args:
      cells: the sorted values.
      draws: a number in [0, 1) for each centroid.
    """
    share = shares(cells.size)
    spread = jnp.maximum(cells.value[-1] - cells.value[0], jnp.finfo(cells.value.dtype).tiny)

    def choose(distance, draw):
        passed = jnp.cumsum(share * distance)
        i = jnp.minimum(jnp.searchsorted(passed, draw * passed[-1], side="right"), cells.value.size - 1)
        new = jnp.square((cells.value - cells.value[i]) / spread)
        return jnp.minimum(distance, new), cells.value[i]

    _, chosen = jax.lax.scan(choose, jnp.ones_like(share), draws.astype(share.dtype))
    return jnp.sort(chosen)


def shares(size: jax.Array) -> jax.Array:
    """The sizes of cells as parts of 1."""
    return size / jnp.where(jnp.any(size > 0), jnp.sum(size), 1)
