"""Sums over devices, or over groups of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.numerics.moments import DeviceSum


def device_sum(axis_name, axis_index_groups: Sequence[Sequence[int]] | None = None) -> DeviceSum | None:
    """`jax.lax.psum` over the mapped axis (or axes) `axis_name`, within groups of its indices; None without a name.

    Groups may differ in size. `jax.lax.psum` supports groups neither in `jax.vmap` nor in a `jax.shard_map` that checks
    which values vary, so every group is summed in a row of its own. A norm sums few numbers.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(f"axis_index_groups={axis_index_groups!r} groups the indices of axis_name: give axis_name")
        return None
    if axis_index_groups is None:
        return functools.partial(jax.lax.psum, axis_name=axis_name)
    group_of = _group_of(axis_index_groups, jax.lax.psum(1, axis_name))

    def sum_of_group(x: jax.Array) -> jax.Array:
        own = jnp.asarray(group_of)[jax.lax.axis_index(axis_name)]
        rows = jnp.arange(len(axis_index_groups)).reshape(-1, *(1 for _ in x.shape))
        totals = jax.lax.psum(jnp.where(rows == own, x[None], 0), axis_name)
        return jax.lax.dynamic_index_in_dim(totals, own, keepdims=False)

    return sum_of_group


def _group_of(groups: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """The group of each index of a mapped axis, or an error unless the groups divide the indices among them."""
    try:
        members = [int(i) for group in groups for i in group]
    except TypeError as e:
        raise TypeError(f"axis_index_groups must be lists of indices, got {groups!r}: write [[0, 1], [2, 3]]") from e
    if sorted(members) != list(range(size)):
        raise ValueError(
            f"axis_index_groups must name each index of the mapped axis once, from 0 to {size - 1}, got {groups!r}"
        )
    return np.array([next(g for g, group in enumerate(groups) if i in group) for i in range(size)])
