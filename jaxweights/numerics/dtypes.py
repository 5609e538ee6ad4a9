"""The dtype in which sums accumulate."""

from __future__ import annotations

import jax.numpy as jnp


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype to accumulate in: `dtype`, or float32 if that is wider."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)
