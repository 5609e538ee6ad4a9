"""Weight decay: a term of the gradient that pulls weights towards zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.checks import check_scalar, check_weight
from jaxweights.numerics import wide
from jaxweights.transform import Number


def weight_decay(grad: jax.Array, w: jax.Array, rate: Number) -> jax.Array:
    """Adds the gradient of (rate/2)·‖w‖² to a gradient.

    g' = g + rate·w, so that w ← w − η·g' is stochastic gradient descent with weight decay.

    Args:
      grad: float array, the gradient (or update) of `w`.
      w: float array of the same shape.
      rate: the decay λ >= 0, a number or a scalar array.

    Returns:
      Array of the shape and dtype of `grad`, computed in float32 or wider.

    Raises:
      TypeError: `grad` or `w` is not a float array, or `rate` not a number.
      ValueError: the shapes differ, or `rate` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(weight_decay(jnp.array([1.0, 0.0]), jnp.array([2.0, -4.0]), 0.25))
    [ 1.5 -1. ]

    References: Krogh and Hertz, A Simple Weight Decay Can Improve Generalization, NeurIPS 1991.
    """
    grad, w = check_weight(grad, "grad"), check_weight(w)
    check_scalar("rate", rate, 0)
    if grad.shape != w.shape:
        raise ValueError(f"grad has shape {grad.shape} and w {w.shape}: pass the gradient of this weight")
    dtype = max(wide(grad.dtype), wide(w.dtype), key=lambda d: d.itemsize)
    return (grad.astype(dtype) + jnp.asarray(rate, dtype) * w.astype(dtype)).astype(grad.dtype)
