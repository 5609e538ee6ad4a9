"""Activations standardised by their mean and variance: what all norms share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
    return jax.checkpoint(_affine)(x, None, mean, inverse_deviation(var.astype(wide(x.dtype)), eps), scale, bias)


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

    `scale` and `bias` broadcast to `x`. Where nothing counts, and at an entry that does not count and is not finite,
    the result is `bias`. A gradient stores `x` in its own dtype, μ, 1/σ and `scale`. None flows to `eps`.
    """
    over, eps = Over(tuple(axis), centered), jax.lax.stop_gradient(eps) if isinstance(eps, jax.Array) else float(eps)
    if axis_name is None:
        static, traced = (None, eps) if isinstance(eps, jax.Array) else (eps, None)
        return _normalize(over, static, x, where, scale, bias, traced, stats)
    # A rule that sums over a mapped axis cannot be traced once `vmap` has taken the axis away.
    stats = stats or moments(x, axis, where=where, axis_name=axis_name, centered=centered)
    return jax.checkpoint(_affine)(x, where, *_center_and_inverse(over, stats, where, eps), scale, bias)


class Over(NamedTuple):
    """The axes of the statistics, and whether a mean is subtracted."""

    axis: tuple[int, ...]
    centered: bool


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _normalize(over: Over, static_eps, x, where, scale, bias, eps, stats):
    stats = stats or moments(x, over.axis, where=where, centered=over.centered)
    return _affine(x, where, *_center_and_inverse(over, stats, where, static_eps if eps is None else eps), scale, bias)


@_normalize.defjvp
def _(over: Over, static_eps, primals, tangents):
    """With x̂ = (x − μ)/σ and ⟨·⟩ the mean of the entries that count, the derivative along ẋ is

        ẏ = (ẋ − ⟨ẋ⟩ − x̂·⟨x̂·ẋ⟩)/σ·scale + x̂·(tangent of scale) + (tangent of bias).

    x̂ is computed anew. Terms are rematerialised one by one, since XLA stores what two reductions share.
    """
    x, where, scale, bias, eps, stats = primals
    dx, _, d_scale, d_bias, _, _ = tangents
    stats = stats or moments(x, over.axis, where=where, centered=over.centered)
    mean, inverse = _center_and_inverse(over, stats, where, static_eps if eps is None else eps)
    y = _affine(x, where, mean, inverse, scale, bias)
    count = None if where is None else stats[2]
    through_sums = jax.checkpoint(functools.partial(_through_sums, over))
    if all(_constant_along(p, over.axis, x.ndim) for p in (scale, bias)):
        return y, through_sums(x, where, mean, inverse, count, scale, None, dx, d_scale, d_bias)
    dy = through_sums(x, where, mean, inverse, count, None, scale, dx, None, None)
    if scale is not None:
        dy += jax.checkpoint(_through_scale)(x, where, mean, inverse, d_scale)
    if bias is not None:
        dy += (jnp.zeros_like(x, inverse.dtype) + d_bias.astype(inverse.dtype)).astype(dy.dtype)
    return y, dy


def _through_sums(over: Over, x, where, mean, inverse, count, inner, outer, dx, d_scale, d_bias):
    """u + x̂·(d_scale − ⟨x̂·u⟩) + d_bias − ⟨u⟩, times `outer`, with u = dx/σ·inner.

    All but `outer` is constant along the axes: the transpose takes two sums, which are those of `d_scale` and `d_bias`.
    """
    count = count_entries(x, over.axis, None, None) if count is None else count
    average = lambda y: average_entries(y, over.axis, where, None, count)
    z, u = _standard(x, where, mean, inverse), _affine(dx.astype(inverse.dtype), None, None, inverse, inner, None)
    level = average(u)
    # Along the last axis ⟨x̂u⟩ is ⟨x̂u + u⟩ − ⟨u⟩, and its product with x̂ likewise: XLA for CPUs (jaxlib 0.10) makes a dot
    # product of a sum of products, and errs where `vmap` gives a batch axis to one factor alone, as Jacobians do.
    last = x.ndim - 1 in over.axis and x.shape[-1] > 1
    slope, shift = level - average(z * u + u) if last else -average(z * u), -level if over.centered else 0
    if d_scale is not None:
        slope = slope + d_scale.astype(u.dtype)
    if d_bias is not None:
        shift = shift + d_bias.astype(u.dtype)
    along = jnp.zeros_like(u) + slope
    dy = u + (z * along + along) + (shift - slope) if last else u + z * along + shift
    return (dy if outer is None else dy * outer.astype(dy.dtype)).astype(x.dtype)


def _through_scale(x, where, mean, inverse, d_scale):
    return (_standard(x, where, mean, inverse) * d_scale.astype(inverse.dtype)).astype(x.dtype)


def _center_and_inverse(over: Over, stats: Stats, where, eps):
    """μ, None if it is not subtracted, and 1/σ, 0 where nothing counts."""
    mean, var, count = stats
    inverse = inverse_deviation(var, eps)
    return mean if over.centered else None, inverse if where is None else jnp.where(count > 0, inverse, 0)


def _standard(x, where, mean, inverse):
    """x̂ in the dtype of `inverse`."""
    return _affine(x.astype(inverse.dtype), where, mean, inverse, None, None)


def _affine(x, where, mean, inverse, scale, bias):
    """(x − mean)·inverse·scale + bias in the dtype of `x`, with 0 for what does not count and is not finite."""
    y = x.astype(inverse.dtype)
    if mean is not None:
        y = y - mean.astype(inverse.dtype)
    if where is not None:
        y = jnp.where(where | jnp.isfinite(y), y, 0)
    y = y * (inverse if scale is None else inverse * scale.astype(inverse.dtype))
    if bias is not None:
        y = y + bias.astype(inverse.dtype)
    return y.astype(x.dtype)


def _constant_along(parameter, axis: tuple[int, ...], ndim: int) -> bool:
    """Whether a parameter that broadcasts to `ndim` axes has one value along each of `axis`."""
    shape = () if parameter is None else parameter.shape
    return all(([1] * (ndim - len(shape)) + list(shape))[a] == 1 for a in axis)
