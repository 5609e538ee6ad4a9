"""Counts over some axes of an array, sharded or not, and the search for a rank by counting."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxweights.numerics.batching import apply_if
from jaxweights.numerics.counts import Count, select, total

_DIGIT = 2  # bits per pass; with more, comparisons dominate the time
_VECTOR = 128  # entries


class Pool:
    """An array whose selected axes are each split into a short outer and an inner part.

    Counts over the inner parts stay local to a device, as long as the number of devices along an axis divides its outer
    part. Then only one sum of few numbers crosses devices. Partial counts fit in 32 bits.
    """

    def __init__(self, x: jax.Array, axis: tuple[int, ...]):
        self.original_shape = x.shape
        self.size = size = math.prod(x.shape[a] for a in axis)
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
        # The outer axes of each part: the reduction removed the inner axes. The stack added one in front.
        outer = [i - sum(j < i for j in self.inner) for i in self.outer]
        if self.size < 2**32:
            lo = jnp.sum(parts, tuple(a + 1 for a in outer), dtype=jnp.uint32)
            hi = jnp.zeros_like(lo)
        else:
            hi, lo = total(parts, [a + 1 for a in outer])
        return [Count(hi[i].reshape(self.count_shape), lo[i].reshape(self.count_shape)) for i in range(len(masks))]

    def first(self, mask: Callable[[], jax.Array], n: Count) -> jax.Array:
        """True at the entries before the (n + 1)-th true entry of a mask; everywhere if it has at most n."""
        runs = self._runs()

        def at(a, digit):
            return self._index(a) == digit

        def matching(found):
            """The true entries whose leading indices are `found`."""
            entries = mask()
            for run, flat in zip(runs, found, strict=False):
                entries = functools.reduce(operator.and_, map(at, run, self._digits(run, flat)), entries)
            return entries

        def count_below(run, found, thresholds):
            return self.count([matching(found) & self._before(run, t) for t in thresholds])

        def search(_):
            """The flat indices of the (n + 1)-th entry, one run of axes at a time, the most significant first."""
            found, left = (), n
            for run in runs:
                n_bits = math.prod(self.x.shape[a] for a in run).bit_length()
                below = functools.partial(count_below, run, found)
                flat, passed = largest_threshold(jnp.dtype(jnp.uint32), n_bits, below, left)
                found, left = (*found, flat), left - passed
            return found

        origin = (jnp.zeros_like(n.lo),) * len(runs)
        found = apply_if(jnp.any(n.positive), search, origin)
        before = jnp.zeros((), bool)
        for run, flat in reversed(list(zip(runs, found, strict=True))):
            before = self._before(run, flat, before)
        return before

    def _before(self, run: tuple[int, ...], flat: jax.Array, otherwise: jax.Array | bool = False) -> jax.Array:
        """Whether the flat index along the axes of a run is below `flat`; `otherwise` where it equals it.

        Compares axis by axis: XLA would compute the flat index of each entry outside the loop, and store it.
        """
        before = jnp.asarray(otherwise)
        for a, digit in reversed(list(zip(run, self._digits(run, flat), strict=True))):
            before = (self._index(a) < digit) | ((self._index(a) == digit) & before)
        return before

    def _digits(self, run: tuple[int, ...], flat: jax.Array) -> list[jax.Array]:
        """The index along each axis of a run of the entry at a flat index."""
        digits = []
        for a in reversed(run[1:]):
            n = jnp.uint32(max(self.x.shape[a], 1))
            flat, digit = flat // n, flat % n
            digits.append(digit)
        return [*([flat] if run else []), *reversed(digits)]

    def _index(self, a: int) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.uint32, self.x.shape, a)

    def _runs(self) -> list[tuple[int, ...]]:
        """The selected axes in runs whose flat indices fit in 32 bits: one run, unless the array is huge."""
        runs: list[tuple[int, ...]] = [()]
        size = 1
        for a in (a for a in sorted(self.outer + self.inner) if self.x.shape[a] != 1):
            if size * self.x.shape[a] >= 2**32:
                runs, size = [*runs, ()], 1
            runs[-1] += (a,)
            size *= self.x.shape[a]
        return runs


def largest_threshold(dtype: jnp.dtype, bits: int, below: Callable[[list[jax.Array]], list[Count]], most: Count):
    """(t, below(t)) for the largest t of `bits` bits with below(t) <= most, found digit by digit."""
    n_digits = -(-bits // _DIGIT)

    def step(i, state):
        t, n_below = state
        shift = jnp.asarray(_DIGIT * (n_digits - 1 - i), dtype)
        candidates = [t | dtype.type(d) << shift for d in range(1, 2**_DIGIT)]
        for candidate, n in zip(candidates, below(candidates), strict=True):
            t, n_below = jnp.where(n <= most, candidate, t), select(n <= most, n, n_below)
        return t, n_below

    start = jnp.zeros_like(most.lo, dtype), Count(jnp.zeros_like(most.hi), jnp.zeros_like(most.lo))
    return jax.lax.fori_loop(0, n_digits, step, start)
