"""Updates and sums with controlled rounding: exact, or towards a given side."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype


def round_to(dtype, x: jax.Array) -> jax.Array:
    """Rounds `x` to the values of `dtype`, but keeps it in float32 or wider.

    XLA may skip the rounding of `x.astype(dtype)` (`xla_allow_excess_precision`) in one place and not in another.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    narrow, info = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if narrow.bits >= info.bits:
        return x
    rounded = jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)
    if narrow.nexp == info.nexp:
        return rounded
    # reduce_precision flushes subnormal values to 0, and float16 has many. They are evenly spaced.
    spacing = float(narrow.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(narrow.tiny), jnp.round(x / spacing) * spacing, rounded)


def exact_sum(p: jax.Array, d: jax.Array) -> jax.Array:
    """p + d in float32 or wider, with the value that `optax.apply_updates` stores in p's dtype."""
    return round_to(p.dtype, p.astype(accumulation_dtype(p.dtype)) + round_to(d.dtype, d))


def exact_delta(p: jax.Array, u: jax.Array, target: jax.Array, anchor: float | jax.Array = 0.0) -> jax.Array:
    """d such that p + d, rounded to p's dtype, is `target` or just short of it; `u` where p + u is `target`.

    target − p alone misses `target` in f32 and, if rounded to bf16, overshoots by a whole ulp. Here d is kept in
    float32 or wider. Where p + d lies beyond `target`, seen from `anchor`, d was rounded away from it, so the float
    before d is on the near side and, rounding being monotone, one step is enough. A target of 0 is hit exactly. So
    zeros stay zeros and, with an anchor of 0, |p + d| <= |target| bit for bit.
    """
    u, goal = round_to(u.dtype, u), target.astype(accumulation_dtype(p.dtype))
    d = jnp.where(exact_sum(p, u) == goal, u, goal - p.astype(goal.dtype))
    away, reached = goal - jnp.asarray(anchor, goal.dtype), exact_sum(p, d)
    beyond = jnp.where(away < 0, reached < goal, reached > goal) & (away != 0)
    # The next float towards the anchor: a float's bits count up with its magnitude.
    word = jnp.dtype(f"int{jnp.finfo(d.dtype).bits}")
    bits, sign = jax.lax.bitcast_convert_type(d, word), jax.lax.bitcast_convert_type(away, word)
    step = jnp.where(bits ^ sign < 0, word.type(1), word.type(-1))
    return jax.lax.bitcast_convert_type(bits + jnp.where(beyond, step, word.type(0)), d.dtype)


def sum_within(center: jax.Array, d: jax.Array, dtype) -> jax.Array:
    """s = center + d in `dtype`, rounded towards `center`: |s − center| <= |d|, as computed in the dtype of d.

    The result is meant to be stored and has no gradient.
    """
    center, d = jax.lax.stop_gradient((center, d))
    s = round_to(dtype, center + d)
    beyond = jnp.abs(s - center) > jnp.abs(d)
    return jnp.where(beyond, jnp.nextafter(s.astype(dtype), center.astype(dtype)), s.astype(dtype))
