"""Sums over the groups of a weight, in one pass over blocks of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxweights.numerics.batching import apply_if
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.techniques.weight_sharing.importance import Importance

T = TypeVar("T")

_BLOCK = 2**14  # entries: larger blocks leave the caches of CPUs
_SHARDS = 192  # a mesh axis of a size that divides it leaves blocks whole


def over_blocks(f: Callable[..., T], carry: T, *arrays: jax.Array, block: int = _BLOCK) -> T:
    """Runs carry = f(carry, *blocks) over blocks of arrays of one shape, without a copy of them.

    On a mesh the longest axis is split into (part, rest), and a block is a range of `rest`: each device reads its own
    part of each block, and only what `f` sums crosses devices.
    """
    on_mesh = not jax.typeof(arrays[0]).sharding.mesh.empty
    if not on_mesh or arrays[0].ndim == 0:
        arrays = tuple(a.ravel() for a in arrays)
    shape = arrays[0].shape
    axis = max(range(len(shape)), key=shape.__getitem__)
    parts = math.gcd(shape[axis], _SHARDS) if on_mesh else 1
    size, length, axis = math.prod(shape), shape[axis] // max(parts, 1), axis + 1
    arrays = tuple(a.reshape(*shape[: axis - 1], parts, length, *shape[axis:]) for a in arrays)
    width = max(min(block * length // max(size, 1), length), 1)

    def step(i, carry):
        return f(carry, *(jax.lax.dynamic_slice_in_dim(a, i * width, width, axis) for a in arrays))

    n = length // width
    carry = jax.lax.fori_loop(0, n, step, carry) if n > 1 else carry
    rest = (jax.lax.slice_in_dim(a, n * width if n > 1 else 0, length, axis=axis) for a in arrays)
    return carry if n > 1 and n * width == length else f(carry, *rest)


def group_means(
    x: jax.Array,
    index: jax.Array | Callable[[jax.Array], jax.Array],
    n: int,
    importance: Importance | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(mean, size) of each of `n` groups. An empty group has mean 0, and no group takes the positions of −1.

    `index` holds the group of each position, or is a function that finds it for a block of `x`. With `importance`,
    means are weighted by it, and the size is its sum.

    Sums what the members of a group deviate from the mean of the first of them, so that a long sum rounds little off
    and the mean of equal members is their value, bit for bit. The sum over blocks has a second float for what it rounds
    off. Terms are scaled so that it does not overflow.
    """
    dtype = accumulation_dtype(x.dtype)
    scale = dtype.type(2.0 ** math.ceil(math.log2(2 * max(x.size, 1))))

    def add(carry, x, *given):
        centre, total, lost, size = carry
        group = inside(index(x) if callable(index) else given[0], n)
        x = x.astype(dtype) / scale
        counts = jnp.ones_like(x) if importance is None else importance.relative(given[-1]).astype(dtype)

        def sums(centre):
            terms = jnp.stack([counts * (x - centre.at[group].get(mode="clip")), counts], -1)
            return jnp.moveaxis(jnp.zeros((n, 2), dtype).at[group].add(terms, mode="drop"), -1, 0)

        def recentre(state):
            centre, (rough, members) = state
            centre = jnp.where(appears, rough / _or_one(members), centre)
            return centre, sums(centre)

        first = sums(centre)
        appears = (size == 0) & (first[1] > 0)
        centre, (more, members) = apply_if(jnp.any(appears), recentre, (centre, first))
        total, error = two_sum(total, more)
        return centre, total, lost + error, size + members.astype(size.dtype)

    zeros = jnp.zeros(n, dtype)
    carry = zeros, zeros, zeros, jnp.zeros(n, jnp.int32 if importance is None else dtype)
    arrays = [x] + ([] if callable(index) else [index]) + ([] if importance is None else [importance.values])
    centre, total, lost, size = over_blocks(add, carry, *arrays, block=max(_BLOCK, 16 * n))

    def mean(_):
        return (centre + (total + lost) / _or_one(size).astype(dtype)) * scale

    # In a loop, since XLA on CPUs computes it at every position that looks it up otherwise.
    return apply_if(jnp.any(size > 0), mean, zeros), size


def _or_one(size: jax.Array) -> jax.Array:
    """The size, or 1 for a group without members: to divide by."""
    return jnp.where(size > 0, size, jnp.ones_like(size))


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b, and what it rounds off."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def average(w: jax.Array, index: jax.Array, n: int) -> jax.Array:
    """The mean of its group at each position, and 0 where the index is −1. In the dtype of `w`."""
    return _averaged(w, index, n)[0]


@average.defjvp
def _average_jvp(n, primals, tangents):
    """The tangent as a scatter and a gather, whose transposes are a gather and a scatter."""
    w, index = primals
    out, size = _averaged(w, index, n)
    tangent = tangents[0].astype(accumulation_dtype(w.dtype))
    total = jnp.zeros(n, tangent.dtype).at[inside(index, n)].add(tangent, mode="drop")
    mean = total / jnp.maximum(size, 1).astype(tangent.dtype)
    return out, mean.at[inside(index, n)].get(mode="fill", fill_value=0).astype(w.dtype)


def _averaged(w: jax.Array, index: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    mean, size = group_means(w, index, n)
    return mean.astype(w.dtype).at[inside(index, n)].get(mode="fill", fill_value=0), size


def inside(index: jax.Array, n: int) -> jax.Array:
    """The index as int32, with n for −1: JAX compares an index with n in its own dtype, and reads −1 as n − 1."""
    index = index.astype(jnp.int32)
    return jnp.where(index < 0, n, index)
