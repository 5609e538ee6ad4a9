"""Sequential loops and conditionals that stay sequential and conditional under `vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
        return new if jax.typeof(new).sharding == sharding else jax.sharding.reshard(new, sharding)

    def is_needed(state):
        needed, _ = state
        return needed

    def run_once(state):
        _, x = state
        return jnp.zeros_like(needed), jax.tree.map(keep_sharding, f(x), x)

    _, x = jax.lax.while_loop(is_needed, run_once, (needed, x))
    return x
