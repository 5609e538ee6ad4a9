"""Weight sharing: many positions of a weight, few values behind them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.checks import check_integer, check_shape, check_state, check_weight
from jaxweights.convolution import Convolution, Padding
from jaxweights.numerics import automatic, wide
from jaxweights.transform import Transform

_LLOYD_STEPS = 50


def share(codebook: jax.Array, index: jax.Array) -> jax.Array:
    """The weight whose entries are looked up in a codebook.

    w'[i] = codebook[index[i]], and 0 where index[i] is −1. The gradient of a codebook entry is the sum of the
    gradients of all positions that share it.

    Args:
      codebook: float array, shape (n,).
      index: integer array of any shape, with entries from −1 to n − 1. Others, which only run time can
        see, give NaN.

    Returns:
      Array of the shape of `index` and the dtype of `codebook`.

    Raises:
      TypeError: `codebook` is not a float array or `index` not an integer array.
      ValueError: `codebook` is not one-dimensional, or empty.

    >>> import jax.numpy as jnp
    >>> print(share(jnp.array([0.5, 2.0]), jnp.array([[0, 1], [1, -1]])))
    [[0.5 2. ]
     [2.  0. ]]

    References: Nowlan and Hinton, Simplifying Neural Networks by Soft Weight-Sharing, Neural Computation 1992.
    """
    codebook = check_weight(codebook, "codebook")
    if codebook.ndim != 1 or codebook.size == 0:
        raise ValueError(f"codebook must be one-dimensional and not empty, got shape {codebook.shape}: ravel it")
    kind = jnp.result_type(index) if isinstance(index, jax.Array | np.ndarray | np.generic | int) else type(index)
    if not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"index must be an integer array, got {kind}: use cluster or conv_index")
    index = jnp.asarray(index, jnp.int32)  # in a narrow or unsigned dtype the comparisons below would wrap around
    # A gather wraps −1 to the last entry, so that position must be set apart.
    looked_up = codebook.at[jnp.where(index < -1, codebook.size, index)].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(index == -1, jnp.zeros((), codebook.dtype), looked_up)


def cluster(w: jax.Array, n_clusters: int) -> tuple[jax.Array, jax.Array]:
    """Groups the values of a weight in `n_clusters` clusters (k-means in one dimension).

    Minimises Σᵢ (wᵢ − codebook[indexᵢ])², locally, by Lloyd's iteration from centroids spaced evenly over the range of
    `w`, until no centroid moves or 50 steps are made. The centroids stay sorted.

    Args:
      w: float array of any shape.
      n_clusters: number of distinct values, at least 1.

    Returns:
      (codebook, index): the sorted centroids, shape (n_clusters,), dtype of `w`, and an int32 array of the
      shape of `w`. `share(codebook, index)` is the clustered weight. An empty cluster keeps its centroid. NaN
      or infinity anywhere makes the codebook NaN.

    Raises:
      TypeError: `w` is not a float array, or `n_clusters` not an integer.
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
    x = w.astype(wide(w.dtype))
    centroids = automatic(lambda x: _lloyd(x, n_clusters), x)
    return centroids.astype(w.dtype), _nearest(x, centroids)


def conv_index(
    kernel_shape: Sequence[int],
    input_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
) -> np.ndarray:
    """The index that makes a convolution a matrix with shared weights.

    `x.ravel() @ share(kernel.ravel(), conv_index(kernel.shape, x.shape))` is the raveled output of
    `lax.conv_general_dilated` on one image: one kernel, shared by all positions. Entries that no kernel weight
    reaches are −1, so `share` makes them 0.

    Args:
      kernel_shape: (*window, in, out), as Flax has it (HWIO).
      input_shape: (*space, in), as Flax has it (HWC).
      strides: one for all axes, or one per axis of the window.
      padding: "SAME", "VALID", "CIRCULAR", or (before, after) per axis of the window.

    Returns:
      int32 numpy array, shape (input size, output size): a constant, to be computed once.

    Raises:
      TypeError: a shape or stride is not made of integers.
      ValueError: the shapes do not fit, a stride is less than 1, or `padding` is unknown.

    >>> conv_index((2, 1, 1), (3, 1), padding="VALID")      # a window of two over three positions
    array([[ 0, -1],
           [ 1,  0],
           [-1,  1]], dtype=int32)

    References: LeCun et al., Backpropagation Applied to Handwritten Zip Code Recognition, Neural
    Computation 1989.
    """
    conv = Convolution.of(kernel_shape, input_shape, strides=strides, padding=padding)
    space, out_space = conv.input_shape[:-1], conv.output_shape[:-1]
    if conv.circular and any(k > n for k, n in zip(conv.window, space, strict=True)):
        raise ValueError(
            f"a window of {conv.window} meets itself around an image of {space}, where one position needs the sum of "
            f"two weights: use a smaller window"
        )
    index = np.full((*space, conv.input_shape[-1], *conv.output_shape), -1, np.int32)
    weights = np.arange(math.prod(kernel_shape), dtype=np.int32).reshape(kernel_shape)
    for position in itertools.product(*map(range, out_space)):
        for offset in itertools.product(*map(range, conv.window)):
            steps = zip(position, conv.strides, conv.pads, offset, space, strict=True)
            source = tuple((o * s - p[0] + k) % n if conv.circular else o * s - p[0] + k for o, s, p, k, n in steps)
            if all(0 <= i < n for i, n in zip(source, space, strict=True)):
                index[(*source, slice(None), *position, slice(None))] = weights[offset]
    return index.reshape(math.prod(input_shape), -1)


def hash_index(shape: Sequence[int], n: int, seed: int = 0) -> np.ndarray:
    """Assigns each position of a weight to one of `n` buckets by a hash.

    index[i] = h(i, seed) mod n with a fixed 32-bit mixing function h: the same on every machine.

    Args:
      shape: shape of the weight.
      n: number of buckets, at least 1.
      seed: integer that picks the hash function.

    Returns:
      int32 numpy array of the given shape.

    Raises:
      TypeError: `n`, `seed` or a size in `shape` is not an integer.
      ValueError: `n` is less than 1 or above 2³¹ − 1, or `seed` negative.

    >>> hash_index((2, 4), 3).shape
    (2, 4)

    References: Chen, Wilson, Tyree, Weinberger and Chen, Compressing Neural Networks with the Hashing Trick,
    arXiv:1504.04788, 2015.
    """
    shape = check_shape("shape", shape)
    check_integer("n", n, 1, 2**31 - 1)
    check_integer("seed", seed, 0)
    h = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(int(seed) * 0x9E3779B97F4A7C15 % 2**64)
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):  # splitmix64
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(multiplier)
    h ^= h >> np.uint64(31)
    return (h % np.uint64(n)).astype(np.int32).reshape(shape)


@dataclasses.dataclass(frozen=True)
class ShareWeights(Transform):
    """Makes a weight have at most `n` distinct values: w'[i] = mean of the weights in the group of i.

    The groups are fixed when the state is made: by value (k-means, `cluster`), or at random by a hash of the
    position if `seed` is given (`hash_index`). The mean is the orthogonal projection on weights that are
    shared, so that after `optax` updates the members of a group still are equal, and each receives the mean
    gradient of its group.

    State: `index`, int32, the shape of `w`: the group of each weight.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.array([0.0, 0.25, 1.0, 1.25]), ShareWeights(2)
    >>> print(t.apply(w, t.init(w, jax.random.key(0))))
    [0.125 0.125 1.125 1.125]

    References: Han, Mao and Dally, arXiv:1510.00149, 2015; Chen et al., arXiv:1504.04788, 2015.
    """

    n: int
    seed: int | None = None

    def __post_init__(self):
        check_integer("n", self.n, 1, 2**31 - 1)
        if self.seed is not None:
            check_integer("seed", self.seed, 0)

    def init(self, w, key):
        """The group of each weight."""
        w = check_weight(w)
        index = cluster(w, self.n)[1] if self.seed is None else jnp.asarray(hash_index(w.shape, self.n, self.seed))
        return {"index": index}

    def apply(self, w, state):
        """The mean of each group, at each of its positions."""
        w = check_weight(w)
        check_state(state, index=w.shape)

        def average(w, index):
            x = w.astype(wide(w.dtype))
            rough = _group_means(x, index, jnp.zeros(self.n, x.dtype))
            return share(_group_means(x, index, jax.lax.stop_gradient(rough)), index).astype(w.dtype)

        return automatic(average, w, state["index"], like=w)


def _lloyd(x: jax.Array, n: int) -> jax.Array:
    """Lloyd's iteration from `n` centroids spaced evenly over the range of `x`."""
    low, high = jnp.min(x), jnp.max(x)
    fraction = jnp.linspace(0, 1, n, dtype=x.dtype)
    start = low * (1 - fraction) + high * fraction

    def move(state):
        step, centroids, _ = state
        new = jnp.sort(_group_means(x, _nearest(x, centroids), centroids))
        return step + 1, new, jnp.any(new != centroids)

    going = lambda state: (state[0] < _LLOYD_STEPS) & state[2]
    return jax.lax.while_loop(going, move, (0, start, jnp.array(True)))[1]


def _nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """The index of the centroid nearest to each entry, the lower of two equally near ones."""
    midpoints = centroids[:-1] / 2 + centroids[1:] / 2
    return jnp.sum(x[..., None] > midpoints, axis=-1, dtype=jnp.int32)


def _group_means(x: jax.Array, index: jax.Array, centre: jax.Array) -> jax.Array:
    """centre + mean of (x − centre) over each group; `centre` for groups without members.

    Only n sums cross devices. The nearer `centre` is to the means, the less a long sum rounds. It is divided by the
    size of `x` before, so that it does not overflow, and multiplied after, or XLA would sum on top of `centre`.
    """
    count = jnp.zeros(centre.shape, jnp.int32).at[index].add(1)
    total = jnp.zeros_like(centre).at[index].add((x - centre[index]) / x.size)
    return centre + total * (x.size / jnp.maximum(count, 1).astype(x.dtype))
