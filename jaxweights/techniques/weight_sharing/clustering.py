"""Clustering of weight values: k-means in one dimension."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer, check_weight
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.weight_sharing.cells import N_CELLS, QUARTER, Cells, cells_of, quarter
from jaxweights.techniques.weight_sharing.groups import group_means
from jaxweights.techniques.weight_sharing.indices import index_dtype
from jaxweights.techniques.weight_sharing.optimum import optimal_start

Start = Literal["linear", "density", "optimal"]

_STEPS = 500  # of Lloyd's algorithm on the cells
_LAST_STEPS = 2  # on the entries, where a cell stands for several


def cluster(
    w: jax.Array, n_clusters: int, *, start: Start = "linear", keep_zeros: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Groups the values of a weight into `n_clusters` clusters (k-means in one dimension).

    Finds a minimum of Σᵢ (wᵢ − codebook[indexᵢ])²: from `start`, Lloyd's algorithm moves each centroid to the mean of
    the values nearest to it until none moves, or for 500 steps. The centroids stay sorted.

    A weight of more than 16,384 entries is clustered through a histogram of 16,384 cells, then by two steps on its
    entries. It is read in blocks: the result is all that is held beside it, and on a mesh no device gathers it. With
    start="optimal", the root of the mean square error is then at most that of the best codebook plus
    (max w − min w)/16384, up to rounding.

    Args:
      w: float array of any shape.
      n_clusters: number of distinct values, at least 1.
      start: where the centroids start: "linear", evenly spaced over the range of `w`; "density", evenly spaced over the
        sorted entries; "optimal", at the global minimum, by dynamic programming.
      keep_zeros: zeros stay zeros. Their index is −1, and the codebook is that of the other entries.

    Returns:
      (codebook, index): the sorted centroids, shape (n_clusters,), in the dtype of `w`, and an integer array of the
      shape of `w`, of the smallest dtype that holds it and the −1 of `share`: int8 for up to 128 clusters.
      `share(codebook, index)` is the clustered weight. An empty cluster keeps its centroid. A NaN or infinite weight
      makes the codebook NaN.

    Raises:
      TypeError: `w` is not a float array, `n_clusters` is not an integer, or `keep_zeros` is not a bool.
      ValueError: `w` is empty, `n_clusters` is less than 1, or `start` is unknown.

    >>> import jax.numpy as jnp
    >>> codebook, index = cluster(jnp.array([0.0, 0.2, 1.0, 1.2]), 2)
    >>> print(codebook, index)
    [0.1 1.1] [0 0 1 1]
    >>> print(cluster(jnp.array([0.0, 0.0, 1.0, 1.2]), 1, keep_zeros=True)[1])
    [-1 -1  0  0]

    References: Han, Mao and Dally, Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding, arXiv:1510.00149, 2015; Lloyd, Least squares quantization in PCM, 1982; Grønlund
    et al., Fast Exact k-Means, k-Medians and Bregman Divergence Clustering in 1D, arXiv:1701.07204, 2017.
    """
    w = check_weight(w)
    check_integer("n_clusters", n_clusters, 1)
    check_start(start, keep_zeros)
    if w.size == 0:
        raise ValueError(f"w of shape {w.shape} has no values to cluster: leave it out of `where`")
    centroids = auto_sharded(lambda w: _centroids(w, n_clusters, start, keep_zeros), w)
    index = auto_sharded(lambda w, centroids: _index(w, centroids, keep_zeros), w, centroids, like=w)
    return (centroids / QUARTER).astype(w.dtype), index.astype(index_dtype(n_clusters))


def check_start(start: Start, keep_zeros: bool) -> None:
    """Raises unless `start` is known and `keep_zeros` is a bool."""
    if start not in ("linear", "density", "optimal"):
        raise ValueError(f"start must be 'linear', 'density' or 'optimal', got {start!r}: pass one of them")
    if not isinstance(keep_zeros, bool):
        raise TypeError(f"keep_zeros must be True or False, got {keep_zeros!r}: pass a bool")


def _centroids(w: jax.Array, n: int, start: Start, keep_zeros: bool) -> jax.Array:
    """A quarter of the codebook of `w`."""
    cells = cells_of(w, keep_zeros=keep_zeros)
    starts = {"linear": _linear_start, "density": _density_start, "optimal": optimal_start}
    is_finite = jnp.all(jnp.isfinite(w))
    cells = Cells(jnp.where(is_finite & jnp.any(cells.size > 0), cells.value, 0), cells.size)
    centroids = _lloyd(cells, starts[start](cells, n), w.size)

    def move(_, centroids):
        mean, size = group_means(w, lambda w: _index(w, centroids, keep_zeros), n)
        return jnp.sort(jnp.where(size > 0, mean * QUARTER, centroids))

    if w.size > N_CELLS:
        centroids = jax.lax.fori_loop(0, _LAST_STEPS, move, centroids)
    return jnp.where(is_finite, centroids, jnp.nan)


def _index(w: jax.Array, centroids: jax.Array, keep_zeros: bool) -> jax.Array:
    """The cluster of each entry; −1 for zeros, if these are kept."""
    index = _nearest(quarter(w), centroids)
    return jnp.where(w == 0, -1, index) if keep_zeros else index


def _linear_start(cells: Cells, n: int) -> jax.Array:
    """Centroids evenly spaced over the range of the values."""
    counted = cells.size > 0
    largest = jnp.finfo(cells.value.dtype).max
    low = jnp.min(cells.value, where=counted, initial=largest)
    high = jnp.max(cells.value, where=counted, initial=-largest)
    low, high = (jnp.where(jnp.any(counted), end, 0) for end in (low, high))
    fraction = jnp.linspace(0, 1, n, dtype=cells.value.dtype)
    return low * (1 - fraction) + high * fraction


def _density_start(cells: Cells, n: int) -> jax.Array:
    """The values in the middle of n ranges of as many entries each."""
    passed = jnp.cumsum(cells.size / jnp.maximum(jnp.sum(cells.size), 1))
    middle = (jnp.arange(n, dtype=passed.dtype) + passed.dtype.type(0.5)) / n
    return cells.value[jnp.minimum(jnp.searchsorted(passed, middle), cells.value.size - 1)]


def _lloyd(cells: Cells, start: jax.Array, total: int) -> jax.Array:
    """Moves each centroid to the mean of the cells nearest to it, until none moves."""
    value, share = cells.value, cells.size / total

    def is_unsettled(state):
        step, _, has_moved = state
        return (step < _STEPS) & has_moved

    def move(state):
        step, centroids, _ = state
        index = _nearest(value, centroids)
        terms = jnp.stack([share * (value - centroids[index]), share], -1)
        shift, size = jnp.zeros((centroids.size, 2), value.dtype).at[index].add(terms).T
        new = jnp.sort(centroids + jnp.where(size > 0, shift / jnp.where(size > 0, size, 1), 0))
        return step + 1, new, jnp.any(new != centroids)

    return jax.lax.while_loop(is_unsettled, move, (0, start, jnp.array(True)))[1]


def _nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """The index of the centroid nearest to each entry, by bisection; ties go to the lower one."""
    midpoints = centroids[:-1] / 2 + centroids[1:] / 2
    low = jnp.zeros(x.shape, jnp.int32)
    for bit in reversed(range(midpoints.size.bit_length())):
        ahead = low + 2**bit
        is_above = (ahead <= midpoints.size) & (x > midpoints.at[ahead - 1].get(mode="clip"))
        low = jnp.where(is_above, ahead, low)
    return low
