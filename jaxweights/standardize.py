"""Activations standardised by their mean and variance: what all norms share."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.moments import Stats, average_entries, count_entries, moments
from jaxweights.numerics import wide


def inverse_deviation(var: jax.Array, eps) -> jax.Array:
    """1/√(var + eps), and 0 where that is 1/0: a constant feature without ε is only centred."""
    square = var + jnp.asarray(eps, var.dtype)
    if isinstance(eps, int | float) and eps >= jnp.finfo(var.dtype).tiny:
        return jax.lax.rsqrt(square)  # never 1/0, and XLA fuses a norm without comparisons into one loop
    return jnp.where(square == 0, 0, jax.lax.rsqrt(jnp.where(square == 0, 1, square)))


def standardize(x, mean, var, scale, bias, eps) -> jax.Array:
    """(x − mean)/√(var + eps)·scale + bias, in the dtype of `x`, with given statistics.

    Computed in float32 or wider. The gradient stores nothing but the arguments.
    """
    return jax.checkpoint(_affine)(x, mean, inverse_deviation(var.astype(wide(x.dtype)), eps), scale, bias)


class Over(NamedTuple):
    """What the statistics are over, and whether a mean is subtracted."""

    axis: tuple[int, ...]
    axis_name: Hashable
    centered: bool


def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    eps,
    *,
    axis: Sequence[int],
    where: jax.Array | None = None,
    axis_name=None,
    centered: bool = True,
    stats: Stats | None = None,
) -> jax.Array:
    """`standardize` with the statistics of `x` itself: its `moments`, or `stats` if they have been taken already.

    Where nothing counts, the result is `bias`. `scale` and `bias` broadcast to `x`. With x̂ = (x − μ)/σ and ⟨·⟩ the
    mean of the entries that count, the derivative along ẋ is

        ẏ = (ẋ − ⟨ẋ⟩ − x̂·⟨x̂·ẋ⟩)/σ·scale + x̂·(tangent of scale) + (tangent of bias).

    It is written out, and x̂ computed anew, so that a gradient stores `x` in its own dtype, μ, 1/σ and `scale`. None
    flows to `eps`.
    """
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    static, traced = (None, eps) if isinstance(eps, jax.Array) else (float(eps), None)
    return _normalize(Over(tuple(axis), axis_name, centered), static, x, where, scale, bias, traced, stats)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalize(over: Over, static_eps, x, where, scale, bias, eps, stats):
    mean, inverse, _ = _statistics(over, static_eps, x, where, eps, stats)
    return _affine(x, mean, inverse, scale, bias)


@_normalize.defjvp
def _(over: Over, static_eps, primals, tangents):
    x, where, scale, bias, eps, stats = primals
    dx, _, d_scale, d_bias, _, _ = tangents
    mean, inverse, count = _statistics(over, static_eps, x, where, eps, stats)
    y = _affine(x, mean, inverse, scale, bias)
    sums = functools.partial(_through_sums, over, count if where is None else None)
    given = x, mean, inverse, where, None if where is None else count
    if all(_constant_along(p, over.axis, x.ndim) for p in (scale, bias)):
        return y, jax.checkpoint(sums)(*given, scale, None, dx, d_scale, d_bias)
    # Each term is rematerialised on its own: XLA stores what two reductions share.
    dy = jax.checkpoint(sums)(*given, None, scale, dx, None, None)
    if scale is not None:
        dy += jax.checkpoint(_through_scale)(x, mean, inverse, where, d_scale)
    if bias is not None:
        dy += jnp.broadcast_to(d_bias.astype(inverse.dtype), x.shape).astype(dy.dtype)
    return y, dy


def _statistics(over: Over, static_eps, x, where, eps, stats):
    """(μ, 1/σ, count); 1/σ is 0 where nothing counts."""
    mean, var, _ = stats or moments(x, over.axis, where=where, axis_name=over.axis_name, centered=over.centered)
    inverse = inverse_deviation(var, static_eps if eps is None else eps)
    count = count_entries(x, over.axis, where, over.axis_name)
    return mean if over.centered else None, inverse if where is None else jnp.where(count > 0, inverse, 0), count


def _through_sums(over: Over, n, x, mean, inverse, where, count, inner, outer, dx, d_scale, d_bias):
    """u + x̂·(d_scale − ⟨x̂·u⟩) + d_bias − ⟨u⟩, times `outer`, with u = dx/σ·inner.

    All but `outer` is constant along the axes, so that the transpose takes two sums, which are those of `d_scale` and
    `d_bias` too.
    """
    average = lambda y: average_entries(y, over.axis, where, over.axis_name, count if n is None else n)
    z, u = _hat(x, mean, inverse, where), _affine(dx.astype(inverse.dtype), None, inverse, inner, None)
    level = average(u)
    # ⟨x̂u⟩ as ⟨x̂u + u⟩ − ⟨u⟩, and its product with x̂ likewise: XLA for CPUs (jaxlib 0.10) makes a dot product of a sum
    # of products, and errs where `vmap` gives a batch axis to one factor alone, as Jacobians do.
    slope, shift = level - average(z * u + u), -level if over.centered else 0
    if d_scale is not None:
        slope = slope + d_scale.astype(u.dtype)
    if d_bias is not None:
        shift = shift + d_bias.astype(u.dtype)
    along = jnp.broadcast_to(slope, u.shape)
    dy = u + (z * along + along) + (shift - slope)
    return (dy if outer is None else dy * outer.astype(dy.dtype)).astype(x.dtype)


def _through_scale(x, mean, inverse, where, d_scale):
    return (_hat(x, mean, inverse, where) * d_scale.astype(inverse.dtype)).astype(x.dtype)


def _hat(x, mean, inverse, where):
    """x̂. A NaN where nothing counts would reach the whole sample, as 0·NaN."""
    z = _affine(x.astype(inverse.dtype), mean, inverse, None, None)
    return z if where is None else jnp.where(where | jnp.isfinite(z), z, 0)


def _affine(x, mean, inverse, scale, bias):
    """(x − mean)·inverse·scale + bias in the dtype of `x`."""
    y = x.astype(inverse.dtype)
    if mean is not None:
        y = y - mean.astype(inverse.dtype)
    y = y * (inverse if scale is None else inverse * scale.astype(inverse.dtype))
    if bias is not None:
        y = y + bias.astype(inverse.dtype)
    return y.astype(x.dtype)


def _constant_along(parameter, axis: tuple[int, ...], ndim: int) -> bool:
    """Whether a parameter that broadcasts to `ndim` axes has one value along each of `axis`."""
    shape = () if parameter is None else parameter.shape
    return all(([1] * (ndim - len(shape)) + list(shape))[a] == 1 for a in axis)
