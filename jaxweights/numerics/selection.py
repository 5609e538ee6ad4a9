"""Exact selection without a sort: the mask of the k smallest entries, by a radix search for the k-th rank."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.numerics.batching import grouped, unstacked
from jaxweights.numerics.counts import Count, count, smaller
from jaxweights.numerics.pool import Pool, largest_threshold
from jaxweights.numerics.sharding import auto_sharded

Rank = Callable[[jax.Array], jax.Array]
"""Maps floats to unsigned integers whose order is the one to select by."""


def by_magnitude(x: jax.Array) -> jax.Array:
    """Ranks by |x|: the bits without the sign. Every NaN has the same rank, the next after infinity."""
    bits, sign = _bits(x)
    largest, _ = _bits(jnp.finfo(x.dtype).max)
    return jnp.minimum(bits & ~sign, largest + 2)


def by_value(x: jax.Array) -> jax.Array:
    """Ranks by x. −0 equals 0, and NaN of either sign is above infinity."""
    bits, sign = _bits(x)
    magnitude = by_magnitude(x)
    negative = (bits >= sign) & (magnitude > 0) & ~jnp.isnan(x)
    return jnp.where(negative, ~bits, magnitude | sign)


class Entries(NamedTuple):
    """An array to select from, and which of its entries come before or after all others, whatever their values.

    With `by_magnitude`, zeros tie with the `first`. All arrays have the shape of `x`.
    """

    x: jax.Array
    first: jax.Array | None = None
    last: jax.Array | None = None


def smallest_mask(
    x: jax.Array | Entries,
    k: int | jax.Array | Count,
    *,
    axis: Sequence[int] | None = None,
    rank: Rank = by_magnitude,
) -> jax.Array:
    """True at the `k` smallest entries; among ties, lower flat indices come first.

    The same set as `jnp.argsort(jnp.abs(x).ravel(), stable=True)[:k]`, without a sort: a radix search finds the k-th
    rank digit by digit, with one counting pass over `x` per digit, then the flat index at which to cut its ties. Only
    counts cross devices, never entries. Counts are exact at any size.

    Args:
      x: float array, or `Entries`.
      k: number of entries to select, from 0 to all; with `axis`, a scalar or an array that broadcasts to the shape of
        `x` with these axes of size 1.
      axis: axes to select over, separately for each index along the others. All axes by default.
      rank: the order that defines "small".

    Returns:
      Boolean array of the shape of `x`.
    """
    entries = x if isinstance(x, Entries) else Entries(x)
    shape = entries.x.shape
    axis = tuple(range(len(shape))) if axis is None else tuple(sorted(a % len(shape) for a in axis))
    few = len(shape) > 1 and len(axis) == 1 and shape[axis[0]] <= _FEW
    return (_smallest_of_few if few else _smallest)(entries, count(k), axis, rank)


def smallest_masks(
    xs: Sequence[jax.Array | Entries],
    k: int | jax.Array | Count,
    *,
    rank: Rank = by_magnitude,
    alike: Sequence[Hashable] | None = None,
) -> list[jax.Array]:
    """The masks of the `k` smallest entries of several arrays together; among ties, earlier arrays come first.

    The same as `smallest_mask` of the concatenated arrays, without concatenating them. Dtypes may differ. Arrays of the
    same shape and dtype for which `alike` has the same value are stacked, and the program has one pass for all of them.
    """
    entries = tuple(x if isinstance(x, Entries) else Entries(x) for x in xs)
    groups = tuple(map(tuple, grouped(range(len(xs)) if alike is None else alike)))
    return list(_smallest_together(entries, count(k), groups, rank)) if xs else []


def count_true(mask: jax.Array, axis: Sequence[int]) -> Count:
    """Counts the true entries of a mask over `axis`, in the form of the `k` of `smallest_mask`."""
    pool = Pool(mask, tuple(axis))
    shape = [1 if a in axis else n for a, n in enumerate(mask.shape)]
    (found,) = pool.count([pool.x])
    return Count(*(limb.reshape(shape) for limb in found))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _smallest(entries: Entries, k: Count, axis: tuple[int, ...], rank: Rank) -> jax.Array:
    """The mask of the k smallest entries along `axis`."""

    def find_mask(x, first, last, k):
        ranked = _Ranked(Entries(x, first, last), axis, rank, _common_dtype([x]))
        k = Count(*map(ranked.pool.reshape_count, k))
        threshold, n_below = _find_rank([ranked], k)
        return ranked.mask(threshold, k - n_below)

    return auto_sharded(find_mask, *entries, k, like=entries.x)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _smallest_together(
    entries: tuple[Entries, ...], k: Count, groups: tuple[tuple[int, ...], ...], rank: Rank
) -> tuple[jax.Array, ...]:
    """The masks of the k smallest entries of all arrays. Each group has the positions of arrays to stack."""

    def stacked(*arrays):
        return jnp.stack(arrays)

    def find_masks(_, entries, k):
        dtype = _common_dtype([e.x for e in entries])
        stacks = [jax.tree.map(stacked, *(entries[i] for i in group)) for group in groups]
        whole = [_Ranked(stack, range(stack.x.ndim), rank, dtype) for stack in stacks]
        threshold, n_below = _find_rank(whole, k)
        each = [_Ranked(stack, range(1, stack.x.ndim), rank, dtype) for stack in stacks]
        needed = _distributed(k - n_below, [ranked.count_tied(threshold) for ranked in each], groups)
        masks = {}
        for ranked, group, n in zip(each, groups, needed, strict=True):
            found = ranked.mask(threshold, Count(*(limb.reshape(ranked.pool.count_shape) for limb in n)))
            masks |= zip(group, unstacked(found), strict=True)
        return tuple(masks[i] for i in range(len(entries)))

    return auto_sharded(find_masks, entries[0].x, entries, k, like=tuple(e.x for e in entries))


def _distributed(k: Count, available: list[Count], groups: tuple[tuple[int, ...], ...]) -> list[Count]:
    """How many of k come from each array: all that are available in the first, and so on. In groups, as given."""
    order = np.argsort([i for group in groups for i in group])
    if len(order) == 1:
        return [k]

    def take(left, n):
        taken = smaller(left, n)
        return left - taken, taken

    limbs = zip(*available, strict=True)
    counts = Count(*(jnp.concatenate([jnp.ravel(part) for part in parts])[order] for parts in limbs))
    _, taken = jax.lax.scan(take, k, counts)
    return [Count(*(limb[np.array(group)] for limb in taken)) for group in groups]


def _common_dtype(xs: Sequence[jax.Array]) -> jnp.dtype:
    """The narrowest dtype to compare all arrays in, of at least 16 bits."""
    dtype = max((x.dtype for x in xs), key=lambda d: jnp.finfo(d).bits)
    if jnp.finfo(dtype).bits < 16:  # the ranks of some 8-bit floats leave none for `last`
        dtype = jnp.dtype(jnp.bfloat16)
    if jnp.finfo(dtype).bits < 32 and any(x.dtype not in (dtype, xs[0].dtype) for x in xs):
        dtype = jnp.dtype(jnp.float32)
    return dtype


def _ranks(entries: Entries, rank: Rank, dtype: jnp.dtype) -> jax.Array:
    ranks = rank(entries.x.astype(dtype))
    if entries.first is not None:
        ranks = jnp.where(entries.first, jnp.zeros((), ranks.dtype), ranks)
    if entries.last is not None:
        ranks = jnp.where(entries.last, jnp.array(jnp.iinfo(ranks.dtype).max, ranks.dtype), ranks)
    return ranks


class _Ranked:
    """The entries of a pool and their ranks, which are computed anew within each pass and never stored."""

    def __init__(self, entries: Entries, axis: Sequence[int], rank: Rank, dtype: jnp.dtype):
        self.pool = Pool(entries.x, tuple(axis))
        self.entries = jax.tree.map(lambda a: a.reshape(self.pool.x.shape), entries)
        self.rank, self.dtype = rank, dtype

    def below(self, threshold: jax.Array) -> jax.Array:
        """Whether each rank is below the threshold."""
        return _ranks(self.entries, self.rank, self.dtype) < threshold

    def tied(self, threshold: jax.Array) -> jax.Array:
        """Whether each rank equals the threshold."""
        return _ranks(self.entries, self.rank, self.dtype) == threshold

    def count_tied(self, threshold: jax.Array) -> Count:
        """The number of ranks that equal the threshold."""
        # The second result is not used: XLA on CPUs stores the mask of a reduction with only one.
        n_tied, _ = self.pool.count([self.tied(threshold), self.below(threshold)])
        return n_tied

    def mask(self, threshold: jax.Array, n_tied: Count) -> jax.Array:
        """True at ranks below the threshold, and at the first `n_tied` that equal it."""
        tied = functools.partial(self.tied, threshold)
        return self.pool.restore(self.below(threshold) | (tied() & self.pool.first(tied, n_tied)))


def _find_rank(parts: Sequence[_Ranked], k: Count) -> tuple[jax.Array, Count]:
    """(t, n): the rank of the (k + 1)-th entry of all parts together, and the number of entries below it."""

    def count_below(thresholds):
        """For each threshold, the number of ranks below it."""
        counts = [part.pool.count([part.below(t) for t in thresholds]) for part in parts]
        return [functools.reduce(operator.add, c) for c in zip(*counts, strict=True)]

    dtype = parts[0].dtype
    return largest_threshold(_word(dtype), jnp.finfo(dtype).bits, count_below, k)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _smallest_of_few(entries: Entries, k: Count, axis: tuple[int, ...], rank: Rank) -> jax.Array:
    """The mask along one short axis, by comparing every pair of entries."""

    def find_mask(x, first, last, k):
        return _first_of_few(_ranks(Entries(x, first, last), rank, _common_dtype([x])), k, axis[0])

    return auto_sharded(find_mask, *entries, k, like=entries.x)


def _first_of_few(ranks: jax.Array, k: Count, axis: int) -> jax.Array:
    """True where fewer than k entries along `axis` come before."""
    mine, others = jnp.expand_dims(ranks, axis + 1), jnp.expand_dims(ranks, axis)

    def index(a):
        return jax.lax.broadcasted_iota(jnp.int32, jnp.broadcast_shapes(mine.shape, others.shape), a)

    before = (others < mine) | ((others == mine) & (index(axis + 1) < index(axis)))
    return ~(k <= count(jnp.sum(before, axis + 1, dtype=jnp.int32)))


_FEW = 32  # entries of an axis short enough to compare every pair


def _bits(x) -> tuple[jax.Array, jax.Array]:
    """The bits of a float or an array of floats as unsigned integers, and the sign bit."""
    word = _word(x.dtype)
    return jax.lax.bitcast_convert_type(x, word), word.type(2 ** (jnp.finfo(x.dtype).bits - 1))


def _word(dtype) -> jnp.dtype:
    """The unsigned integers of the width of a float dtype."""
    return jnp.dtype(f"uint{jnp.finfo(dtype).bits}")
