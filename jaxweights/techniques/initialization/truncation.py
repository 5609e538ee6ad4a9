"""Draws from a normal distribution restricted to any interval."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxweights.core.transform import Number

_NEAR = 1.0  # an interval that begins further from 0 is a tail
_SERIES = 5.0  # the continued fraction of the hazard has converged from here, to float64


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def truncated(
    key: jax.Array, mean: Number, std: Number, low: Number, high: Number, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    """mean + std·z, where z ~ N(0, 1) is restricted to [low, high], by the inverse of its CDF.

    The interval is mirrored if need be, so that its limit nearer to 0 is the lower one. In the tails and in narrow
    intervals, z is this limit and the distance from it. They are added last, so values near mean + std·limit are
    precise however small they are.
    """
    mean, std, low, high = (jnp.asarray(a, dtype) for a in (mean, std, low, high))
    most = jnp.finfo(dtype).max
    mirrored = low + high < 0
    near, width = jnp.where(mirrored, -high, low), high - low
    is_narrow = width < 2 * jnp.finfo(dtype).eps ** (1 / 3)  # where the error of either formula is about eps/width
    is_tail = near > _NEAR
    u = jax.random.uniform(key, shape, dtype)
    branch = jnp.where(is_narrow, 2, jnp.where(is_tail, 1, 0))
    step = jax.lax.switch(branch, [_central, _tail, _narrow], u, low, high, near, width)
    sign = jnp.where(mirrored & (branch > 0), -1, 1).astype(dtype)
    start = jnp.where(branch > 0, sign * near, 0)
    bounds = (jax.lax.stop_gradient(mean + std * jnp.clip(limit, -most, most)) for limit in (low, high))
    return jnp.clip((mean + std * start) + std * (sign * step), *bounds)


def _central(u, low, high, near, width):
    """z by the inverse error function, as JAX draws it."""
    a, b = (jax.lax.erf(limit / 2**0.5) for limit in (low, high))
    most = 1 - jnp.finfo(u.dtype).epsneg  # at 1 the inverse is infinite
    return jnp.clip(2**0.5 * jax.lax.erf_inv(jnp.clip(u * (b - a) + a, -most, most)), low, high)


def _narrow(u, low, high, near, width):
    """d = z − near, exponentially distributed: the density is e^(−cz) about the middle c of the interval."""
    rate = near + width / 2
    fraction = -jnp.expm1(-rate * width)
    flat = fraction < jnp.finfo(u.dtype).eps
    curved = -jnp.log1p(-u * jnp.where(flat, 0.5, fraction)) / jnp.where(flat, 1, rate)
    return jnp.clip(jnp.where(flat, u * width, curved), 0, width)


def _tail(u, low, high, near, width):
    """d = z − near, by Newton's method for log(Q(near)/Q(near + d)) = t, where t is exponentially distributed."""
    t = -jnp.log1p(u * jnp.expm1(-_cumulative_hazard(near, width)))
    d = 2 * t / (near + jnp.sqrt(near**2 + 2 * t))  # solves near·d + d²/2 = t
    for _ in range(3):
        d = jnp.clip(d - (_cumulative_hazard(near, d) - t) / (near + d + _excess(near + d)), 0, width)
    return d


def _cumulative_hazard(x, d):
    """log(Q(x)/Q(x + d)), Q(x) = P(z > x), which for large x is about x·d + d²/2."""
    return x * d + d**2 / 2 + jnp.log1p((d + _excess(x + d) - _excess(x)) / (x + _excess(x)))


def _excess(x):
    """φ(x)/Q(x) − x for x > 0: the hazard of the normal distribution, less x (Abramowitz and Stegun, 26.2.14)."""
    small, large = jnp.minimum(x, _SERIES), jnp.maximum(x, _SERIES)
    hazard = (2 / jnp.pi) ** 0.5 * jnp.exp(-(small**2) / 2) / jax.lax.erfc(small / 2**0.5)
    fraction = large
    for k in range(20, 1, -1):
        fraction = large + k / fraction
    return jnp.where(x < _SERIES, hazard - small, 1 / fraction)
