"""The min-max formula: weights rounded to equally spaced values from the least to the greatest."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide


def min_max(w: jax.Array, bits, over: tuple[int, ...], ends: Mapping[str, jax.Array] | None) -> jax.Array:
    """The weight rounded to 2^bits values from its minimum to its maximum over some axes, or between given ends."""
    x = w.astype(accumulation_dtype(w.dtype))
    levels = jnp.asarray((1 << bits) - 1, x.dtype) if isinstance(bits, jax.Array) else 2**bits - 1
    if ends is None:
        low, high = jnp.min(x, over, keepdims=True), jnp.max(x, over, keepdims=True)
    else:
        low, high = ends["low"].astype(x.dtype), ends["high"].astype(x.dtype)
    unit = jnp.where(jnp.maximum(-low, high) > 1, 1 / 16, 1).astype(x.dtype)  # else the range or 1/range may overflow
    span = high * unit - low * unit
    code = jnp.clip(jnp.round(safe_divide(x * unit - low * unit, span) * levels), 0, levels)
    rounded = jnp.where(code == levels, high, (low * unit + code / levels * span) / unit)  # the maximum exactly
    return jnp.where(high == low, jnp.clip(x, low, high), rounded).astype(w.dtype)
