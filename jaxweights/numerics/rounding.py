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
    wide = _wide(p, d)
    return round_to(p.dtype, p.astype(wide) + round_to(d.dtype, d).astype(wide))


def _wide(p: jax.Array, d: jax.Array) -> jnp.dtype:
    """The dtype to add two arrays in: the wider one, or float32."""
    return max(accumulation_dtype(p.dtype), accumulation_dtype(d.dtype), key=lambda dtype: dtype.itemsize)


def exact_delta(p: jax.Array, u: jax.Array, target: jax.Array, anchor: float | jax.Array = 0.0) -> jax.Array:
    """d such that p + d, rounded to p's dtype, is `target` or just short of it; `u` where p + u is `target`.

    target − p alone misses `target` in f32 and, if rounded to bf16, overshoots by a whole ulp. Here d is kept in
    float32 or wider. Where p + d lies beyond `target`, seen from `anchor`, d was rounded away from it, so the float
    before d is on the near side and, rounding being monotone, one step is enough. A target of 0 is hit exactly. So
    zeros stay zeros and, with an anchor of 0, |p + d| <= |target| bit for bit.
    """
    wide = _wide(p, u)
    u, goal = round_to(u.dtype, u).astype(wide), target.astype(wide)
    met = exact_sum(p, u) == goal
    p = p.astype(wide)
    d = goal - p
    # Rounding this to p's dtype would change nothing below: it does not cross `target`, a value of that dtype.
    reached = p + d
    if isinstance(anchor, float) and anchor == 0:
        away, beyond = goal, jnp.abs(reached) > jnp.abs(goal)
    else:
        away = goal - jnp.asarray(anchor, wide)
        beyond = jnp.where(away < 0, reached < goal, reached > goal) & (away != 0)
    # The next float towards the anchor: a float's bits count up with its magnitude.
    word = jnp.dtype(f"int{jnp.finfo(wide).bits}")
    bits, sign = jax.lax.bitcast_convert_type(d, word), jax.lax.bitcast_convert_type(away, word)
    outwards = (bits ^ sign) >> (8 * word.itemsize - 1) | 1  # 1, or -1 if the signs differ
    return jnp.where(met, u, jnp.where(beyond, jax.lax.bitcast_convert_type(bits - outwards, wide), d))


def stochastic_delta(key: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
    """d such that p + d is p + u rounded stochastically to p's dtype, of 16 bits: E[p + d] = p + u. In float32.

    n, the value nearest to p + u, moves one step of the size s towards p + u with probability |r|/s, r = (p − n) + u.
    Unlike the bits of p + u, r has those of a small u. A step beyond the largest finite value is not taken.
    """
    info, p, u = jnp.finfo(p.dtype), p.astype(jnp.float32), u.astype(jnp.float32)
    n = round_to(info.dtype, p + u)
    r = (p - n) + u
    # Towards zero, the spacing is that of the float before n: a float's bits count up with its magnitude.
    inwards = (jnp.sign(r) * n < 0).astype(jnp.int32)
    exponent = (jax.lax.bitcast_convert_type(n, jnp.int32) - inwards) & 0x7F800000
    power = jnp.maximum(jax.lax.bitcast_convert_type(exponent, jnp.float32), float(info.tiny))
    step = power * float(info.eps)
    chance = jnp.abs(r) / jnp.maximum(step, float(jnp.finfo(jnp.float32).tiny))
    uniform = jax.random.bits(key, p.shape, jnp.uint32).astype(jnp.float32) * 2.0**-32
    moved = n + jnp.where(uniform < chance, jnp.copysign(step, r), 0)
    d = jnp.where(jnp.abs(moved) > float(info.max), n, moved) - p
    return jnp.where(jnp.isinf(p), u, d)


def sum_within(center: jax.Array, d: jax.Array, dtype) -> jax.Array:
    """s = center + d in `dtype`, rounded towards `center`: |s − center| <= |d|, as computed in the dtype of d.

    The result is meant to be stored and has no gradient.
    """
    center, d = jax.lax.stop_gradient((center, d))
    s = round_to(dtype, center + d)
    beyond = jnp.abs(s - center) > jnp.abs(d)
    return jnp.where(beyond, jnp.nextafter(s.astype(dtype), center.astype(dtype)), s.astype(dtype))
