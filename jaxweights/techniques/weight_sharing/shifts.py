"""Matrices whose rows are shifts of one another, and their products by FFT."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_weight
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.techniques.weight_sharing.patterns import Pattern, values_of


@dataclasses.dataclass(frozen=True)
class Shifts(Pattern):
    """w[i, j] = codebook[(j − i + first) mod n_values]: each row is that above it, one place to the right."""

    @property
    def first(self) -> int:
        """The number of the value at the top left."""
        raise TypeError(f"{type(self).__name__} defines no first")

    def positions(self, xp):
        """The value by its distance from the diagonal."""
        rows, columns = self.sizes
        return (xp.arange(columns)[None] - xp.arange(rows)[:, None] + self.first) % max(self.n_values, 1)

    def weight(self, codebook):
        """The weight, row by row as slices of the codebook: a gather of entries has a slow gradient."""
        rows, columns = self.sizes
        if rows * columns == 0:
            return jnp.zeros(self.sizes, codebook.dtype)
        twice = jnp.concatenate([codebook, codebook])
        starts = (self.first - jnp.arange(rows)) % codebook.size
        return jax.vmap(lambda start: jax.lax.dynamic_slice(twice, (start,), (columns,)))(starts)

    def matmul(self, x: jax.Array, codebook: jax.Array) -> jax.Array:
        """The product x @ share(codebook, self), by FFT: the weight is not built.

        Takes O(n log n) for each row of x, where the dense product takes O(K N).

        Args:
          x: float array (..., K).
          codebook: float array of `n_values` values.

        Returns:
          Array (..., N) of the wider of the two dtypes; the FFT is in float32 or wider.

        Raises:
          TypeError: an argument is not a float array.
          ValueError: the sizes do not fit.
        """
        x, codebook = check_rows(x, self), values_of(codebook, self)
        rows, columns = self.sizes
        dtype = jnp.promote_types(x.dtype, codebook.dtype)
        if rows * columns == 0:
            return jnp.zeros((*x.shape[:-1], columns), dtype)
        wide = accumulation_dtype(dtype)
        n = self._length
        by = jnp.fft.rfft(codebook.astype(wide), n)
        spectrum = jnp.fft.rfft(x.astype(wide), n) * jnp.expand_dims(by, range(x.ndim - 1))
        return jnp.fft.irfft(spectrum, n)[..., self.first : self.first + columns].astype(dtype)

    @property
    def _length(self) -> int:
        """The length of the FFT."""
        return self.n_values


@dataclasses.dataclass(frozen=True)
class Circulant(Shifts):
    """A circulant matrix: w[i, j] = codebook[(j − i) mod n], n = max(K, N), and x @ w is the circular convolution.

    The transpose of `scipy.linalg.circulant`, since a weight multiplies from the right. If the weight is not square, it
    is the first K rows and N columns of a circulant matrix.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> circulant = Circulant(shape=(3, 3))
    >>> print(jw.share(jnp.array([1.0, 2.0, 3.0]), circulant))
    [[1. 2. 3.]
     [3. 1. 2.]
     [2. 3. 1.]]
    >>> print(circulant.matmul(jnp.array([1.0, 0.0, 0.0]), jnp.array([1.0, 2.0, 3.0])).round())
    [1. 2. 3.]

    References: Cheng, Yu, Feris, Kumar, Choudhary and Chang, An Exploration of Parameter Redundancy in Deep Networks
    with Circulant Projections, arXiv:1502.03436, 2015.
    """

    @property
    def n_values(self):
        """max(K, N)."""
        return max(self.sizes)

    @property
    def first(self):
        """0."""
        return 0


@dataclasses.dataclass(frozen=True)
class Toeplitz(Shifts):
    """A Toeplitz matrix: w[i, j] = codebook[j − i + K − 1], one value for each of K + N − 1 diagonals.

    The codebook starts with the diagonal at the bottom left, so that
    w = scipy.linalg.toeplitz(codebook[K − 1 :: −1], codebook[K − 1 :]).

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> print(jw.share(jnp.array([1.0, 2.0, 3.0, 4.0]), Toeplitz(shape=(2, 3))))
    [[2. 3. 4.]
     [1. 2. 3.]]

    References: Sindhwani, Sainath and Kumar, Structured Transforms for Small-Footprint Deep Learning,
    arXiv:1510.01722, 2015.
    """

    @property
    def n_values(self):
        """K + N − 1."""
        rows, columns = self.sizes
        return max(rows + columns - 1, 0)

    @property
    def first(self):
        """K − 1."""
        return self.sizes[0] - 1

    @property
    def _length(self):
        # Any length from n_values on will do: nothing wraps around into the columns. Of these, FFTs are fast.
        return min(m << max(-(-self.n_values // m) - 1, 0).bit_length() for m in (1, 3, 5, 9, 15))


def check_rows(x: jax.Array, pattern: Pattern) -> jax.Array:
    """`x` as an array (..., K), or an error unless it is one."""
    x = check_weight(x, "x")
    rows = pattern.sizes[0]
    if x.ndim == 0 or x.shape[-1] != rows:
        raise ValueError(f"x must have shape (..., {rows}) for {pattern}, got {x.shape}: its last axis is summed over")
    return x


def displacement(left: jax.Array, right: jax.Array) -> jax.Array:
    """A square matrix of low displacement rank, as a sum of products of circulant matrices.

    W = Σᵣ C₊(leftᵣ) C₋(rightᵣ), where C₊(c)[i, j] = c[(j − i) mod n] is circulant, and C₋ is the same but with the sign
    changed below the diagonal. Every Toeplitz matrix and its inverse have such a sum of two terms, and products of them
    of few. Linear in each of the two factors.

    Args:
      left: float array (rank, n).
      right: float array (rank, n).

    Returns:
      Array (n, n) of the wider of the two dtypes. `displacement_matmul` is the product with it, without it.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: the factors are not of one shape (rank, n).

    >>> import jax.numpy as jnp
    >>> print(displacement(jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[1.0, 2.0, 3.0]])).round())
    [[ 1.  2.  3.]
     [-3.  1.  2.]
     [-2. -3.  1.]]

    References: Sindhwani, Sainath and Kumar, Structured Transforms for Small-Footprint Deep Learning,
    arXiv:1510.01722, 2015.
    """
    left, right = _factors(left, right)
    return displacement_matmul(jnp.eye(left.shape[-1], dtype=left.dtype), left, right)


def displacement_matmul(x: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """The product x @ displacement(left, right), by FFT: the matrix is not built.

    Takes O(rank · n log n) for each row of x.

    Args:
      x: float array (..., n).
      left: float array (rank, n).
      right: float array (rank, n).

    Returns:
      Array (..., n) of the widest of the dtypes; the FFT is in float32 or wider.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: the factors are not of one shape (rank, n), or the last axis of x is not n.

    >>> import jax.numpy as jnp
    >>> left, right = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 2.0]])
    >>> print(displacement_matmul(jnp.array([1.0, 0.0]), left, right).round())
    [1. 2.]

    References: Sindhwani, Sainath and Kumar, arXiv:1510.01722, 2015.
    """
    left, right = _factors(left, right)
    x, n = check_weight(x, "x"), left.shape[-1]
    if x.ndim == 0 or x.shape[-1] != n:
        raise ValueError(f"x must have shape (..., {n}), got {x.shape}: its last axis is summed over")
    dtype = jnp.promote_types(x.dtype, left.dtype)
    if n == 0:
        return x.astype(dtype)
    wide = accumulation_dtype(dtype)
    lead = x.shape[:-1]
    x, left, right = (a.astype(wide) for a in (x.reshape(-1, 1, n), left[None], right[None]))
    x = jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(left), n)
    # Turned by half a circle in n steps, what wraps around comes back with its sign changed.
    angle = jnp.pi * jnp.arange(n, dtype=wide)[None] / n
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    spectra = (jnp.fft.fft(jax.lax.complex(a * cos[None], a * sin[None])) for a in (x, right))
    turned = jnp.fft.ifft(jnp.sum(math.prod(spectra), -2))
    return (turned.real * cos + turned.imag * sin).reshape(*lead, n).astype(dtype)


def _factors(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    left, right = check_weight(left, "left"), check_weight(right, "right")
    if left.ndim != 2 or left.shape != right.shape:
        raise ValueError(
            f"left and right must have one shape, (rank, n), got {left.shape} and {right.shape}: give as many terms"
        )
    dtype = jnp.promote_types(left.dtype, right.dtype)
    return left.astype(dtype), right.astype(dtype)
