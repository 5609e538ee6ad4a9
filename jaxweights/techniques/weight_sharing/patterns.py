"""Patterns: which positions of a weight share a value, by place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_integer, check_shape, check_weight
from jaxweights.techniques.weight_sharing.indices import hash_index, index_dtype


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which positions of a weight share a value, by place.

    `share(codebook, pattern)` is the weight of its `shape`. Without a shape it is for `ShareWeights`, which takes that
    of each weight.
    """

    shape: tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)
    reads_matrix: ClassVar[bool] = True
    """Whether the shape is that of the weight read as a matrix, (K, N), not its own."""

    def __post_init__(self):
        if self.shape is not None:
            object.__setattr__(self, "shape", check_shape("shape", self.shape))
            if self.reads_matrix and len(self.shape) != 2:
                raise ValueError(f"shape must be that of a matrix, (K, N), got {self.shape}: give two sizes")

    @property
    def n_values(self) -> int:
        """The number of values that are shared: the size of the codebook."""
        raise TypeError(f"{type(self).__name__} defines no n_values: a pattern has n_values and positions")

    def positions(self, xp: ModuleType) -> Any:
        """The number of the value at each position, computed by NumPy or by `jax.numpy`, whichever is given."""
        raise TypeError(f"{type(self).__name__} defines no positions: a pattern has n_values and positions")

    def index(self) -> np.ndarray:
        """What `share` would take in place of the pattern, of the smallest integer dtype that holds it."""
        return np.asarray(self.positions(np)).astype(index_dtype(self.n_values))

    def weight(self, codebook: jax.Array) -> jax.Array:
        """The weight with the values of a codebook (n_values,)."""
        return codebook.at[jnp.asarray(self.positions(jnp), jnp.int32)].get(mode="promise_in_bounds")

    def of(self, shape: Sequence[int]) -> Self:
        """The pattern for a weight of this shape, or an error if it is for another."""
        if self.shape is None:
            return dataclasses.replace(self, shape=tuple(shape))
        if self.shape != tuple(shape):
            raise ValueError(f"{self} is for that shape, the weight has {tuple(shape)}: leave the shape out")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape, or an error if there is none."""
        if self.shape is None:
            raise ValueError(f"{self} has no shape: give it, as in shape=(64, 32)")
        return self.shape


def values_of(codebook: jax.Array, pattern: Pattern) -> jax.Array:
    """The values of a pattern, (n_values,), from a codebook of any shape."""
    codebook = check_weight(codebook, "codebook")
    if codebook.size != pattern.n_values:
        raise ValueError(
            f"codebook must have {pattern.n_values} values for {pattern}, got shape {codebook.shape}: make it of shape "
            f"({pattern.n_values},)"
        )
    return codebook.ravel()


@dataclasses.dataclass(frozen=True)
class Hashed(Pattern):
    """Positions share a value at random: w[i] = codebook[h(i, seed) mod n], with the hash h of `hash_index`.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w = jw.share(jnp.array([1.0, 2.0]), Hashed(2, shape=(64, 32)))
    >>> print(w.shape, jnp.unique(w))
    (64, 32) [1. 2.]

    References: Chen, Wilson, Tyree, Weinberger and Chen, Compressing Neural Networks with the Hashing Trick,
    arXiv:1504.04788, 2015.
    """

    n: int
    seed: int = 0
    reads_matrix: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_integer("n", self.n, 1, 2**31 - 1)
        check_integer("seed", self.seed, 0)

    @property
    def n_values(self):
        """`n`."""
        return self.n

    def positions(self, xp):
        """The hash of each position."""
        return hash_index(self.sizes, self.n, self.seed)


@dataclasses.dataclass(frozen=True)
class Symmetric(Pattern):
    """A square matrix that equals its transpose: w[i, j] = w[j, i].

    The codebook has the K(K + 1)/2 entries on and above the diagonal, row by row, as `numpy.triu_indices` names them.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> print(jw.share(jnp.array([1.0, 2.0, 3.0]), Symmetric(shape=(2, 2))))
    [[1. 2.]
     [2. 3.]]
    """

    def __post_init__(self):
        super().__post_init__()
        if self.shape is not None and self.shape[0] != self.shape[1]:
            raise ValueError(f"a symmetric matrix is square, got shape {self.shape}: leave this weight out of `where`")

    @property
    def n_values(self):
        """K(K + 1)/2."""
        size, _ = self.sizes
        return size * (size + 1) // 2

    def positions(self, xp):
        """The entry of the upper triangle."""
        size, _ = self.sizes
        i, j = xp.arange(size)[:, None], xp.arange(size)[None]
        low, high = xp.minimum(i, j), xp.maximum(i, j)
        return low * (2 * size - 1 - low) // 2 + high
