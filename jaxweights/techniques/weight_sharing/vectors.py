"""Product quantization: the columns of a matrix share sub-vectors, each of several entries."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_integer, check_key, check_weight
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.weight_sharing.indices import index_dtype

_STEPS = 50  # of Lloyd's algorithm, at most


def product_quantize(w: jax.Array, n: int, length: int, *, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cuts the columns of a matrix into sub-vectors, and groups those at each height into `n` clusters.

    For the sub-vectors vⱼ of the rows m·length ... (m + 1)·length − 1, finds a local minimum of
    Σⱼ ‖vⱼ − codebook[m, index[m, j]]‖²: from n of them, drawn by k-means++, Lloyd's algorithm moves each centroid to
    the mean of the sub-vectors nearest to it until none moves, or for 50 steps.

    Args:
      w: float array (*batch, K, N): a matrix with its output units in columns, or a stack of them.
      n: number of sub-vectors to choose from at each height, from 1 to N.
      length: entries of a sub-vector; it divides K.
      key: a `jax.random` key, for the start.

    Returns:
      (codebook, index): shapes (*batch, K/length, n, length), in the dtype of `w`, and (*batch, K/length, N), of the
      smallest integer dtype that holds it. `share_vectors(codebook, index)` is the quantized weight.

    Raises:
      TypeError: `w` is not a float array, `n` or `length` is not an integer, or `key` is not a key.
      ValueError: `w` has less than two axes or no entries, `length` does not divide K, or `n` is more than N.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([[1.0, 5.0, 1.0, 5.0], [2.0, 6.0, 2.0, 6.0]])
    >>> codebook, index = product_quantize(w, 2, 2, key=jax.random.key(0))
    >>> print(share_vectors(codebook, index))
    [[1. 5. 1. 5.]
     [2. 6. 2. 6.]]

    References: Jégou, Douze and Schmid, Product Quantization for Nearest Neighbor Search, IEEE TPAMI 2011; Gong, Liu,
    Yang and Bourdev, Compressing Deep Convolutional Networks using Vector Quantization, arXiv:1412.6115, 2014; Wu,
    Leng, Wang, Hu and Cheng, Quantized Convolutional Neural Networks for Mobile Devices, arXiv:1512.06473, 2015.
    """
    w = check_weight(w)
    check_key(key)
    check_vectors(w.shape, n, length)
    return auto_sharded(lambda w, key: _quantized(w, key, n, length), w, key)


def _quantized(w: jax.Array, key: jax.Array, n: int, length: int) -> tuple[jax.Array, jax.Array]:
    *batch, rows, columns = w.shape
    n_heights = rows // length
    vectors = w.reshape(-1, n_heights, length, columns).swapaxes(-1, -2).reshape(-1, columns, length)
    vectors = vectors.astype(accumulation_dtype(w.dtype))
    keys = jax.random.split(key, len(vectors))
    # One height at a time, since a step holds the distance of each sub-vector to each centroid.
    codebook, index = jax.lax.map(lambda each: _cluster(each[0], each[1], n), (vectors, keys))
    codebook = codebook.astype(w.dtype).reshape(*batch, n_heights, n, length)
    return codebook, index.astype(index_dtype(n)).reshape(*batch, n_heights, columns)


@dataclasses.dataclass(frozen=True)
class ProductQuantized:
    """The columns of a weight share sub-vectors, as `product_quantize` finds them: groups for `ShareWeights`.

    Args:
      n: number of sub-vectors to choose from at each height.
      length: entries of a sub-vector.

    >>> import jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w, t = jnp.array([[1.0, 5.0, 1.5], [2.0, 6.0, 2.5]]), jw.ShareWeights(ProductQuantized(2, length=2))
    >>> print(t.apply(w, t.init(w, jax.random.key(0))))
    [[1.25 5.   1.25]
     [2.25 6.   2.25]]

    References: Gong et al., arXiv:1412.6115, 2014.
    """

    n: int
    length: int

    def __post_init__(self):
        check_integer("n", self.n, 1)
        check_integer("length", self.length, 1)

    def n_values(self, shape: tuple[int, ...]) -> int:
        """The number of values in the codebook of a matrix, or a stack of them, of this shape."""
        *batch, _, _ = shape
        return math.prod(batch) * check_vectors(shape, self.n, self.length) * self.n * self.length

    def positions(self, matrix: jax.Array, key: jax.Array) -> jax.Array:
        """The number of the value at each position of a matrix, or a stack of them."""
        _, index = product_quantize(matrix, self.n, self.length, key=key)
        *lead, columns = index.shape
        heights = jnp.arange(math.prod(lead), dtype=jnp.int32).reshape(*lead, 1)
        first = (heights * self.n + index.astype(jnp.int32)) * self.length
        every = jnp.stack([first + r for r in range(self.length)], -2)
        return every.reshape(*matrix.shape[:-1], columns)


def share_vectors(codebook: jax.Array, index: jax.Array) -> jax.Array:
    """Builds a matrix whose columns share sub-vectors.

    w[m·length + r, j] = codebook[m, index[m, j], r]. The gradient of a sub-vector is the sum over the places
    that share it.

    Args:
      codebook: float array (*batch, M, n, length).
      index: integer array (*batch, M, N), with entries from 0 to n − 1. Others give NaN.

    Returns:
      Array (*batch, M·length, N) in the dtype of `codebook`.

    Raises:
      TypeError: `codebook` is not a float array or `index` is not an integer array.
      ValueError: the shapes do not fit.

    >>> import jax.numpy as jnp
    >>> codebook = jnp.array([[[1.0, 2.0], [5.0, 6.0]]])      # two sub-vectors of two entries, for one height
    >>> print(share_vectors(codebook, jnp.array([[0, 1, 0]])))
    [[1. 5. 1.]
     [2. 6. 2.]]

    References: Gong et al., arXiv:1412.6115, 2014.
    """
    codebook, index = _checked(codebook, index)
    *lead, n, length = codebook.shape
    columns = index.shape[-1]
    look_up = jax.vmap(_look_up)
    w = look_up(codebook.reshape(-1, n, length), index.reshape(-1, columns))
    return w.swapaxes(-1, -2).reshape(*lead[:-1], lead[-1] * length, columns)


def vectors_matmul(x: jax.Array, codebook: jax.Array, index: jax.Array) -> jax.Array:
    """The product x @ share_vectors(codebook, index): the matrix is not built.

    Each sub-vector is multiplied once, and the products are looked up: y[j] = Σₘ (xₘ · codebook[m, index[m, j]]). A row
    of x takes K·n multiplications and K·N/length additions, where the dense product takes K·N of both.

    Args:
      x: float array (..., M·length).
      codebook: float array (M, n, length).
      index: integer array (M, N), with entries from 0 to n − 1. Others give NaN.

    Returns:
      Array (..., N) of the wider of the two float dtypes.

    Raises:
      TypeError: `x` or `codebook` is not a float array or `index` is not an integer array.
      ValueError: the shapes do not fit.

    >>> import jax.numpy as jnp
    >>> codebook = jnp.array([[[1.0, 2.0], [5.0, 6.0]]])
    >>> print(vectors_matmul(jnp.array([1.0, 1.0]), codebook, jnp.array([[0, 1, 0]])))
    [ 3. 11.  3.]

    References: Wu, Leng, Wang, Hu and Cheng, Quantized Convolutional Neural Networks for Mobile Devices,
    arXiv:1512.06473, 2015.
    """
    codebook, index = _checked(codebook, index)
    x = check_weight(x, "x")
    if codebook.ndim != 3:
        raise ValueError(f"codebook must have shape (M, n, length), got {codebook.shape}: use jax.vmap for a stack")
    m, _, length = codebook.shape
    if x.ndim == 0 or x.shape[-1] != m * length:
        raise ValueError(f"x must have shape (..., {m * length}), got {x.shape}: its last axis is summed over")
    dtype = jnp.promote_types(x.dtype, codebook.dtype)
    wide = accumulation_dtype(dtype)
    lead = x.shape[:-1]
    x = x.reshape(-1, m, length).astype(wide)
    products = jnp.einsum("bml,mnl->mnb", x, codebook.astype(wide))

    def add(y, each):
        products, index = each
        return y + _look_up(products, index), None

    y, _ = jax.lax.scan(add, jnp.zeros((index.shape[-1], len(x)), wide), (products, index))
    return y.T.reshape(*lead, -1).astype(dtype)


def check_vectors(shape: tuple[int, ...], n: int, length: int) -> int:
    """K/length, the number of sub-vectors of a column, or an error if a weight of this shape cannot be cut so."""
    check_integer("n", n, 1)
    check_integer("length", length, 1)
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"w must have shape (..., K, N) and entries, got {shape}: give a matrix or a stack of them")
    *_, rows, columns = shape
    if rows % length:
        raise ValueError(f"length must divide the {rows} rows of w of shape {shape}, got {length}: take a divisor")
    if n > columns:
        raise ValueError(f"n must be at most {columns}, the columns of w of shape {shape}, got {n}: take fewer")
    return rows // length


def _checked(codebook: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    codebook = check_weight(codebook, "codebook")
    kind = index.dtype if isinstance(index, jax.Array | np.ndarray) else type(index).__name__
    if not isinstance(index, jax.Array | np.ndarray) or not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"index must be an integer array, got {kind}: use product_quantize")
    if codebook.ndim < 3 or codebook.shape[-2] == 0 or codebook.shape[:-2] != index.shape[:-1]:
        raise ValueError(
            f"codebook and index must have shapes (..., M, n, length) and (..., M, N), got {codebook.shape} and "
            f"{index.shape}: use product_quantize"
        )
    return codebook, jnp.asarray(index).astype(jnp.int32)


def _look_up(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[index] along the first axis, and NaN where the index is out of range."""
    index = jnp.where(index < 0, values.shape[0], index)
    return values.at[index].get(mode="fill", fill_value=jnp.nan)


def _cluster(x: jax.Array, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The centroids (n, length) of points (N, length), and the nearest to each."""
    # By a power of two, so that squares neither overflow nor vanish.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x)))
    x = jnp.ldexp(x, -exponent)

    def move(state):
        step, centroids, index, _ = state
        size = jnp.zeros(n, x.dtype).at[index].add(1)[:, None]
        total = jnp.zeros_like(centroids).at[index].add(x - centroids[index])
        centroids = centroids + total / jnp.maximum(size, 1)
        new = _nearest(x, centroids)
        return step + 1, centroids, new, jnp.any(new != index)

    start = _spread_out(x, key, n)
    state = (0, start, _nearest(x, start), jnp.array(True))
    _, centroids, index, _ = jax.lax.while_loop(lambda s: (s[0] < _STEPS) & s[-1], move, state)
    return jnp.ldexp(centroids, exponent), index


def _spread_out(x: jax.Array, key: jax.Array, n: int) -> jax.Array:
    """n of the points, each drawn with a probability that grows as its squared distance to those before (k-means++)."""
    first, key = jax.random.split(key)
    start = x[jax.random.randint(first, (), 0, len(x))]

    def draw(i, state):
        centroids, distance = state
        is_new = distance > 0
        odds = jnp.where(is_new, jnp.log(jnp.where(is_new, distance, 1)), jnp.finfo(x.dtype).min / 2)
        chosen = x[jax.random.categorical(jax.random.fold_in(key, i), odds)]
        return centroids.at[i].set(chosen), jnp.minimum(distance, _squared_distance(x, chosen))

    state = jnp.zeros((n, x.shape[1]), x.dtype).at[0].set(start), _squared_distance(x, start)
    return jax.lax.fori_loop(1, n, draw, state)[0]


def _squared_distance(x: jax.Array, centroid: jax.Array) -> jax.Array:
    return jnp.sum((x - centroid[None]) ** 2, -1)


def _nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
    return jax.vmap(lambda point: jnp.argmin(_squared_distance(centroids, point)))(x)
