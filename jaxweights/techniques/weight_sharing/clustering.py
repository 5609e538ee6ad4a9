"""Clustering of weight values: k-means in one dimension."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_broadcast, check_choice, check_integer, check_key, check_weight
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.weight_sharing.cells import N_CELLS, Cells, cells_of, quarter
from jaxweights.techniques.weight_sharing.groups import group_means
from jaxweights.techniques.weight_sharing.importance import QUARTER, importance_of
from jaxweights.techniques.weight_sharing.indices import index_dtype
from jaxweights.techniques.weight_sharing.optimum import optimal_start
from jaxweights.techniques.weight_sharing.rows import over_rows
from jaxweights.techniques.weight_sharing.starts import density_start, linear_start, plus_plus_start, shares

Start = Literal["linear", "density", "k-means++", "optimal"]

_STEPS = 500  # of Lloyd's algorithm on the cells
_LAST_STEPS = 2  # on the entries, where a cell stands for several


def cluster(
    w: jax.Array,
    n_clusters: int,
    *,
    start: Start = "optimal",
    keep_zeros: bool = False,
    importance: jax.Array | None = None,
    axes: Axes | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Groups the values of a weight into `n_clusters` clusters (k-means in one dimension).

    Finds a minimum of Σᵢ hᵢ·(wᵢ − codebook[indexᵢ])², where h is the importance: from `start`, Lloyd's algorithm moves
    each centroid to the mean of the values nearest to it until none moves, or for 500 steps. The centroids stay sorted.

    By default it is the global minimum, up to rounding. A weight of more than 16,384 entries is clustered through a
    histogram of 16,384 cells, then by two steps on its entries: the root of the mean square error is then at most that
    of the best codebook plus (max w − min w)/16384. It is read in blocks: for 10 million entries, temporaries
    take less than twice its memory, for a million four times; and on a mesh no device gathers it.

    Args:
      w: float array of any shape.
      n_clusters: number of distinct values, at least 1.
      start: where the centroids start: "linear", evenly spaced over the range of `w`; "density", evenly spaced over the
        sorted entries; "k-means++", at random entries, each drawn by its square distance from those before it;
        "optimal", at the global minimum, by dynamic programming.
      keep_zeros: zeros stay zeros. Their index is −1, and the codebook is that of the other entries.
      importance: h, a float array that broadcasts to the shape of `w`: how much the square error of each entry counts,
        such as the diagonal of the Hessian, or E[x²] of the input that it is multiplied by. Only ratios matter: what is
        less than 1e-12 of the largest counts as 0. Where all are 0, all entries count alike.
      axes: how `w` is read as a matrix. Each output unit then has a codebook of its own. On a mesh, units stay where
        they are; the entries of one that lie on several devices are brought together.
      key: the random key of "k-means++".

    Returns:
      (codebook, index): the sorted centroids, shape (n_clusters,), in the dtype of `w`, and an integer array of the
      shape of `w`, of the smallest dtype that holds it and the −1 of `share`: int8 for up to 128 clusters.
      `share(codebook, index)` is the clustered weight. With `axes`, the codebook has shape (units, n_clusters), in the
      order of the batch axes and the output axes, and `share(codebook, index, axes=axes)` is the weight. An empty
      cluster keeps its centroid. A NaN or infinite weight or importance, or a negative importance, makes its codebook
      NaN. Both are constants to JAX: no gradient goes through them.

    Raises:
      TypeError: `w` or `importance` is not a float array, `n_clusters` is not an integer, `keep_zeros` is not a bool,
        or `key` is not a key.
      ValueError: `w` is empty, `n_clusters` is less than 1, `start` is unknown, `importance` or `axes` does not fit, or
        there is a key without "k-means++" or the other way round.

    >>> import jax.numpy as jnp
    >>> codebook, index = cluster(jnp.array([0.0, 0.2, 1.0, 1.2]), 2)
    >>> print(codebook, index)
    [0.1 1.1] [0 0 1 1]
    >>> print(cluster(jnp.array([0.0, 0.0, 1.0, 1.2]), 1, keep_zeros=True)[1])
    [-1 -1  0  0]
    >>> print(cluster(jnp.array([0.0, 1.0]), 1, importance=jnp.array([1.0, 3.0]))[0])
    [0.75]

    References: Han, Mao and Dally, Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding, arXiv:1510.00149, 2015; Choi, El-Khamy and Lee, Towards the Limit of Network
    Quantization, arXiv:1612.01543, 2016; Lloyd, Least squares quantization in PCM, 1982; Arthur and Vassilvitskii,
    k-means++: The Advantages of Careful Seeding, 2007; Grønlund et al., Fast Exact k-Means, k-Medians and Bregman
    Divergence Clustering in 1D, arXiv:1701.07204, 2017.
    """
    w = check_weight(w)
    check_integer("n_clusters", n_clusters, 1)
    check_start(start, keep_zeros)
    if w.size == 0:
        raise ValueError(f"w of shape {w.shape} has no values to cluster: leave it out of `where`")
    if importance is not None:
        importance = check_weight(importance, "importance")
        check_broadcast("importance", importance.shape, w.shape)
        importance = jnp.broadcast_to(importance, w.shape)
    if (start == "k-means++") != (key is not None):
        remedy = "leave it out" if key is not None else "write key=jax.random.key(0)"
        raise ValueError(f"key is for start='k-means++', and needed there, got start={start!r}, key={key!r}: {remedy}")
    draws = None
    if axes is not None:
        r = Reading.of(axes, w.shape)
        axes = Axes(r.input, r.output, tuple(sorted(r.batch)), r.window, r.groups)
    if key is not None:
        check_key(key)
        lead = () if axes is None else (_units(w, axes),)
        draws = jax.random.uniform(key, (*lead, n_clusters))
    w, importance = jax.lax.stop_gradient((w, importance))
    return _cluster(w, importance, draws, n=n_clusters, start=start, keep_zeros=keep_zeros, axes=axes)


def as_layers(axes: Axes | None, shape: tuple[int, ...]) -> Axes | None:
    """A stack read so that each layer is one output unit, for a codebook each; None if the weight is no stack."""
    r = Reading.of(axes, shape)
    return Axes(sorted(r.contracted + r.output), (), sorted(r.batch)) if r.batch else None


def stack_shape(axes: Axes | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a stack, in the order of its axes; () if the weight is none."""
    return tuple(shape[a] for a in sorted(Reading.of(axes, shape).batch))


def check_start(start: Start, keep_zeros: bool) -> None:
    """Raises unless `start` is known and `keep_zeros` is a bool."""
    check_choice("start", start, ("linear", "density", "k-means++", "optimal"))
    if not isinstance(keep_zeros, bool):
        raise TypeError(f"keep_zeros must be True or False, got {keep_zeros!r}: pass a bool")


@functools.partial(jax.jit, static_argnames=("n", "start", "keep_zeros", "axes"))
def _cluster(
    w: jax.Array,
    importance: jax.Array | None,
    draws: jax.Array | None,
    *,
    n: int,
    start: Start,
    keep_zeros: bool,
    axes: Axes | None,
) -> tuple[jax.Array, jax.Array]:
    """(codebook, index), from numbers in [0, 1) for each centroid of "k-means++"."""
    find = functools.partial(_centroids, n=n, start=start, keep_zeros=keep_zeros)

    def place(w, centroids):
        return _index(w, centroids, keep_zeros).astype(index_dtype(n))

    if axes is None:
        centroids = auto_sharded(find, w, importance, draws)
        return (centroids / QUARTER).astype(w.dtype), auto_sharded(place, w, centroids, like=w)

    def of_unit(row, importance, draws):
        centroids = find(row, importance, draws)
        return (centroids / QUARTER).astype(w.dtype), place(row, centroids)

    def of_units(w, importance, draws):
        h = None if importance is None else _unit_rows(importance, axes)
        codebook, index = over_rows(of_unit, _unit_rows(w, axes), h, draws)
        *lead, length, columns = jax.eval_shape(axes.matrix, w).shape
        return codebook, axes.weight(index.reshape(*lead, columns, length).swapaxes(-1, -2), w.shape)

    return auto_sharded(of_units, w, importance, draws, like=(jax.sharding.PartitionSpec(), w))


def _unit_rows(w: jax.Array, axes: Axes) -> jax.Array:
    """The entries of each output unit, shape (units, rows)."""
    matrix = axes.matrix(w)
    return matrix.swapaxes(-1, -2).reshape(-1, matrix.shape[-2])


def _units(w: jax.Array, axes: Axes) -> int:
    return jax.eval_shape(lambda w: _unit_rows(w, axes), w).shape[0]


def _centroids(
    w: jax.Array, importance: jax.Array | None, draws: jax.Array | None, *, n: int, start: Start, keep_zeros: bool
) -> jax.Array:
    """A quarter of the codebook of `w`."""
    is_finite, given = jnp.all(jnp.isfinite(w)), None
    if importance is not None:
        given, is_valid = importance_of(importance, w != 0 if keep_zeros else None)
        is_finite &= is_valid
    cells = cells_of(w, given, keep_zeros=keep_zeros)
    cells = Cells(jnp.where(is_finite & jnp.any(cells.size > 0), cells.value, 0), cells.size)
    starts = {"linear": linear_start, "density": density_start, "optimal": optimal_start}
    first = starts[start](cells, n) if draws is None else plus_plus_start(cells, draws)
    centroids = _lloyd(cells, first)

    def move(_, centroids):
        mean, size = group_means(w, lambda w: _index(w, centroids, keep_zeros), n, given)
        return jnp.sort(jnp.where(size > 0, mean * QUARTER, centroids))

    if w.size > N_CELLS:
        centroids = jax.lax.fori_loop(0, _LAST_STEPS, move, centroids)
    return jnp.where(is_finite, centroids, jnp.nan)


def _index(w: jax.Array, centroids: jax.Array, keep_zeros: bool) -> jax.Array:
    """The cluster of each entry; −1 for zeros, if these are kept."""
    index = _nearest(quarter(w), centroids)
    return jnp.where(w == 0, -1, index) if keep_zeros else index


def _lloyd(cells: Cells, start: jax.Array) -> jax.Array:
    """Moves each centroid to the mean of the cells nearest to it, until none moves."""
    value, share = cells.value, shares(cells.size)

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
    bits = midpoints.size.bit_length()
    if not bits:
        return jnp.zeros(x.shape, jnp.int32)
    dtype = jnp.uint8 if bits <= 8 else jnp.int32  # the loop keeps the indices of all entries

    def halve(i, low):
        ahead = low + (dtype(1) << jnp.asarray(bits - 1 - i, dtype))
        is_above = (ahead <= midpoints.size) & (x > midpoints.at[ahead - dtype(1)].get(mode="clip"))
        return jnp.where(is_above, ahead, low)

    return jax.lax.fori_loop(0, bits, halve, jnp.zeros(x.shape, dtype)).astype(jnp.int32)
