"""Stored weights whose first row or column axis becomes a batch axis, so that JAX slices their arrays along it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading


def first_axis(axes: Axes, shape: Sequence[int]) -> tuple[Axes, bool] | None:
    """(axes with the first axis as one of a batch, whether it numbered rows and not columns); None if it cannot be one.

    It is then the outermost of the rows or of the columns, so that each slice is a run of them.
    """
    r = Reading.of(axes, shape)
    if r.groups > 1 or not shape or not shape[0] or (0,) not in (r.output[:1], r.contracted[:1]):
        return None
    left = (tuple(a for a in which if a != 0) for which in (r.input, r.output, r.window))
    input, output, window = left
    return Axes(input, output, (0, *sorted(r.batch)), window), r.output[:1] != (0,)


def split(a: jax.Array, n: int, axis: int) -> jax.Array:
    """An array with an axis, counted from the end, in n equal runs along a new first one; an axis of 1 is repeated."""
    axis += a.ndim
    if a.shape[axis] == 1:
        return jnp.broadcast_to(a, (n, *a.shape))
    return jnp.moveaxis(a.reshape(*a.shape[:axis], n, a.shape[axis] // n, *a.shape[axis + 1 :]), axis, 0)
