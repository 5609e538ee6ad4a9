"""Exact k-means in one dimension, by dynamic programming."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.techniques.weight_sharing.cells import Cells
from jaxweights.techniques.weight_sharing.groups import two_sum
from jaxweights.techniques.weight_sharing.starts import shares

_TILE = 8
"""Origins that are looked at in one go."""
_SPLIT = 2**5
"""The most ends that share a range of origins."""


def optimal_start(cells: Cells, n: int) -> jax.Array:
    """The centroids of the partition of sorted cells into `n` ranges with the least inertia.

    E_k(j) = min over i ≤ j of E_{k−1}(i) + (inertia of cells i ... j − 1).
    """
    pad = (0, 2 ** max((cells.value.size - 1).bit_length(), 1) - cells.value.size)
    size = jnp.pad(cells.size, pad)
    share = shares(size)
    value = jnp.pad(cells.value, pad, mode="edge")
    middle = jnp.sum(share * value)
    if n == 1:
        return middle[None]
    spread = jnp.maximum(jnp.max(jnp.abs(value - middle)), jnp.finfo(value.dtype).tiny)
    x = (value - middle) / spread
    sums = jnp.concatenate([_running_sums(share * x**p) for p in range(3)])

    def add_range(best, _):
        return _least(best, sums)

    one_range = _inertia(jnp.zeros_like(sums), sums)
    _, origins = jax.lax.scan(add_range, one_range, None, length=n - 1)

    def step_back(end, origin):
        return origin[end], (origin[end], end)

    first, (left, right) = jax.lax.scan(step_back, jnp.int32(x.size), origins, reverse=True)
    left, right = jnp.append(0, left).astype(jnp.int32), jnp.append(first, right).astype(jnp.int32)
    mass, moment, _ = _between(sums[:, left], sums[:, right])
    mean = jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1), x[jnp.minimum(left, x.size - 1)])
    return jnp.sort(mean * spread + middle)


def _least(best: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(min, argmin) over i ≤ j of best[i] + inertia(i, j) for each j = 0 ... n, a power of two.

    The argmin grows with j. So those of every s-th j bound the ranges of i in which to look for the others. Ranges are
    looked at tile by tile, and two of them that touch share at most one tile.
    """
    n = best.size - 1
    table = jnp.pad(jnp.concatenate([best[None], sums]), ((0, 0), (0, -(n + 1) % _TILE)), mode="edge")
    tiles = jnp.moveaxis(table.reshape(len(table), -1, _TILE), 2, 0)
    least, origin, step = best, jnp.array([0, n], jnp.int32), n
    while step > 1:
        split = min(_SPLIT, step)
        blocks, step = n // step, step // split
        bounds = jax.lax.cummax(origin) // _TILE
        count = bounds[1:] - bounds[:-1] + 1
        looks = tiles.shape[2] + blocks
        owner = jnp.repeat(jnp.arange(blocks, dtype=jnp.int32), count, total_repeat_length=looks)
        tile = bounds[:-1][owner] + jnp.arange(looks, dtype=jnp.int32) - (jnp.cumsum(count) - count)[owner]
        tile = jnp.minimum(tile.astype(jnp.int32), bounds[1:][owner])
        j = step * jnp.arange(1, n // step + 1, dtype=jnp.int32).reshape(blocks, split)
        found, at = _least_of_tiles(tiles[:, :, tile], tile, sums[:, j][:, owner], j[owner])
        least = jax.ops.segment_min(found, owner, blocks, indices_are_sorted=True)
        at = jnp.where(found == least[owner], at, n)
        origin = jax.ops.segment_min(at, owner, blocks, indices_are_sorted=True)
        least, origin = jnp.append(best[0], least), jnp.append(jnp.int32(0), origin)
    return least, origin


def _least_of_tiles(tiles: jax.Array, tile: jax.Array, ends: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(min, argmin) over the i ≤ j of one tile for each of some j.

    Args:
      tiles: `best` and the sums at each place of the tiles, shape (place, 7, look).
      tile: the tile of each look, shape (look,).
      ends: the sums at the j, shape (6, look, split).
      j: shape (look, split).
    """

    def look(carry, given):
        least, origin = carry
        place, at = given
        i = (tile * _TILE + place)[:, None]
        total = jnp.where(i <= j, at[0][:, None] + _inertia(at[1:, :, None], ends), worst)
        is_less = total < least
        return (jnp.where(is_less, total, least), jnp.where(is_less, i, origin)), None

    worst = jnp.finfo(tiles.dtype).max
    start = jnp.full(j.shape, worst, tiles.dtype), jnp.zeros_like(j)
    return jax.lax.scan(look, start, (jnp.arange(_TILE, dtype=jnp.int32), tiles))[0]


def _inertia(start: jax.Array, end: jax.Array) -> jax.Array:
    """Σ (x − mean)² of the cells from one place to another, from the running sums there."""
    mass, first, second = _between(start, end)
    return jnp.maximum(second - jnp.where(mass > 0, first**2 / jnp.where(mass > 0, mass, 1), 0), 0)


def _between(start: jax.Array, end: jax.Array) -> list[jax.Array]:
    """The sums of 1, x and x² from one place to another."""
    return [(end[p] - start[p]) + (end[p + 1] - start[p + 1]) for p in (0, 2, 4)]


def _running_sums(x: jax.Array) -> jax.Array:
    """The sums of the first 0, 1, 2 ... of 2^p entries, each as two floats: shape (2, 2^p + 1)."""

    def add(carry, x):
        total, lost = carry
        total, error = two_sum(total, x[0])
        return (total, lost + error + x[1]), jnp.stack([total, lost + error + x[1]])

    def along_rows(x):
        return jax.lax.scan(add, (jnp.zeros_like(x[0, 0]),) * 2, x)[1]

    runs = x.reshape(2 ** ((x.size.bit_length() - 1) // 2), -1).T
    inner = along_rows(jnp.stack([runs, jnp.zeros_like(runs)], 1))  # (place, 2, run)
    before = jnp.pad(along_rows(inner[-1].T), ((1, 0), (0, 0)))[:-1]
    total, error = two_sum(jnp.broadcast_to(before[:, 0], runs.shape), inner[:, 0])
    lost = error + inner[:, 1] + jnp.broadcast_to(before[:, 1], runs.shape)
    return jnp.pad(jnp.stack([total, lost]).swapaxes(1, 2).reshape(2, -1), ((0, 0), (1, 0)))
