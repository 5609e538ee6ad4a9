"""Operations on float16 and bfloat16 that XLA on CPUs would do in float32, with a rounding after each."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def where(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.where` of arrays of one dtype, without a conversion.

    XLA on CPUs (jaxlib 0.10) selects between 16-bit floats in float32, and rounding costs more than the rest. Here it
    selects between their bits.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    return _select(condition, x, y) if x.dtype.itemsize == 2 else jnp.where(condition, x, y)


@jax.custom_jvp
def _select(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    bits = (jax.lax.bitcast_convert_type(a, jnp.uint16) for a in (x, y))
    return jax.lax.bitcast_convert_type(jnp.where(condition, *bits), x.dtype)


@_select.defjvp
def _(primals, tangents):
    condition, x, y = primals
    _, dx, dy = tangents
    return where(condition, x, y), jnp.where(condition, dx, dy)


def narrow(x: jax.Array, dtype) -> jax.Array:
    """`x.astype(dtype)` of a float32 array whose values are those of `dtype`.

    They need no rounding: a bfloat16 is the upper half of a float32.
    """
    if x.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return x.astype(dtype)
    upper = jax.lax.bitcast_convert_type(x, jnp.uint32) >> jnp.uint32(16)
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
