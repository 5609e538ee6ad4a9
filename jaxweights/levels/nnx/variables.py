"""The learned scale and bias that the NNX norms share, each of which may be absent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def scale_and_bias(shape: tuple[int, ...], use_scale: bool, use_bias: bool):
    """Creates a learned scale and bias, initially 1 and 0; None, as data, for one that is not used."""
    scale = nnx.Param(jnp.ones(shape)) if use_scale else nnx.data(None)
    bias = nnx.Param(jnp.zeros(shape)) if use_bias else nnx.data(None)
    return scale, bias


def value(variable: nnx.Variable | None) -> jax.Array | None:
    """The array of a parameter, or None if the module has none."""
    return None if variable is None else variable[...]
