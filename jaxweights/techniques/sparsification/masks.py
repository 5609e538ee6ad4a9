"""Masks of exact counts: the weights, or groups of them, with the largest scores are kept."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.transform import Number
from jaxweights.numerics.counts import Count, fraction_of, scaled
from jaxweights.numerics.norms import safe_norm
from jaxweights.numerics.selection import Rank, by_magnitude, by_value, count_true, smallest_mask
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.sparsification.pattern import Sparsity, check_sparsity
from jaxweights.techniques.sparsification.structure import Structure


def keep_largest(
    scores: jax.Array,
    sparsity: Sparsity,
    *,
    structure: Structure | None = None,
    axes: Axes | None = None,
    within: jax.Array | None = None,
) -> jax.Array:
    """The mask that keeps the weights with the largest scores.

    False at the round(sparsity·n) smallest scores of each matrix of n weights, half a weight rounded up; of equal
    scores the one with the lower flat index goes first. The count is exact at any size.

    Args:
      scores: float array of any shape, of any sign.
      sparsity: fraction of zeros in [0, 1], a number or a scalar array; or (n, m), to keep n of every m consecutive
        inputs of each output unit: N:M sparsity, such as (2, 4).
      structure: what is kept or pruned as one, `Blocks`, `OutputUnits` or `InputUnits`: then these are counted, and the
        score of one is the Euclidean norm of its scores. By default each weight by itself.
      axes: how the weight is read as a matrix, (..., in, out) by default. Each index along its batch axes, such as a
        layer of a stack, is a matrix with a count of its own.
      within: boolean array of the shape of `scores`. What lies outside is pruned first, and counts.

    Returns:
      Boolean array of the shape of `scores`. NaN ranks above infinity: it is kept longest.

    Raises:
      TypeError: `scores` is not a float array, or `sparsity` of the wrong kind.
      ValueError: `sparsity` is out of range, or it or `structure` does not fit the shape.

    >>> import jax.numpy as jnp
    >>> print(keep_largest(jnp.array([0.3, -2.0, 0.1, 1.0]), 0.5))
    [ True False False  True]
    >>> print(keep_largest(jnp.array([[4.0, 1.0], [3.0, 1.0], [2.0, 2.0], [1.0, 5.0]]), (1, 2)).T)
    [[ True False  True False]
     [False  True False  True]]

    References: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378, 2021 (N:M).
    """
    scores = check_weight(scores, "scores")
    return _kept(scores, sparsity, structure, axes, by_value, within)


def magnitude_mask(
    w: jax.Array, sparsity: Sparsity, *, structure: Structure | None = None, axes: Axes | None = None
) -> jax.Array:
    """The mask that keeps the weights of largest magnitude.

    `keep_largest` of |w|, which is not stored: False at the round(sparsity·n) weights of smallest magnitude.

    Args:
      w: float array of any shape.
      sparsity: fraction of zeros in [0, 1], a number or a scalar array, or (n, m) for N:M sparsity.
      structure: what is kept or pruned as one, by its norm.
      axes: how `w` is read as a matrix, (..., in, out) by default.

    Returns:
      Boolean array of the shape of `w`. NaN ranks above infinity: it is kept longest.

    Raises:
      TypeError: `w` is not a float array, or `sparsity` of the wrong kind.
      ValueError: `sparsity` is NaN or out of range, or it or `structure` does not fit the shape.

    >>> import jax.numpy as jnp
    >>> print(magnitude_mask(jnp.array([0.3, -2.0, 0.1, 1.0]), 0.5))
    [False  True False  True]

    References: Han, Pool, Tran and Dally, Learning both Weights and Connections for Efficient Neural Networks,
    arXiv:1506.02626, 2015.
    """
    return _kept(check_weight(w), sparsity, structure, axes, by_magnitude, None)


def drop_and_grow(
    mask: jax.Array,
    drop: jax.Array,
    grow: jax.Array,
    fraction: Number,
    *,
    structure: Structure | None = None,
    axes: Axes | None = None,
) -> jax.Array:
    """The mask with some of the kept weights given up for as many of the others.

    Of the n kept weights of each matrix the round(fraction·n) with the smallest `drop` scores are dropped; then as many
    are grown, those with the largest `grow` scores of all that are not kept, the dropped ones among them. Of equal
    scores the one with the lower flat index is pruned.

    Args:
      mask: boolean array of any shape, true where a weight is kept.
      drop: scores of the weights, float array of the same shape, above −∞.
      grow: scores of the weights, float array of the same shape.
      fraction: number in [0, 1], or a scalar array, taken to a multiple of 2⁻²⁴.
      structure: what is kept or pruned as one, as for `keep_largest`.
      axes: how the weight is read as a matrix, (..., in, out) by default.

    Returns:
      Boolean array of the same shape, with as many true entries. NaN ranks above infinity.

    Raises:
      TypeError: scores are no float arrays, `mask` is not boolean, or `fraction` is not a number.
      ValueError: the shapes differ, or `fraction` is out of range.

    >>> import jax.numpy as jnp
    >>> mask, w, grad = jnp.array([True, True, False, False]), jnp.array([3.0, 1, 0, 0]), jnp.array([0.0, 1, 2, 5])
    >>> print(drop_and_grow(mask, w, grad, 0.5))
    [ True False False  True]

    References: Mocanu et al., arXiv:1707.04780, 2017; Evci et al., arXiv:1911.11134, 2019.
    """
    drop, grow = check_weight(drop, "drop"), check_weight(grow, "grow")
    mask = check_within(mask, drop.shape, "mask")
    if grow.shape != drop.shape:
        raise ValueError(f"grow must have the shape {drop.shape} of drop, got {grow.shape}: score each weight")
    check_scalar("fraction", fraction, 0, 1)
    tiles = Tiles(drop.shape, structure, axes)
    ratio = jnp.round(jnp.clip(jnp.asarray(fraction, jnp.float32), 0, 1) * 2**24).astype(jnp.uint32)
    ratio = jnp.where(ratio == 2**24, jnp.uint32(2**32 - 1), ratio << 8)

    def rewire(mask, drop, grow, ratio):
        whole, mask, drop, grow = drop, tiles.any(mask), tiles.scores(drop), tiles.scores(grow)
        n_pruned = count_true(~mask, tiles.axis)
        n_dropped = scaled(count_true(mask, tiles.axis), ratio)
        lowest = partial(smallest_mask, axis=tiles.axis, rank=by_value)
        left = ~lowest(jnp.where(mask, drop, -jnp.inf), n_pruned + n_dropped)
        return tiles.spread(~lowest(jnp.where(left, jnp.nan, grow), n_pruned), whole)

    return auto_sharded(rewire, mask, drop, grow, ratio, like=drop)


def _kept(scores, sparsity, structure, axes, rank: Rank, within) -> jax.Array:
    tiles = Tiles(scores.shape, structure, axes)
    check_sparsity(sparsity, tiles.n_inputs)
    inside = () if within is None else (check_within(within, scores.shape),)
    k = None if isinstance(sparsity, tuple) else fraction_of(sparsity, tiles.size)

    def keep(scores, k, *inside):
        units = tiles.scores(scores, inside[0] if inside else None)
        if isinstance(sparsity, tuple):
            n, m = sparsity
            pruned = _all_but_n_of_m(units, n, m, tiles.contracted, rank)
        else:
            pruned = smallest_mask(units, k, axis=tiles.axis, rank=rank)
        return tiles.spread(~pruned, scores)

    return auto_sharded(keep, scores, k, *inside, like=scores)


def _all_but_n_of_m(units: jax.Array, n: int, m: int, axis: int, rank: Rank) -> jax.Array:
    shape = units.shape
    groups = units.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    return smallest_mask(groups, m - n, axis=(axis + 1,), rank=rank).reshape(shape)


def check_within(mask, shape: tuple[int, ...], name: str = "within") -> jax.Array:
    """`mask` as a boolean array of this shape, or an error."""
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
        raise TypeError(f"{name} must be boolean, got {jnp.result_type(mask)}: compare it with a number")
    if jnp.shape(mask) != shape:
        raise ValueError(f"{name} must have the shape {shape} of the scores, got {jnp.shape(mask)}: pass a mask of it")
    return jnp.asarray(mask)


def check_tiling(structure) -> None:
    """Raises unless `structure` says how a weight is cut into tiles, or is None."""
    if isinstance(structure, type):
        raise TypeError(f"structure got the class {structure.__name__}: make an instance, {structure.__name__}(...)")
    if structure is not None and not callable(getattr(structure, "tile", None)):
        raise TypeError(f"structure must be Blocks, OutputUnits or InputUnits, got {structure!r}: make an instance")


class Tiles:
    """A weight of a shape cut into what is kept or pruned as one.

    Attributes:
      axis: the axes over which a count holds, all but those of the batch.
      size: the number of tiles of one matrix.
      weights: the number of weights of one tile.
      reading: the roles of the axes.
      contracted: the axis along which inputs are consecutive.
      n_inputs: the number of tiles along it.
    """

    def __init__(self, shape: tuple[int, ...], structure: Structure | None, axes: Axes | None):
        self.shape = shape
        self.reading = r = Reading.of(axes, shape)
        check_tiling(structure)
        self.tile = (1,) * len(shape) if structure is None else structure.tile(r, shape)
        self.units = tuple(n // max(t, 1) for n, t in zip(shape, self.tile, strict=True))
        self.axis = tuple(a for a in range(len(shape)) if a not in r.batch)
        self.size = math.prod(self.units[a] for a in self.axis)
        self.weights = math.prod(self.tile)
        self.contracted = r.contracted[-1] if r.contracted else 0
        self.n_inputs = self.units[self.contracted] if r.contracted else 1

    def scores(self, scores: jax.Array, within: jax.Array | None = None) -> jax.Array:
        """The score of each tile; outside of `within` it is −∞."""
        if self.weights != 1:
            scores = auto_sharded(lambda s: safe_norm(s.reshape(self._split()), self._inner), scores)
            within = None if within is None else self.any(within)
        return scores if within is None else jnp.where(within, scores, -jnp.inf)

    def any(self, mask: jax.Array) -> jax.Array:
        """Whether a mask is true anywhere in each tile."""
        return (
            auto_sharded(lambda m: jnp.any(m.reshape(self._split()), self._inner), mask) if self.weights != 1 else mask
        )

    def spread(self, mask: jax.Array, like: jax.Array) -> jax.Array:
        """A mask of tiles as one of the weights that it is to lie like."""
        if self.weights == 1:
            return mask
        outer = [n for pair in zip(self.units, (1,) * len(self.shape), strict=True) for n in pair]
        wide = lambda mask: jnp.broadcast_to(mask.reshape(outer), self._split()).reshape(self.shape)
        return auto_sharded(wide, mask, like=like)

    def batch(self, counts: Count) -> Count:
        """One count for each matrix, in order, as `smallest_mask` takes them."""
        shape = [1 if a in self.axis else n for a, n in enumerate(self.shape)]
        return Count(counts.hi.reshape(shape), counts.lo.reshape(shape))

    @property
    def _inner(self) -> tuple[int, ...]:
        """The axes within a tile, of the weight that is split."""
        return tuple(range(1, 2 * len(self.shape), 2))

    def _split(self) -> list[int]:
        return [n for pair in zip(self.units, self.tile, strict=True) for n in pair]
