"""Exact k-means in one dimension, by dynamic programming."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.techniques.weight_sharing.cells import Cells
from jaxweights.techniques.weight_sharing.groups import two_sum


def optimal_start(cells: Cells, n: int) -> jax.Array:
    """The centroids of the partition of sorted cells into `n` ranges with the least inertia.

    E_k(j) = min over i ≤ j of E_{k−1}(i) + (inertia of cells i ... j − 1). The best i grows with j, so the j in the
    middle bounds those on either side: each k takes log₂(cells) passes over the cells.
    """
    pad = (0, 2 ** (cells.value.size - 1).bit_length() - cells.value.size)
    size = jnp.pad(cells.size, pad)
    share = size / jnp.maximum(jnp.sum(size), 1)
    value = jnp.pad(cells.value, pad, mode="edge")
    middle = jnp.sum(share * value)
    spread = jnp.maximum(jnp.max(jnp.abs(value - middle)), jnp.finfo(value.dtype).tiny)
    x = (value - middle) / spread
    moments = [_running_sums(share * x**p) for p in range(3)]

    def between(i, j):
        """The sums of 1, x and x² over the cells i ... j − 1."""
        return [(high[j] - high[i]) + (low[j] - low[i]) for high, low in moments]

    def cost(i, j):
        zeroth, first, second = between(i, j)
        return jnp.maximum(second - jnp.where(zeroth > 0, first**2 / jnp.where(zeroth > 0, zeroth, 1), 0), 0)

    ends = jnp.arange(x.size + 1, dtype=jnp.int32)

    def add_range(best, _):
        return _least(lambda i, j: best[i] + cost(i, j), x.size)

    _, origins = jax.lax.scan(add_range, cost(jnp.zeros_like(ends), ends), None, length=n - 1)

    def step_back(end, origin):
        return origin[end], (origin[end], end)

    first, (left, right) = jax.lax.scan(step_back, ends[-1], origins, reverse=True)
    left, right = jnp.append(0, left).astype(jnp.int32), jnp.append(first, right).astype(jnp.int32)
    mass, moment, _ = between(left, right)
    mean = jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1), x[jnp.minimum(left, x.size - 1)])
    return jnp.sort(mean * spread + middle)


def _least(total, n: int) -> tuple[jax.Array, jax.Array]:
    """(min, argmin) over i ≤ j of total(i, j) for each j = 0 ... n, a power of two, if the argmin grows with j."""
    dtype = total(jnp.int32(0), jnp.int32(0)).dtype
    i = jnp.arange(n + 1, dtype=jnp.int32)
    last = total(i, jnp.full_like(i, n))
    least = jnp.zeros(n + 1, dtype).at[0].set(total(jnp.int32(0), jnp.int32(0))).at[n].set(jnp.min(last))
    origin = jnp.zeros(n + 1, jnp.int32).at[n].set(jnp.argmin(last).astype(jnp.int32))
    step = n
    while step > 1:
        j = jnp.arange(step // 2, n, step, dtype=jnp.int32)
        low, high = origin[j - step // 2], jnp.minimum(origin[j + step // 2], j)
        owner = jnp.repeat(jnp.arange(j.size), high - low + 1, total_repeat_length=n + 1 + j.size)
        before = jnp.cumsum(high - low + 1) - (high - low + 1)
        i = low[owner] + jnp.arange(owner.size, dtype=jnp.int32) - before[owner].astype(jnp.int32)
        is_ours = i <= high[owner]
        value = jnp.where(is_ours, total(jnp.minimum(i, high[owner]), j[owner]), jnp.finfo(dtype).max)
        found = jax.ops.segment_min(value, owner, j.size, indices_are_sorted=True)
        at = jnp.where(is_ours & (value == found[owner]), i, n)
        least = least.at[j].set(found)
        origin = origin.at[j].set(jax.ops.segment_min(at, owner, j.size, indices_are_sorted=True))
        step //= 2
    return least, origin


def _running_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums of the first 0, 1, 2 ... entries, each as two floats."""

    def add(a, b):
        total, lost = two_sum(a[0], b[0])
        return total, lost + a[1] + b[1]

    high, low = jax.lax.associative_scan(add, (x, jnp.zeros_like(x)))
    return jnp.pad(high, (1, 0)), jnp.pad(low, (1, 0))
