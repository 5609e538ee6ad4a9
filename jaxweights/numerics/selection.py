"""Exact selection without a sort: the mask of the k smallest entries, by a radix search for the k-th rank."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxweights.numerics.counts import Count, count, select, smaller, total
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


def smallest_mask(
    x: jax.Array, k: int | jax.Array | Count, *, axis: Sequence[int] | None = None, rank: Rank = by_magnitude
) -> jax.Array:
    """True at the `k` smallest entries; among ties, lower flat indices come first.

    The same set as `jnp.argsort(jnp.abs(x).ravel(), stable=True)[:k]`, without a sort: a radix search finds the k-th
    rank digit by digit, with one counting pass over `x` per digit, then the flat index at which to cut its ties. Only
    counts cross devices, never entries. Counts are exact at any size.

    Args:
      x: float array.
      k: number of entries to select, from 0 to all; with `axis`, a scalar or an array that broadcasts to the shape of
        `x` with these axes of size 1.
      axis: axes to select over, separately for each index along the others. All axes by default.
      rank: the order that defines "small".

    Returns:
      Boolean array of the shape of `x`.
    """
    axis = tuple(range(x.ndim)) if axis is None else tuple(sorted(a % x.ndim for a in axis))
    if x.ndim > 1 and len(axis) == 1 and x.shape[axis[0]] <= _FEW:
        return _smallest_of_few(x, count(k), axis[0], rank)
    (mask,) = _smallest((x,), count(k), axis, rank)
    return mask


def smallest_masks(
    xs: Sequence[jax.Array], k: int | jax.Array | Count, *, rank: Rank = by_magnitude
) -> list[jax.Array]:
    """The masks of the `k` smallest entries of several arrays together; among ties, earlier arrays come first.

    The same as `smallest_mask` of the concatenated arrays, without concatenating them. Dtypes may differ.
    """
    return list(_smallest(tuple(xs), count(k), None, rank)) if xs else []


def count_true(mask: jax.Array, axis: Sequence[int]) -> Count:
    """Counts the true entries of a mask over `axis`, in the form of the `k` of `smallest_mask`."""
    pool = _Pool(mask, tuple(axis))
    shape = [1 if a in axis else n for a, n in enumerate(mask.shape)]
    (found,) = pool.count([pool.x])
    return Count(*(limb.reshape(shape) for limb in found))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _smallest(xs: tuple[jax.Array, ...], k: Count, axis: tuple[int, ...] | None, rank: Rank) -> tuple[jax.Array, ...]:
    """The masks of the k smallest entries of all arrays; `axis` None means all axes of each."""

    def find_masks(x, rest, k):
        return _find_masks((x, *rest), k, axis, rank)

    return auto_sharded(find_masks, xs[0], xs[1:], k, like=xs)


def _find_masks(xs, k, axis, rank) -> tuple[jax.Array, ...]:
    dtype = max((x.dtype for x in xs), key=lambda d: jnp.finfo(d).bits)
    if jnp.finfo(dtype).bits < 32 and any(x.dtype != dtype for x in xs):
        dtype = jnp.dtype(jnp.float32)
    pools = [_Pool(x, tuple(range(x.ndim)) if axis is None else axis) for x in xs]
    if axis is not None:
        k = Count(*(pools[0].reshape_count(limb) for limb in k))

    # Functions, not arrays: recomputed within each pass, ranks and masks are never stored.
    def ranks(pool):
        return rank(pool.x.astype(dtype))

    def below(pool, threshold):
        return ranks(pool) < threshold

    def tied(pool, threshold):
        return ranks(pool) == threshold

    def count_below(thresholds):
        """For each threshold, the number of ranks below it."""
        counts = [pool.count([below(pool, t) for t in thresholds]) for pool in pools]
        return [functools.reduce(operator.add, c) for c in zip(*counts, strict=True)]

    threshold, n_below = _largest_threshold(_word(dtype), jnp.finfo(dtype).bits, count_below, k)
    k = k - n_below
    masks = []
    for pool in pools:
        needed = k
        if len(pools) > 1:
            # The second result is not used: XLA on CPUs stores the mask of a reduction with only one.
            n_tied, _ = pool.count([tied(pool, threshold), below(pool, threshold)])
            needed = smaller(k, n_tied)
            k = k - needed
        first = functools.partial(tied, pool, threshold)
        masks.append(pool.restore(below(pool, threshold) | (tied(pool, threshold) & pool.first(first, needed))))
    return tuple(masks)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _smallest_of_few(x: jax.Array, k: Count, axis: int, rank: Rank) -> jax.Array:
    """The mask along one short axis, by comparing every pair of entries."""
    return auto_sharded(lambda x, k: _first_of_few(rank(x), k, axis), x, k, like=x)


def _first_of_few(ranks: jax.Array, k: Count, axis: int) -> jax.Array:
    """True where fewer than k entries along `axis` come before."""
    mine, others = jnp.expand_dims(ranks, axis + 1), jnp.expand_dims(ranks, axis)

    def index(a):
        return jax.lax.broadcasted_iota(jnp.int32, jnp.broadcast_shapes(mine.shape, others.shape), a)

    before = (others < mine) | ((others == mine) & (index(axis + 1) < index(axis)))
    return ~(k <= count(jnp.sum(before, axis + 1, dtype=jnp.int32)))


class _Pool:
    """An array whose selected axes are each split into a short outer and an inner part.

    Counts over the inner parts stay local to a device, as long as the number of devices along an axis divides its outer
    part. Then only one sum of few numbers crosses devices. Partial counts fit in 32 bits.
    """

    def __init__(self, x: jax.Array, axis: tuple[int, ...]):
        self.original_shape = x.shape
        size = math.prod(x.shape[a] for a in axis)
        most = 2 ** (12 // max(sum(x.shape[a] > 1 for a in axis), 1))
        # Along the last axis, inner parts are whole vectors: shorter ones are several times slower on CPUs.
        run = {a: _VECTOR if a == x.ndim - 1 else 1 for a in axis}
        parts = {a: max(math.gcd(max(x.shape[a], 1), most * run[a]) // run[a], 1) for a in axis}
        if size // math.prod(parts.values()) >= 2**32:  # axes of odd lengths
            longest = max(axis, key=lambda a: x.shape[a] if x.shape[a] <= 2**16 else 0)
            parts = {a: x.shape[a] if a == longest else 1 for a in axis}
        self.axis = axis
        split: list[int] = []
        self.outer: list[int] = []
        self.inner: list[int] = []
        for a, n in enumerate(x.shape):
            if parts.get(a, 1) > 1:
                self.outer.append(len(split))
                split.append(parts[a])
            if a in axis:
                self.inner.append(len(split))
            split.append(n // parts.get(a, 1))
        self.x = x.reshape(split)
        selected = {*self.outer, *self.inner}
        self.count_shape = tuple(1 if i in selected else n for i, n in enumerate(split)) if len(axis) < x.ndim else ()

    def reshape_count(self, k: jax.Array) -> jax.Array:
        """Brings `k`, which broadcasts to the original shape with selected axes of size 1, to the shape of counts."""
        shape = tuple(1 if a in self.axis else n for a, n in enumerate(self.original_shape))
        return jnp.broadcast_to(k, shape).reshape(self.count_shape)

    def restore(self, mask: jax.Array) -> jax.Array:
        """Reshapes a mask of the split array to the original shape."""
        return jnp.broadcast_to(mask, self.x.shape).reshape(self.original_shape)

    def count(self, masks: Sequence[jax.Array]) -> list[Count]:
        """Counts the true entries of each mask, all in one pass.

        This is a single variadic reduction: XLA on CPUs fuses the comparisons into it and stores none of the masks.
        """

        def add(a, b):
            return tuple(x + y for x, y in zip(a, b, strict=True))

        ones = tuple(jnp.broadcast_to(m, self.x.shape).astype(jnp.uint32) for m in masks)
        parts = jnp.stack(jax.lax.reduce(ones, (jnp.uint32(0),) * len(masks), add, self.inner))
        # The outer axes of `parts`: the reduction removed the inner axes, and the stack added one in front.
        outer = [i - sum(j < i for j in self.inner) + 1 for i in self.outer]
        hi, lo = total(parts, outer)
        return [Count(hi[i].reshape(self.count_shape), lo[i].reshape(self.count_shape)) for i in range(len(masks))]

    def first(self, mask: Callable[[], jax.Array], n: Count) -> jax.Array:
        """True at the entries before the (n + 1)-th true entry of a mask; everywhere if it has at most n."""
        axes = [a for a in sorted(self.outer + self.inner) if self.x.shape[a] > 1]
        if not axes:
            return n.positive

        def index(a):
            return jax.lax.broadcasted_iota(jnp.uint32, self.x.shape, a)

        def matching(found):
            """The true entries whose leading indices are `found`."""
            entries = mask()
            for a, at in zip(axes, found, strict=False):
                entries = entries & (index(a) == at)
            return entries

        def count_below(a, found, thresholds):
            return self.count([matching(found) & (index(a) < t) for t in thresholds])

        def search():
            """The indices of the (n + 1)-th entry, one axis at a time, the most significant first."""
            found, left = (), n
            for a in axes:
                below = functools.partial(count_below, a, found)
                at, passed = _largest_threshold(jnp.dtype(jnp.uint32), self.x.shape[a].bit_length(), below, left)
                found, left = (*found, at), left - passed
            return found

        def origin():
            return (jnp.zeros(self.count_shape, jnp.uint32),) * len(axes)

        found = jax.lax.cond(jnp.any(n.positive), search, origin)
        before = jnp.zeros((), bool)
        for a, at in reversed(list(zip(axes, found, strict=True))):
            before = (index(a) < at) | ((index(a) == at) & before)
        return before


_DIGIT = 2  # bits per pass; with more, comparisons dominate the time
_VECTOR = 128  # entries
_FEW = 32  # entries of an axis short enough to compare every pair


def _largest_threshold(dtype: jnp.dtype, bits: int, below: Callable[[list[jax.Array]], list[Count]], most: Count):
    """(t, below(t)) for the largest t of `bits` bits with below(t) <= most, found digit by digit."""
    n_digits = -(-bits // _DIGIT)

    def step(i, state):
        t, n_below = state
        shift = (_DIGIT * (n_digits - 1 - i)).astype(dtype)
        candidates = [t | dtype.type(d) << shift for d in range(1, 2**_DIGIT)]
        for candidate, n in zip(candidates, below(candidates), strict=True):
            t, n_below = jnp.where(n <= most, candidate, t), select(n <= most, n, n_below)
        return t, n_below

    start = jnp.zeros_like(most.lo, dtype), Count(jnp.zeros_like(most.hi), jnp.zeros_like(most.lo))
    return jax.lax.fori_loop(0, n_digits, step, start)


def _bits(x) -> tuple[jax.Array, jax.Array]:
    """The bits of a float or an array of floats as unsigned integers, and the sign bit."""
    word = _word(x.dtype)
    return jax.lax.bitcast_convert_type(x, word), word.type(2 ** (jnp.finfo(x.dtype).bits - 1))


def _word(dtype) -> jnp.dtype:
    """The unsigned integers of the width of a float dtype."""
    return jnp.dtype(f"uint{jnp.finfo(dtype).bits}")
