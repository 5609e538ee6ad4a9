"""Clustering of weight values: k-means in one dimension."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer, check_weight
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.weight_sharing.indices import index_dtype

_LLOYD_STEPS = 50


def cluster(w: jax.Array, n_clusters: int) -> tuple[jax.Array, jax.Array]:
    """Groups the values of a weight into `n_clusters` clusters (k-means in one dimension).

    Finds a local minimum of Σᵢ (wᵢ − codebook[indexᵢ])² by Lloyd's algorithm. It starts from centroids evenly spaced
    over the range of `w` and stops when no centroid moves, or after 50 steps. The centroids stay sorted.

    Args:
      w: float array of any shape.
      n_clusters: number of distinct values, at least 1.

    Returns:
      (codebook, index): the sorted centroids, shape (n_clusters,), in the dtype of `w`, and an integer array of the
      shape of `w`, of the smallest dtype that holds it and the −1 of `share`: int8 for up to 128 clusters.
      `share(codebook, index)` is the clustered weight. An empty cluster keeps its centroid. A NaN or infinite weight
      makes the codebook NaN.

    Raises:
      TypeError: `w` is not a float array, or `n_clusters` is not an integer.
      ValueError: `w` is empty, or `n_clusters` is less than 1.

    >>> import jax.numpy as jnp
    >>> codebook, index = cluster(jnp.array([0.0, 0.2, 1.0, 1.2]), 2)
    >>> print(codebook, index)
    [0.1 1.1] [0 0 1 1]

    References: Han, Mao and Dally, Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding, arXiv:1510.00149, 2015; Lloyd, Least squares quantization in PCM, 1982.
    """
    w = check_weight(w)
    check_integer("n_clusters", n_clusters, 1)
    if w.size == 0:
        raise ValueError(f"w of shape {w.shape} has no values to cluster: leave it out of `where`")
    x = w.astype(accumulation_dtype(w.dtype))
    centroids = auto_sharded(lambda x: _lloyd(x, n_clusters), x)
    return centroids.astype(w.dtype), _nearest(x, centroids).astype(index_dtype(n_clusters))


def _lloyd(x: jax.Array, n: int) -> jax.Array:
    """Lloyd's algorithm from `n` centroids evenly spaced over the range of `x`."""
    low, high = jnp.min(x), jnp.max(x)
    fraction = jnp.linspace(0, 1, n, dtype=x.dtype)
    start = low * (1 - fraction) + high * fraction

    def is_unsettled(state):
        step, _, has_moved = state
        return (step < _LLOYD_STEPS) & has_moved

    def move(state):
        step, centroids, _ = state
        new = jnp.sort(group_means(x, _nearest(x, centroids), centroids))
        return step + 1, new, jnp.any(new != centroids)

    _, centroids, _ = jax.lax.while_loop(is_unsettled, move, (0, start, jnp.array(True)))
    return centroids


def _nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """The index of the centroid nearest to each entry; ties go to the lower one."""
    midpoints = jnp.expand_dims(centroids[:-1] / 2 + centroids[1:] / 2, range(x.ndim))
    return jnp.sum(x[..., None] > midpoints, axis=-1, dtype=jnp.int32)


def group_means(x: jax.Array, index: jax.Array, centre: jax.Array) -> jax.Array:
    """centre + mean of (x − centre) over each group; `centre` for groups without members.

    Only n sums cross devices. The nearer `centre` is to the means, the smaller the rounding error of a long sum. Terms
    are divided by the size of `x` so that the sum does not overflow. The sum is multiplied by it afterwards; otherwise
    XLA would accumulate on top of `centre`.
    """
    index = index.astype(jnp.int32)  # JAX compares an index with the size in the dtype of the index
    count = jnp.zeros(centre.shape, jnp.int32).at[index].add(1)
    total = jnp.zeros_like(centre).at[index].add((x - centre[index]) / x.size)
    return centre + total * (x.size / jnp.maximum(count, 1).astype(x.dtype))
