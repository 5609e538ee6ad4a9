"""Activations standardised by their mean and variance: what all norms share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.numerics import wide


def inverse_deviation(var: jax.Array, eps) -> jax.Array:
    """1/√(var + eps), and 0 where that is 1/0: a constant feature without ε is only centred."""
    square = var + jnp.asarray(eps, var.dtype)
    return jnp.where(square == 0, 0, jax.lax.rsqrt(jnp.where(square == 0, 1, square)))


def standardize(x, mean, var, scale, bias, eps) -> jax.Array:
    """(x − mean)/√(var + eps)·scale + bias in float32 or wider, in the dtype of `x`."""
    dtype = wide(x.dtype)
    factor = inverse_deviation(var.astype(dtype), eps)
    if scale is not None:
        factor = factor * scale.astype(dtype)
    y = (x.astype(dtype) - mean.astype(dtype)) * factor
    if bias is not None:
        y = y + bias.astype(dtype)
    return y.astype(x.dtype)
