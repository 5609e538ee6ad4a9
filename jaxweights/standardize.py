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

    Where nothing counts, the result is `bias`.

    With x̂ = (x − μ)/σ, ⟨·⟩ the mean over the entries that count, and ẋ the tangent of `x`, the derivative is

        ẏ = (ẋ − ⟨ẋ⟩ − x̂·⟨x̂·ẋ⟩)/σ·scale + x̂·(tangent of scale) + (tangent of bias).

    It is written out, and x̂ computed anew: a gradient stores `x` in its own dtype, μ, 1/σ and `scale`. Each term
    is rematerialised on its own, since XLA stores what two reductions share. None flows to `eps`.
    """
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    static, traced = (float(eps), None) if not isinstance(eps, jax.Array) else (None, eps)
    return _normalize(Over(tuple(axis), axis_name, centered), static, x, where, scale, bias, traced, stats)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalize(over: Over, static_eps, x, where, scale, bias, eps, stats):
    mean, inverse, _ = _statistics(over, static_eps, x, where, eps, stats)
    return _affine(x, mean, inverse, scale, bias)


@_normalize.defjvp
def _(over, static_eps, primals, tangents):
    x, where, scale, bias, eps, stats = primals
    dx, _, d_scale, d_bias, _, _ = tangents
    mean, inverse, count = _statistics(over, static_eps, x, where, eps, stats)
    through_x = jax.checkpoint(functools.partial(_through_x, over))
    out = through_x(x, mean, inverse, count, where, scale, dx)
    if scale is not None:
        out += jax.checkpoint(_through_scale)(x, mean, inverse, where, d_scale)
    if bias is not None:
        out += d_bias.astype(out.dtype)
    return _affine(x, mean, inverse, scale, bias), out


def _statistics(over: Over, static_eps, x, where, eps, stats):
    """(μ, 1/σ, count); 1/σ is 0 where nothing counts."""
    mean, var, _ = stats or moments(x, over.axis, where=where, axis_name=over.axis_name, centered=over.centered)
    inverse = inverse_deviation(var, static_eps if eps is None else eps)
    count = count_entries(x, over.axis, where, over.axis_name)
    return mean if over.centered else None, inverse if where is None else jnp.where(count > 0, inverse, 0), count


def _through_x(over: Over, x, mean, inverse, count, where, scale, dx):
    average = lambda y: average_entries(y, over.axis, where, over.axis_name, count)
    z, wide_dx = _hat(x, mean, inverse, where), dx.astype(inverse.dtype)
    centered = wide_dx - average(wide_dx) if over.centered else wide_dx
    return _affine(centered - z * average(z * wide_dx), None, inverse, scale, None).astype(dx.dtype)


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
