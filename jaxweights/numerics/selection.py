"""Exact selection by rank without a sort: the k-th value, and the mask of the k smallest."""

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
"""Floats to unsigned integers that are ordered as the floats are to be."""


def by_magnitude(x: jax.Array) -> jax.Array:
    """The rank of |x|: its bits without the sign. Every NaN has the rank after that of infinity."""
    bits, sign = _bits(x)
    largest, _ = _bits(jnp.finfo(x.dtype).max)
    return jnp.minimum(bits & ~sign, largest + 2)


def by_value(x: jax.Array) -> jax.Array:
    """The rank of x. −0 is 0, and NaN of either sign is above infinity."""
    bits, sign = _bits(x)
    magnitude = by_magnitude(x)
    negative = (bits >= sign) & (magnitude > 0) & ~jnp.isnan(x)
    return jnp.where(negative, ~bits, magnitude | sign)


def smallest_mask(
    x: jax.Array, k: int | jax.Array | Count, *, axis: Sequence[int] | None = None, rank: Rank = by_magnitude
) -> jax.Array:
    """True at the `k` smallest entries; of equal ones, those of lower flat index come first.

    The same set as `jnp.argsort(jnp.abs(x).ravel(), stable=True)[:k]`, found without a sort: the k-th rank is found
    digit by digit, each digit one pass of counts over `x`, and the ties at it are cut at an index found the same way.
    Only counts cross devices, never entries. Counts are exact at any size.

    Args:
      x: float array.
      k: how many, from 0 to all of them; with `axis`, a scalar or an array that broadcasts to the shape of `x` with 1
        at these axes.
      axis: the axes over which to select; each index along the others is a selection of its own. By default all.
      rank: what "small" means.

    Returns:
      Boolean array of the shape of `x`.
    """
    axis = tuple(range(x.ndim)) if axis is None else tuple(sorted(a % x.ndim for a in axis))
    if x.ndim > 1 and len(axis) == 1 and x.shape[axis[0]] <= _FEW:
        return _smallest_of_few(x, count(k), axis[0], rank)
    return _smallest((x,), count(k), axis, rank)[0]


def smallest_masks(
    xs: Sequence[jax.Array], k: int | jax.Array | Count, *, rank: Rank = by_magnitude
) -> list[jax.Array]:
    """The masks of the `k` smallest entries of several arrays together; of equal ones, those of earlier arrays first.

    As `smallest_mask` of all entries in one array, which is never made. Dtypes may differ.
    """
    return list(_smallest(tuple(xs), count(k), None, rank)) if xs else []


def count_true(mask: jax.Array, axis: Sequence[int]) -> Count:
    """How many entries of a mask are true over these axes, as `smallest_mask` takes it."""
    pool = _Pool(mask, tuple(axis))
    shape = [1 if a in axis else n for a, n in enumerate(mask.shape)]
    (found,) = pool.count([pool.x])
    return Count(*(limb.reshape(shape) for limb in found))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _smallest(xs: tuple[jax.Array, ...], k: Count, axis: tuple[int, ...] | None, rank: Rank) -> tuple[jax.Array, ...]:
    """The masks of the k smallest; `axis` None is all axes of each."""
    find = lambda x, rest, k: _found((x, *rest), k, axis, rank)
    return auto_sharded(find, xs[0], xs[1:], k, like=xs)


def _found(xs, k, axis, rank) -> tuple[jax.Array, ...]:
    dtype = max((x.dtype for x in xs), key=lambda d: jnp.finfo(d).bits)
    if jnp.finfo(dtype).bits < 32 and any(x.dtype != dtype for x in xs):
        dtype = jnp.dtype(jnp.float32)
    pools = [_Pool(x, tuple(range(x.ndim)) if axis is None else axis) for x in xs]
    word, bits = _bits(jnp.zeros((), dtype))[0].dtype, jnp.finfo(dtype).bits
    if axis is not None:
        k = Count(*(pools[0].keep(limb) for limb in k))
    # Functions, not arrays: computed anew within each pass, they are never stored.
    ranks = [lambda p=p: rank(p.x.astype(dtype)) for p in pools]

    def below(thresholds):
        """For each threshold, how many ranks are below it."""
        counts = [p.count([r() < t for t in thresholds]) for p, r in zip(pools, ranks, strict=True)]
        return [functools.reduce(operator.add, c) for c in zip(*counts, strict=True)]

    threshold, n_lower = _largest(word, bits, below, k)
    k = k - n_lower
    out = []
    for p, r in zip(pools, ranks, strict=True):
        lower, tied = lambda r=r: r() < threshold, lambda r=r: r() == threshold
        needed = k
        if len(pools) > 1:
            needed = smaller(k, p.count([tied(), lower()])[0])
            k = k - needed
        out.append(p.restore(lower() | (tied() & p.first(tied, needed))))
    return tuple(out)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _smallest_of_few(x: jax.Array, k: Count, axis: int, rank: Rank) -> jax.Array:
    """The masks along one short axis: each entry is compared with each."""
    return auto_sharded(lambda x, k: _first_of_few(rank(x), k, axis), x, k, like=x)


def _first_of_few(ranks: jax.Array, k: Count, axis: int) -> jax.Array:
    mine, others = jnp.expand_dims(ranks, axis + 1), jnp.expand_dims(ranks, axis)
    index = lambda a: jax.lax.broadcasted_iota(jnp.int32, jnp.broadcast_shapes(mine.shape, others.shape), a)
    before = (others < mine) | ((others == mine) & (index(axis + 1) < index(axis)))
    return ~(k <= count(jnp.sum(before, axis + 1, dtype=jnp.int32)))


class _Pool:
    """An array whose axes of selection are split in two, the first of which is short.

    Counts over the second of each pair are made where the entries are, as long as the devices along an axis divide its
    first part: then one sum of few numbers is all that crosses them. Partial counts fit 32 bits.
    """

    def __init__(self, x: jax.Array, axis: tuple[int, ...]):
        self.original = x.shape
        size = math.prod(x.shape[a] for a in axis)
        most = 2 ** (12 // max(sum(x.shape[a] > 1 for a in axis), 1))
        # The last axis keeps runs of whole vectors: shorter ones are several times slower on a CPU.
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
        self.shape = tuple(1 if i in selected else n for i, n in enumerate(split)) if len(axis) < x.ndim else ()

    def keep(self, k: jax.Array) -> jax.Array:
        """`k`, which broadcasts to the original shape with 1 at the axes of selection, as counts are shaped."""
        shape = tuple(1 if a in self.axis else n for a, n in enumerate(self.original))
        return jnp.broadcast_to(k, shape).reshape(self.shape)

    def restore(self, mask: jax.Array) -> jax.Array:
        """A mask of the split array as one of the original."""
        return jnp.broadcast_to(mask, self.x.shape).reshape(self.original)

    def count(self, masks: Sequence[jax.Array]) -> list[Count]:
        """How many entries of each mask are true, all in one pass.

        One reduction of many results: XLA for CPUs then fuses the comparisons into it, and stores none of the masks.
        """
        add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
        ones = tuple(jnp.broadcast_to(m, self.x.shape).astype(jnp.uint32) for m in masks)
        parts = jnp.stack(jax.lax.reduce(ones, (jnp.uint32(0),) * len(masks), add, self.inner))
        # Axis i of the split array lost the inner ones before it, and got the masks in front.
        left = [i - sum(j < i for j in self.inner) + 1 for i in self.outer]
        hi, lo = total(parts, left)
        return [Count(hi[i].reshape(self.shape), lo[i].reshape(self.shape)) for i in range(len(masks))]

    def first(self, mask: Callable[[], jax.Array], n: Count) -> jax.Array:
        """True at the entries before the (n + 1)-th of a mask; at all, if it has no more than n."""
        axes = [a for a in sorted(self.outer + self.inner) if self.x.shape[a] > 1]
        if not axes:
            return n.positive
        index = lambda a: jax.lax.broadcasted_iota(jnp.uint32, self.x.shape, a)

        def search():
            """The index of that entry, axis by axis: the order of the tuple is that of the flat index."""
            found, left, here = [], n, mask
            for a in axes:
                before = lambda ts, a=a, here=here: self.count([here() & (index(a) < t) for t in ts])
                at, passed = _largest(jnp.dtype(jnp.uint32), self.x.shape[a].bit_length(), before, left)
                found, left = [*found, at], left - passed
                here = lambda here=here, a=a, at=at: here() & (index(a) == at)
            return tuple(found)

        nothing = lambda: (jnp.zeros(self.shape, jnp.uint32),) * len(axes)
        found = jax.lax.cond(jnp.any(n.positive), search, nothing)
        before = jnp.zeros((), bool)
        for a, at in reversed(list(zip(axes, found, strict=True))):
            before = (index(a) < at) | ((index(a) == at) & before)
        return before


_DIGIT = 2  # bits; with more, the time is that of the comparisons
_VECTOR = 128  # entries
_FEW = 32  # entries


def _largest(dtype: jnp.dtype, bits: int, below: Callable[[list[jax.Array]], list[Count]], most: Count):
    """(t, count): the largest integer of so many bits with a count below it of at most `most`, found by digits."""
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
    """The bits of x, a float or an array of them, and the bit of the sign."""
    n = jnp.finfo(x.dtype).bits
    word = jnp.dtype(f"uint{n}")
    return jax.lax.bitcast_convert_type(x, word), word.type(2 ** (n - 1))
