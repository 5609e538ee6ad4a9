"""A function of each row of a matrix, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_ENTRIES = 2**13
"""Of the rows that are worked on at a time."""


def over_rows(f: Callable[..., Any], rows: jax.Array, *others: jax.Array | None) -> Any:
    """f(row, *rows of others) of each row, with memory for some of them at a time. An array of `others` may be None.

    On a mesh, each device works on its own rows.
    """
    n, length = rows.shape
    on_mesh = not jax.typeof(rows).sharding.mesh.empty
    at_once = math.gcd(n, 192) if on_mesh else min(max(_ENTRIES // max(length, 1), 1), n)  # 192: see groups.py
    steps = -(-n // at_once)

    def split(a):
        if on_mesh:  # the first axis is the one that is split over devices
            return a.reshape(at_once, steps, -1).swapaxes(0, 1)
        padded = jnp.pad(a, ((0, steps * at_once - n), (0, 0)), mode="edge") if n % at_once else a
        return padded.reshape(steps, at_once, -1)

    def join(a):
        a = a.swapaxes(0, 1) if on_mesh else a
        return a.reshape(at_once * steps, *a.shape[2:])[:n]

    out = jax.lax.map(lambda given: jax.vmap(f)(*given), jax.tree.map(split, (rows, *others)))
    return jax.tree.map(join, out)
