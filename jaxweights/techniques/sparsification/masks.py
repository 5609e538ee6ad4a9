"""Masks with an exact number of zeros, which keep the weights, or groups of weights, of largest score."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.transform import Number
from jaxweights.numerics.counts import fraction_of, scaled
from jaxweights.numerics.selection import Entries, Rank, by_magnitude, by_value, count_true, smallest_mask
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.sparsification.pattern import Sparsity, check_sparsity
from jaxweights.techniques.sparsification.structure import Structure
from jaxweights.techniques.sparsification.tiles import Tiles


def keep_largest(
    scores: jax.Array,
    sparsity: Sparsity,
    *,
    structure: Structure | None = None,
    axes: Axes | None = None,
    within: jax.Array | None = None,
) -> jax.Array:
    """The mask that keeps the weights with the largest scores.

    In each matrix of n weights it is False at the round(sparsity·n) smallest scores, halves rounded up. Of equal
    scores, the one with the lower flat index is pruned first. The count is exact at any size.

    Args:
      scores: float array of any shape. Scores may be negative.
      sparsity: fraction of zeros in [0, 1], a number or a scalar array; or (n, m) for N:M sparsity, such as (2, 4):
        n of every m consecutive inputs of each output unit are kept. To prune k of n, give k / n: 1 is all of them.
      structure: what is kept or pruned as a whole: `Blocks`, `OutputUnits` or `InputUnits`. The count is then one of
        these, whatever their size, and their score is the Euclidean norm of the scores in them, or another `pool`. By
        default, single weights.
      axes: how the weight is read as a matrix, (..., in, out) by default. Each index along its batch axes, such as a
        layer of a stack, is a matrix with a count of its own.
      within: boolean array of the shape of `scores`. Weights where it is false are pruned first; they are part of the
        count.

    Returns:
      Boolean array of the shape of `scores`. NaN ranks above infinity, so it is pruned last.

    Raises:
      TypeError: `scores` is not a float array, `within` is not boolean, or `sparsity` is of the wrong type.
      ValueError: `sparsity` is out of range, or `sparsity`, `structure`, `axes` or `within` does not fit the shape.

    >>> import jax.numpy as jnp
    >>> print(keep_largest(jnp.array([0.3, -2.0, 0.1, 1.0]), 0.5))
    [ True False False  True]
    >>> print(keep_largest(jnp.array([[4.0, 1.0], [3.0, 1.0], [2.0, 2.0], [1.0, 5.0]]), (1, 2)).T)
    [[ True False  True False]
     [False  True False  True]]

    References: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378, 2021 (N:M).
    """
    return _keep_largest(check_weight(scores, "scores"), sparsity, structure, axes, by_value, within)


def magnitude_mask(
    w: jax.Array, sparsity: Sparsity, *, structure: Structure | None = None, axes: Axes | None = None
) -> jax.Array:
    """The mask that keeps the weights of largest magnitude.

    False at the round(sparsity·n) weights of smallest magnitude in each matrix of n weights. The same as
    `keep_largest(abs(w), ...)`, but |w| is not stored.

    Args:
      w: float array of any shape.
      sparsity: fraction of zeros in [0, 1], a number or a scalar array; or (n, m) for N:M sparsity.
      structure: what is kept or pruned as a whole, by its norm or another `pool`: `Blocks`, `OutputUnits` or
        `InputUnits`.
      axes: how `w` is read as a matrix, (..., in, out) by default.

    Returns:
      Boolean array of the shape of `w`. NaN ranks above infinity, so it is pruned last.

    Raises:
      TypeError: `w` is not a float array, or `sparsity` is of the wrong type.
      ValueError: `sparsity` is NaN or out of range, or `sparsity`, `structure` or `axes` does not fit the shape.

    >>> import jax.numpy as jnp
    >>> print(magnitude_mask(jnp.array([0.3, -2.0, 0.1, 1.0]), 0.5))
    [False  True False  True]

    References: Han, Pool, Tran and Dally, Learning both Weights and Connections for Efficient Neural Networks,
    arXiv:1506.02626, 2015.
    """
    w = check_weight(w)
    return _keep_largest(w if structure is None else jnp.abs(w), sparsity, structure, axes, by_magnitude, within=None)


def drop_and_grow(
    mask: jax.Array,
    drop: jax.Array,
    grow: jax.Array,
    fraction: Number,
    *,
    structure: Structure | None = None,
    axes: Axes | None = None,
) -> jax.Array:
    """One step of dynamic sparse training (SET, RigL): drops some of the kept weights and grows as many others.

    Of the n kept weights of each matrix, the round(fraction·n) with the smallest `drop` scores are dropped. Then as
    many are grown: of all weights that are not kept, including those just dropped, the ones with the largest `grow`
    scores. Of equal scores, the weight with the lower flat index is pruned.

    Args:
      mask: boolean array of any shape, true where a weight is kept.
      drop: float array of the same shape, by which weights are dropped.
      grow: float array of the same shape, by which weights are grown.
      fraction: number in [0, 1], or a scalar array, rounded to a multiple of 2⁻²⁴.
      structure: what is kept or pruned as a whole, as for `keep_largest`.
      axes: how the weight is read as a matrix, (..., in, out) by default.

    Returns:
      Boolean array of the same shape with the same number of true entries. NaN ranks above infinity.

    Raises:
      TypeError: `drop` or `grow` is not a float array, `mask` is not boolean, or `fraction` is not a number.
      ValueError: the shapes differ, or `fraction` is out of range.

    >>> import jax.numpy as jnp
    >>> mask, w, grad = jnp.array([True, True, False, False]), jnp.array([3.0, 1, 0, 0]), jnp.array([0.0, 1, 2, 5])
    >>> print(drop_and_grow(mask, w, grad, 0.5))
    [ True False False  True]

    References: Mocanu et al., arXiv:1707.04780, 2017 (SET); Evci et al., arXiv:1911.11134, 2019 (RigL).
    """
    drop, grow = check_weight(drop, "drop"), check_weight(grow, "grow")
    mask = check_boolean("mask", mask, drop.shape)
    if grow.shape != drop.shape:
        raise ValueError(f"grow must have the shape {drop.shape} of drop, got {grow.shape}: score each weight")
    check_scalar("fraction", fraction, 0, 1)
    tiles = Tiles(drop.shape, structure, axes)
    ratio = jnp.round(jnp.clip(jnp.asarray(fraction, jnp.float32), 0, 1) * 2**24).astype(jnp.uint32)
    ratio = jnp.where(ratio == 2**24, jnp.uint32(2**32 - 1), ratio << 8)

    def smallest(scores: Entries, n):
        return smallest_mask(scores, n, axis=tiles.axis, rank=by_value)

    def rewire(mask, drop, grow, ratio):
        kept = tiles.any(mask)
        n_pruned, n_dropped = count_true(~kept, tiles.axis), scaled(count_true(kept, tiles.axis), ratio)
        survives = ~smallest(Entries(tiles.scores(drop), first=~kept), n_pruned + n_dropped)
        pruned = smallest(Entries(tiles.scores(grow), last=survives), n_pruned)
        return tiles.expand(~pruned, like=drop)

    return auto_sharded(rewire, mask, drop, grow, ratio, like=drop)


def _keep_largest(scores, sparsity: Sparsity, structure, axes, rank: Rank, within) -> jax.Array:
    tiles = Tiles(scores.shape, structure, axes)
    check_sparsity(sparsity, tiles.n_inputs)
    within = None if within is None else check_boolean("within", within, scores.shape)
    n_pruned = None if isinstance(sparsity, tuple) else fraction_of(sparsity, tiles.n_tiles)

    def keep(scores, n_pruned, within):
        ranked = Entries(tiles.scores(scores), first=None if within is None else ~tiles.any(within))
        if isinstance(sparsity, tuple):
            pruned = _pruned_by_pattern(ranked, sparsity, tiles.input_axis, rank)
        else:
            pruned = smallest_mask(ranked, n_pruned, axis=tiles.axis, rank=rank)
        return tiles.expand(~pruned, like=scores)

    return auto_sharded(keep, scores, n_pruned, within, like=scores)


def _pruned_by_pattern(scores: Entries, pattern: tuple[int, int], axis: int, rank: Rank) -> jax.Array:
    """True at the m − n smallest of every m consecutive scores along `axis`, for `pattern` (n, m)."""
    n, m = pattern
    shape = scores.x.shape
    groups = jax.tree.map(lambda a: a.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :]), scores)
    return smallest_mask(groups, m - n, axis=(axis + 1,), rank=rank).reshape(shape)


def check_boolean(name: str, mask, shape: tuple[int, ...]) -> jax.Array:
    """`mask` as a boolean array of this shape, or an error."""
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
        raise TypeError(f"{name} must be boolean, got {jnp.result_type(mask)}: compare it with a number")
    if jnp.shape(mask) != shape:
        raise ValueError(
            f"{name} must have the shape {shape} of the scores, got {jnp.shape(mask)}: pass one entry per score"
        )
    return jnp.asarray(mask)
