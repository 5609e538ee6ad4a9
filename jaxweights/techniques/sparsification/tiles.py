"""Weights cut into tiles that are kept or pruned as a whole."""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import Axes, Reading
from jaxweights.numerics.counts import Count
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_norm
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.sparsification.structure import Structure, check_tiling


class Tiles:
    """The tiles of a weight of the given shape. Without a structure, each weight is a tile.

    Attributes:
      shape: shape of the weight.
      reading: the roles of its axes.
      grid: number of tiles along each axis. With a structure, the groups of a convolution are an axis of their own.
      axis: the axes of the grid that belong to one matrix, over which tiles are counted: all but the batch axes.
      n_matrices: number of matrices.
      n_tiles: number of tiles of one matrix.
      input_axis: the axis along which the inputs of an N:M pattern are consecutive.
      n_inputs: number of tiles along it.
    """

    def __init__(self, shape: tuple[int, ...], structure: Structure | None, axes: Axes | None):
        self.shape = shape
        self.reading = r = Reading.of(axes, shape)
        check_tiling(structure)
        self._cut, inner = (shape, r) if structure is None else r.ungroup(shape)
        self._tile = (1,) * len(shape) if structure is None else structure.tile(inner, self._cut)
        self._pool = None if structure is None else structure.pool
        self.grid = tuple(-(-n // max(t, 1)) for n, t in zip(self._cut, self._tile, strict=True))
        batch = inner.batch[: len(r.batch)]
        self.axis = tuple(a for a in range(len(self.grid)) if a not in batch)
        self.n_matrices = math.prod(self.grid[a] for a in batch)
        self.n_tiles = math.prod(self.grid[a] for a in self.axis)
        self.input_axis = inner.contracted[-1] if inner.contracted else 0
        self.n_inputs = self.grid[self.input_axis] if inner.contracted else 1

    @property
    def matrix_size(self) -> int:
        """Number of weights of one matrix."""
        return math.prod(self.shape) // max(self.n_matrices, 1)

    def scores(self, scores: jax.Array) -> jax.Array:
        """Returns the score of each tile."""
        return scores if self._pool is None else auto_sharded(self._pooled, scores)

    def any(self, mask: jax.Array) -> jax.Array:
        """Returns for each tile whether a mask is true anywhere in it."""
        if self.grid == self.shape:
            return mask
        return auto_sharded(lambda m: self._max(m.astype(jnp.uint8)) > 0, mask)

    def expand(self, mask: jax.Array, like: jax.Array) -> jax.Array:
        """Returns a mask of tiles as a mask of weights, sharded as `like`."""
        if self.grid == self.shape:
            return mask

        def repeat(mask):
            if not self._partial:
                corners = mask.reshape([n for count in self.grid for n in (count, 1)])
                return jnp.broadcast_to(corners, self._split_shape).reshape(self.shape)
            for a, (n, t) in enumerate(zip(self._cut, self._tile, strict=True)):
                mask = mask if t == 1 else jnp.take(mask, np.arange(n) // t, a)
            return mask.reshape(self.shape)

        return auto_sharded(repeat, mask, like=like)

    def per_matrix(self, counts: Count) -> Count:
        """Reshapes counts, one for each matrix in order, to broadcast to the tiles."""
        shape = [1 if a in self.axis else n for a, n in enumerate(self.grid)]
        return Count(counts.hi.reshape(shape), counts.lo.reshape(shape))

    def _pooled(self, scores: jax.Array) -> jax.Array:
        scores = scores.astype(accumulation_dtype(scores.dtype))
        match self._pool:
            case "l2":
                return self._norm(scores)
            case "l1":
                return self._sum(jnp.abs(scores))
            case "mean":
                return functools.reduce(operator.truediv, self._lengths(scores.dtype), self._sum(scores))
            case _:
                return self._max(scores)

    def _norm(self, scores: jax.Array) -> jax.Array:
        if not self._partial:
            return safe_norm(scores.reshape(self._split_shape), self._inner)
        largest = jnp.max(jnp.where(jnp.isfinite(scores), jnp.abs(scores), 0), initial=0)
        largest = jnp.where(largest > 0, largest, 1)
        return largest * jnp.sqrt(self._sum(jnp.square(scores / largest)))

    def _sum(self, a: jax.Array) -> jax.Array:
        if not self._partial:
            return jnp.sum(a.reshape(self._split_shape), self._inner)
        return self._windows(a, np.zeros((), a.dtype), jax.lax.add)

    def _max(self, a: jax.Array) -> jax.Array:
        lowest = -np.inf if jnp.issubdtype(a.dtype, jnp.floating) else 0
        if not self._partial:
            return jnp.max(a.reshape(self._split_shape), self._inner, initial=lowest)
        return self._windows(a, np.array(lowest, a.dtype), jax.lax.max)

    def _windows(self, a: jax.Array, start: np.ndarray, f) -> jax.Array:
        """Reduces each tile. On a mesh, only what a tile has on the next device crosses over."""
        missing = [(0, g * t - n) for g, t, n in zip(self.grid, self._tile, self._cut, strict=True)]
        return jax.lax.reduce_window(a.reshape(self._cut), start, f, self._tile, self._tile, missing)

    @property
    def _partial(self) -> bool:
        """Whether the last tile along some axis is shorter."""
        return 0 not in self._cut and any(n % t for n, t in zip(self._cut, self._tile, strict=True))

    def _lengths(self, dtype) -> list[np.ndarray]:
        """The number of entries of the tiles along each axis, as arrays that broadcast to the grid."""
        ndim, lengths = len(self.grid), []
        for a, (n, t, count) in enumerate(zip(self._cut, self._tile, self.grid, strict=True)):
            along = np.minimum(t, n - t * np.arange(count)).astype(dtype)
            lengths.append(along.reshape([count if i == a else 1 for i in range(ndim)]))
        return lengths

    @property
    def _split_shape(self) -> list[int]:
        """The shape of the weight with each axis split in two: tiles, and entries of a tile."""
        return [n for pair in zip(self.grid, self._tile, strict=True) for n in pair]

    @property
    def _inner(self) -> tuple[int, ...]:
        """The axes of the split weight that lie within a tile."""
        return tuple(range(1, 2 * len(self.grid), 2))
