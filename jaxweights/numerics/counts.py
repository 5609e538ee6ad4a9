"""Exact counts beyond 2³² in two 32-bit limbs, since JAX has no 64-bit integers by default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Count(NamedTuple):
    """The integer hi·2³² + lo, or an array of such integers, as two uint32 arrays.

    The arithmetic works for unsigned limbs of any width.
    """

    hi: jax.Array
    lo: jax.Array

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        lo = self.lo + other.lo
        return Count(self.hi + other.hi + (lo < self.lo).astype(lo.dtype), lo)

    def __sub__(self, other: Count) -> Count:
        """The difference; `other` must not be larger."""
        borrow = (self.lo < other.lo).astype(self.lo.dtype)
        return Count(self.hi - other.hi - borrow, self.lo - other.lo)

    def __le__(self, other: Count) -> jax.Array:  # type: ignore[override]
        return (self.hi < other.hi) | ((self.hi == other.hi) & (self.lo <= other.lo))

    @property
    def positive(self) -> jax.Array:
        """True where the count is above 0."""
        return (self.hi | self.lo) > 0


def count(n: int | jax.Array | Count) -> Count:
    """Converts a Python integer of any size or an integer array to a `Count`. Negative integers become 0."""
    if isinstance(n, Count):
        return n
    if isinstance(n, int):
        n = max(n, 0)
        return Count(jnp.uint32(n >> 32), jnp.uint32(n & 0xFFFFFFFF))
    lo = jnp.maximum(n, 0).astype(jnp.uint32)
    return Count(jnp.zeros_like(lo), lo)


def smaller(a: Count, b: Count) -> Count:
    """The elementwise minimum of two counts."""
    return select(a <= b, a, b)


def select(condition: jax.Array, a: Count, b: Count) -> Count:
    """`a` where the condition holds, `b` elsewhere."""
    return Count(jnp.where(condition, a.hi, b.hi), jnp.where(condition, a.lo, b.lo))


def total(parts: jax.Array, axis: Sequence[int]) -> Count:
    """Sums unsigned integers over axes of at most 2¹⁶ entries in all (for 32 bits), in limbs of their own width."""
    half = jnp.iinfo(parts.dtype).bits // 2
    if (n := math.prod(parts.shape[a] for a in axis)) > 2**half:
        raise ValueError(f"{n} partial counts do not fit two limbs: sum at most {2**half} at once")
    halves = jnp.stack([parts & parts.dtype.type(2**half - 1), parts >> half])
    low, high = jnp.sum(halves, tuple(a % parts.ndim + 1 for a in axis), dtype=parts.dtype)
    return Count(high >> half, high << half) + Count(jnp.zeros_like(low), low)


def fraction_of(fraction: float | jax.Array, n: int) -> Count:
    """round(fraction·n) with halves rounded up, for n < 2⁴⁸ entries.

    A Python `fraction` is used in float64. A traced one is converted to float32, clipped to [0, 1] and rounded to a
    multiple of 2⁻²⁴; the rest is integer arithmetic.
    """
    if isinstance(fraction, int | float):
        return count(round_half_up(fraction, n))
    a = jnp.round(jnp.clip(jnp.asarray(fraction, jnp.float32), 0, 1) * 2**24).astype(jnp.uint32)
    d = _product([a & 0xFFFF, a >> 16], [jnp.uint32(n >> s & 0xFFFF) for s in (0, 16, 32)], half=2**23)
    return Count(d[3] >> 8 | d[4] << 8, d[1] >> 8 | d[2] << 8 | d[3] << 24)


def round_half_up(fraction: float | jax.Array, n: int) -> int | jax.Array:
    """`fraction_of` as an integer: a Python int for a Python `fraction`, else int32, for at most 2³¹ − 1 entries."""
    if isinstance(fraction, int | float):
        return math.floor(fraction * n + 0.5)
    if n >= 2**31:
        raise ValueError(f"a traced fraction of {n} entries does not fit 32-bit counts: pass a Python float")
    return fraction_of(fraction, n).lo.astype(jnp.int32)


def scaled(n: Count, ratio: jax.Array) -> Count:
    """round(n·ratio/2³²) with halves rounded up."""
    digits = [limb >> s & 0xFFFF for limb in (n.lo, n.hi) for s in (0, 16)]
    d = _product(digits, [ratio & 0xFFFF, ratio >> 16], half=2**31)
    return Count(d[4] | d[5] << 16, d[2] | d[3] << 16)


def _product(a: Sequence[jax.Array], b: Sequence[jax.Array], half: int) -> list[jax.Array]:
    """a·b + half, with a, b and the result in 16-bit digits, least significant first."""
    columns = [jnp.uint32(half >> 16 * i & 0xFFFF) for i in range(len(a) + len(b))]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            columns[i + j] += x * y & 0xFFFF
            columns[i + j + 1] += x * y >> 16
    for i in range(1, len(columns)):
        columns[i] += columns[i - 1] >> 16
    return [c & 0xFFFF for c in columns]
