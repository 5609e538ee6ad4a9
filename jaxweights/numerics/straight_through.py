"""The straight-through estimator."""

from __future__ import annotations

import jax


@jax.custom_jvp
def straight_through(x: jax.Array, y: jax.Array) -> jax.Array:
    """`y`, with the gradient of `x`: the straight-through estimator.

    Unlike x + stop_gradient(y - x) the value is `y` bit for bit.
    """
    return y


@straight_through.defjvp
def _(primals, tangents):
    return primals[1], tangents[0].astype(primals[1].dtype)
