"""Mean, variance and count of activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype

Stats = tuple[jax.Array, jax.Array, jax.Array]
"""(mean, biased variance, count), arrays of one shape."""

DeviceSum = Callable[[jax.Array], jax.Array]
"""Sums an array over devices."""


class Moments(NamedTuple):
    """Mean, biased variance and count, with the mean as two floats, μ = shift + rest; None if it is taken as 0.

    One float32 holds a mean of 10,000 to 5e-4, which is lost from (x − μ)/σ. As (x − shift) − rest it is not.
    """

    shift: jax.Array | None
    rest: jax.Array | None
    var: jax.Array
    n: jax.Array

    def stats(self) -> Stats:
        """(μ, σ², n), with the mean rounded to one float."""
        mean = jnp.zeros_like(self.var) if self.shift is None or self.rest is None else self.shift + self.rest
        return mean, self.var, self.n


def moments(
    x: jax.Array, axis: Sequence[int], *, where: jax.Array | None = None, device_sum: DeviceSum | None = None
) -> Stats:
    """Mean, biased variance and count over `axis`: `split_moments` with the mean rounded to one float."""
    return split_moments(x, axis, where=where, device_sum=device_sum).stats()


def split_moments(
    x: jax.Array,
    axis: Sequence[int],
    *,
    where: jax.Array | None = None,
    device_sum: DeviceSum | None = None,
    centered: bool = True,
) -> Moments:
    """Mean as two floats, biased variance and count over `axis`, in float32 or wider.

    μ = m + r with r = Σ(x − m)/n, and σ² = Σ(x − m)²/n − r², over the entries where `where` is true; μ = 0 unless
    `centered`. m is the mean of one entry of 32, so r² <= 31σ² and little cancels; with a mask, m is that of all.
    Reduced axes are kept with size 1. With `device_sum`, the sums run over all devices, as for one large batch. If no
    entry counts, the count and both moments are 0. Masked-out entries may be NaN. The variance is infinite beyond the
    range of float32.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    if where is not None:
        x = jnp.where(where, x, 0)
    count = count_entries(x, axis, where, device_sum)

    def average(y):
        return average_entries(y, axis, where, device_sum, count)

    if not centered:
        var = average(jnp.square(x))
        return Moments(None, None, var, _like(count, var))
    if where is None:
        part = _thin_out(x, axis)
        shift = average_entries(part, axis, None, device_sum, count_entries(part, axis, None, device_sum))
    else:
        shift = average_entries(x, axis, None, device_sum, count)
    # The mean and the variance, and so their gradients, do not depend on m. It loses three bits, so that it is the same
    # number in every loop: XLA computes it again in each, and there would fuse the product with 1/n into x − m.
    info = jnp.finfo(x.dtype)
    shift = jax.lax.reduce_precision(jax.lax.stop_gradient(shift), info.nexp, info.nmant - 3)
    if len(_adjacent_runs(axis)) > 1:
        again = materialize(shift - x)
        rest = -average(again)
    else:
        # XLA on CPUs fuses the subtraction of a stored array into a sum over adjacent axes. The second barrier makes
        # it subtract twice: it would store m − x if both sums shared it.
        first = materialize(shift)
        rest = -average(first - x)
        second, _ = materialize((first, rest))
        again = second - x
    var = subtract_square(average(jnp.square(again)), rest)
    return Moments(shift, rest, var, _like(count, var))


def subtract_square(square: jax.Array, rest: jax.Array) -> jax.Array:
    """σ² = Σ(x − m)²/n − r², without inf − inf."""
    return jnp.maximum(square - jnp.minimum(jnp.square(rest), jnp.finfo(rest.dtype).max), 0)


def count_entries(
    x: jax.Array, axis: Sequence[int], where: jax.Array | None, device_sum: DeviceSum | None
) -> int | jax.Array:
    """Counts the entries over `axis` and all devices: a Python number, or an array if a mask selects them."""
    if where is None:
        count = math.prod(x.shape[a] for a in axis)
    else:
        where = jnp.broadcast_to(where, x.shape)
        count = jnp.sum(where, tuple(axis), keepdims=True, dtype=jnp.int32).astype(accumulation_dtype(x.dtype))
    return count if device_sum is None else device_sum(jnp.asarray(count, accumulation_dtype(x.dtype)))


def average_entries(
    y: jax.Array, axis: Sequence[int], where: jax.Array | None, device_sum: DeviceSum | None, count: int | jax.Array
) -> jax.Array:
    """The mean over `axis` and all devices of the `count` entries that `where` selects; 0 if it selects none."""
    total = _sum(y if where is None else jnp.where(where, y, 0), axis)
    if device_sum is not None:
        total = device_sum(total)
    return total / jnp.maximum(jnp.asarray(count, total.dtype), 1)


def _like(count: int | jax.Array, var: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(count, var.dtype), var.shape)


def _thin_out(x: jax.Array, axis: Sequence[int]) -> jax.Array:
    """One entry of 32 along the longest of the reduced axes that no mesh axis is known to split.

    Every 32nd, so that each device has its share; the first ones along the last axis, which is contiguous in memory.
    """
    spec = jax.typeof(x).sharding.spec
    whole = [a for a in axis if a >= len(spec) or spec[a] is None]
    if not whole:
        return x
    longest = max(whole, key=lambda a: x.shape[a])
    n = x.shape[longest]
    last = longest == x.ndim - 1
    return jax.lax.slice_in_dim(x, 0, -(-n // 32) if last else n, 1 if last else 32, longest)


def _sum(y: jax.Array, axis: Sequence[int]) -> jax.Array:
    """Σy over `axis`, one run of adjacent axes at a time: XLA on CPUs sums over separated axes entry by entry."""
    for i, run in enumerate(_adjacent_runs(axis)):
        y = jnp.sum(materialize(y) if i else y, run, keepdims=True)
    return y


def _adjacent_runs(axis: Sequence[int]) -> list[tuple[int, ...]]:
    """Splits axes into runs of adjacent ones: (0, 1, 3) into [(0, 1), (3,)]."""
    runs: list[tuple[int, ...]] = []
    for a in sorted(axis):
        if runs and a == runs[-1][-1] + 1:
            runs[-1] += (a,)
        else:
            runs.append((a,))
    return runs


def materialize(x):
    """Stores the arrays `x` on CPUs: XLA fuses them neither with their inputs nor with their consumers."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
