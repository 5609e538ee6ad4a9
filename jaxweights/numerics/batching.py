"""Loops and branches that stay what they are under `vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_matrices(f: Callable[..., Any], *arrays: jax.Array) -> Any:
    """f(*matrices) for the matrices of arrays of shape (*batch, rows, columns), one after the other, under vmap too.

    For the decompositions: on the CPU a batched one waits, in one of XLA's threads, for work that it gives to the same
    threads. As many of them at once as there are threads wait for ever (jaxlib 0.10.2).
    """
    f = jax.custom_batching.sequential_vmap(f)
    for _ in arrays[0].shape[:-2]:
        f = jax.vmap(f)
    return f(*arrays)


def apply_if(needed: jax.Array, f: Callable[[Any], Any], x: Any) -> Any:
    """f(x) if `needed`, else x: a loop of one turn at most.

    A `cond` that is batched by `vmap` always runs both of its branches. This runs f only if one of the batch needs it.
    """
    sharding = lambda a: jax.typeof(a).sharding
    like = lambda new, old: new if sharding(new) == sharding(old) else jax.sharding.reshard(new, sharding(old))
    turn = lambda state: (jnp.zeros_like(needed), jax.tree.map(like, f(state[1]), state[1]))
    return jax.lax.while_loop(lambda state: state[0], turn, (needed, x))[1]
