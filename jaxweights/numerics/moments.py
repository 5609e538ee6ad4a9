"""Mean, variance and count of activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype

Stats = tuple[jax.Array, jax.Array, jax.Array]
"""(mean, biased variance, count), arrays of one shape."""


def moments(
    x: jax.Array, axis: Sequence[int], *, where: jax.Array | None = None, axis_name=None, centered: bool = True
) -> Stats:
    """Mean, biased variance and count over `axis`, in float32 or wider, in two passes, or three with a mask.

    μ = Σx/n and σ² = Σ(x − μ)²/n over the entries where `where` is true; μ = 0 unless `centered`. Reduced axes are kept
    with size 1. With `axis_name`, the sums run over all devices, as for one large batch. If no entry counts, the count
    and both moments are 0. Masked-out entries may be NaN. A variance beyond the range of float32 is infinite.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    if where is not None:
        x = jnp.where(where, x, 0)
    count = count_entries(x, axis, where, axis_name)

    def average(y):
        return average_entries(y, axis, where, axis_name, count)

    mean = average_entries(x, axis, None, axis_name, count) if centered else None
    if mean is not None and where is not None:
        # A masked sum is less accurate: add the mean of the residuals. In exact arithmetic it and its gradient are 0.
        mean = mean + jax.lax.stop_gradient(average(x - materialize(mean)))
    # Written so, XLA on CPUs fuses the subtraction into the sum. Otherwise it first stores x − μ or the broadcast μ.
    var = average(jnp.square(x if mean is None else materialize(mean) - x))
    return jnp.zeros_like(var) if mean is None else mean, var, jnp.full_like(var, count)


def count_entries(x: jax.Array, axis: Sequence[int], where: jax.Array | None, axis_name) -> int | jax.Array:
    """Counts the entries over `axis` and all devices: a Python number, or an array if a mask selects them."""
    if where is None:
        count = math.prod(x.shape[a] for a in axis)
    else:
        where = jnp.broadcast_to(where, x.shape)
        count = jnp.sum(where, tuple(axis), keepdims=True, dtype=jnp.int32).astype(accumulation_dtype(x.dtype))
    return count if axis_name is None else jax.lax.psum(count, axis_name)


def average_entries(
    y: jax.Array, axis: Sequence[int], where: jax.Array | None, axis_name, count: int | jax.Array
) -> jax.Array:
    """The mean over `axis` and all devices of the `count` entries that `where` selects; 0 if it selects none."""
    total = _sum(y if where is None else jnp.where(where, y, 0), axis)
    if axis_name is not None:
        total = jax.lax.psum(total, axis_name)
    return total / jnp.maximum(jnp.asarray(count, total.dtype), 1)


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


def materialize(x: jax.Array) -> jax.Array:
    """Stores `x` on CPUs: XLA fuses it neither with its inputs nor with its consumers."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
