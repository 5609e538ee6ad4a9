"""The straight-through estimator."""

from __future__ import annotations

import jax


@jax.custom_jvp
def straight_through(x: jax.Array, y: jax.Array) -> jax.Array:
    """The straight-through estimator: returns `y` with the gradient of `x`.

    Unlike x + stop_gradient(y − x), the value is `y` bit for bit.
    """
    return y


@straight_through.defjvp
def _(primals, tangents):
    (_, y), (dx, _) = primals, tangents
    return y, dx.astype(y.dtype)
