"""Batches of arrays that are alike; loops and conditionals that stay so under `vmap`."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


def map_matrices(f: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Maps f over the matrices of arrays of shape (*batch, rows, columns), one at a time, even under `vmap`.

    For matrix decompositions. On CPUs, a batched decomposition blocks one of XLA's threads while it waits for work that
    it hands to the same thread pool. As many of them at once as there are threads deadlock (jaxlib 0.10.2).
    """
    f = jax.custom_batching.sequential_vmap(f)
    for _ in arrays[0].shape[:-2]:
        f = jax.vmap(f)
    return f(*arrays)


def apply_if(needed: jax.Array, f: Callable[[Any], Any], x: Any) -> Any:
    """f(x) if `needed`, else x, as a while loop of at most one iteration.

    A `cond` batched by `vmap` always runs both branches. This loop runs f only if some element of the batch needs it.
    """

    def keep_sharding(new, old):
        sharding = jax.typeof(old).sharding
        free = sharding.mesh.empty or jax.typeof(new).sharding == sharding
        return new if free else jax.sharding.reshard(new, sharding)

    def is_needed(state):
        needed, _ = state
        return needed

    def run_once(state):
        _, x = state
        return jnp.zeros_like(needed), jax.tree.map(keep_sharding, f(x), x)

    _, x = jax.lax.while_loop(is_needed, run_once, (needed, x))
    return x


def grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """The positions of each key, in the order in which keys first occur.

    >>> grouped("abac")
    [[0, 2], [1], [3]]
    """
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def likeness(path: str, *arrays: jax.Array) -> Hashable:
    """Equal for weights to compute on in one batch: of one shape, dtype and sharding, at paths that differ in numbers.

    The paths matter for shardings that a jitted function cannot see: the layers of a model are sharded alike, but its
    query and its output projection are not, and stacking these would move weights between devices.
    """
    return re.sub(r"\d+", "#", path), tuple((a.shape, a.dtype, _sharding(a)) for a in arrays)


def _sharding(a: jax.Array) -> jax.sharding.Sharding | None:
    """The sharding of an array; under jit, what its type has of it. None for NumPy arrays."""
    return jax.typeof(a).sharding if isinstance(a, Tracer) else getattr(a, "sharding", None)


def unstacked(a: jax.Array) -> list[jax.Array]:
    """The entries of an array along its first axis."""
    return [jax.lax.squeeze(part, [0]) for part in jax.lax.split(a, [1] * len(a))]
