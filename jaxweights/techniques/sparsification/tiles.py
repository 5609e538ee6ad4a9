"""Weights cut into tiles that are kept or pruned as a whole."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.numerics.counts import Count
from jaxweights.numerics.norms import safe_norm
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.sparsification.structure import Structure, check_tiling


class Tiles:
    """The tiles of a weight of the given shape. Without a structure, each weight is a tile.

    Attributes:
      shape: shape of the weight.
      reading: the roles of its axes.
      tile: length of a tile along each axis.
      grid: number of tiles along each axis.
      axis: the axes of one matrix, over which tiles are counted: all but the batch axes.
      n_matrices: number of matrices.
      n_tiles: number of tiles of one matrix.
      tile_size: number of weights of one tile.
      input_axis: the axis along which the inputs of an N:M pattern are consecutive.
      n_inputs: number of tiles along it.
    """

    def __init__(self, shape: tuple[int, ...], structure: Structure | None, axes: Axes | None):
        self.shape = shape
        self.reading = r = Reading.of(axes, shape)
        check_tiling(structure)
        self.tile = (1,) * len(shape) if structure is None else structure.tile(r, shape)
        self.grid = tuple(n // max(t, 1) for n, t in zip(shape, self.tile, strict=True))
        self.axis = tuple(a for a in range(len(shape)) if a not in r.batch)
        self.n_matrices = math.prod(shape[a] for a in r.batch)
        self.n_tiles = math.prod(self.grid[a] for a in self.axis)
        self.tile_size = math.prod(self.tile)
        self.input_axis = r.contracted[-1] if r.contracted else 0
        self.n_inputs = self.grid[self.input_axis] if r.contracted else 1

    def scores(self, scores: jax.Array, within: jax.Array | None = None) -> jax.Array:
        """Returns the score of each tile, the norm of its scores; −∞ for tiles that are false in all of `within`."""
        if self.tile_size != 1:
            scores = auto_sharded(lambda s: safe_norm(self._split(s), self._inner), scores)
        return scores if within is None else jnp.where(self.any(within), scores, -jnp.inf)

    def any(self, mask: jax.Array) -> jax.Array:
        """Returns for each tile whether a mask is true anywhere in it."""
        if self.tile_size == 1:
            return mask
        return auto_sharded(lambda m: jnp.any(self._split(m), self._inner), mask)

    def expand(self, mask: jax.Array, like: jax.Array) -> jax.Array:
        """Returns a mask of tiles as a mask of weights, sharded as `like`."""
        if self.tile_size == 1:
            return mask

        def repeat(mask):
            corners = mask.reshape([n for count in self.grid for n in (count, 1)])
            return jnp.broadcast_to(corners, self._split_shape).reshape(self.shape)

        return auto_sharded(repeat, mask, like=like)

    def per_matrix(self, counts: Count) -> Count:
        """Reshapes counts, one for each matrix in order, to broadcast to the tiles."""
        shape = [1 if a in self.axis else n for a, n in enumerate(self.shape)]
        return Count(counts.hi.reshape(shape), counts.lo.reshape(shape))

    @property
    def _split_shape(self) -> list[int]:
        """The shape of the weight with each axis split in two: tiles, and entries of a tile."""
        return [n for pair in zip(self.grid, self.tile, strict=True) for n in pair]

    @property
    def _inner(self) -> tuple[int, ...]:
        """The axes of the split weight that lie within a tile."""
        return tuple(range(1, 2 * len(self.shape), 2))

    def _split(self, w: jax.Array) -> jax.Array:
        return w.reshape(self._split_shape)
