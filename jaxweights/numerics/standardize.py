"""Activations standardised by their mean and variance: what all norms share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.moments import Stats, average_entries, computed, count_entries, moments


def inverse_deviation(var: jax.Array, eps) -> jax.Array:
    """1/√(var + eps), and 0 where that is 1/0: a constant feature without ε is only centred."""
    square = var + jnp.asarray(eps, var.dtype)
    if isinstance(eps, int | float) and eps >= jnp.finfo(var.dtype).tiny:
        return jax.lax.rsqrt(square)  # never 1/0; and XLA for CPUs makes one loop of a norm without comparisons
    return jnp.where(square == 0, 0, jax.lax.rsqrt(jnp.where(square == 0, 1, square)))


def standardize(x, mean, var, scale, bias, eps) -> jax.Array:
    """(x − mean)/√(var + eps)·scale + bias, in the dtype of `x`, with given statistics.

    Computed in float32 or wider. The gradient stores nothing but the arguments and 1/√(var + eps).
    """
    return jax.checkpoint(_affine)(
        x, None, mean, inverse_deviation(var.astype(accumulation_dtype(x.dtype)), eps), scale, bias
    )


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
    the result is `bias`. A gradient stores `x` in its own dtype, μ, 1/σ and `scale`; none flows to `eps`.
    """
    known = isinstance(eps, int | float)
    spec = Spec(tuple(axis), centered, float(eps) if known else None)
    eps = None if known else jax.lax.stop_gradient(jnp.asarray(eps, accumulation_dtype(x.dtype)))
    if axis_name is None:
        return _normalize(spec, x, where, scale, bias, eps, stats)
    # A rule that sums over a mapped axis cannot be traced once `vmap` has taken the axis away.
    stats = stats or moments(x, axis, where=where, axis_name=axis_name, centered=centered)
    return jax.checkpoint(_affine)(x, where, *_center_and_inverse(spec, stats, where, eps), scale, bias)


class Spec(NamedTuple):
    """The axes of the statistics, whether a mean is subtracted, and ε; None if that is an array."""

    axis: tuple[int, ...]
    centered: bool
    eps: float | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(spec: Spec, x, where, scale, bias, eps, stats: Stats | None):
    stats = stats or moments(x, spec.axis, where=where, centered=spec.centered)
    return _affine(x, where, *_center_and_inverse(spec, stats, where, eps), scale, bias)


@_normalize.defjvp
def _(spec: Spec, primals, tangents):
    x, where, scale, bias, eps, stats = primals
    dx, _, d_scale, d_bias, _, _ = tangents
    stats = stats or moments(x, spec.axis, where=where, centered=spec.centered)
    mean, inverse = _center_and_inverse(spec, stats, where, eps)
    # Of what is linear in the tangents, nothing is stored but the arguments: x̂ is computed anew.
    derivative = jax.checkpoint(functools.partial(_derivative, spec))
    dy = derivative(x, where, mean, inverse, None if where is None else stats[2], scale, dx, d_scale, d_bias)
    return _affine(x, where, mean, inverse, scale, bias), dy


def _derivative(spec: Spec, x, where, mean, inverse, count, scale, dx, d_scale, d_bias):
    """scale·(u − ⟨u⟩ − x̂·⟨x̂·u⟩) + x̂·d_scale + d_bias, with u = dx/σ and ⟨·⟩ the mean of the entries that count.

    Where `scale` and the statistics are together smaller than `x`, the factors of x̂ and of 1 are gathered before they
    meet it: then the transpose takes but two sums over `x`.
    """
    count = count_entries(x, spec.axis, None, None) if count is None else count
    # XLA for CPUs (jaxlib 0.10) errs where it fuses a sum with what is made of it and `vmap` gave one factor an axis.
    average = lambda y: computed(average_entries(y, spec.axis, where, None, count))
    scaled = lambda y: y if y is None or scale is None else y * scale.astype(y.dtype)
    z = _affine(x.astype(inverse.dtype), where, mean, inverse, None, None)
    u = dx.astype(inverse.dtype) * inverse
    slope, shift = -average(z * u), -average(u) if spec.centered else None
    if scale is not None and jnp.broadcast_shapes(scale.shape, inverse.shape) == x.shape:
        dy = _sum_of(scaled(_sum_of(u + z * slope, shift)) + z * d_scale.astype(z.dtype), d_bias)
    else:
        dy = _sum_of(scaled(u) + z * _sum_of(scaled(slope), d_scale), _sum_of(scaled(shift), d_bias))
    return dy.astype(x.dtype)


def _sum_of(a, b):
    """a + b in the dtype of `a`; None is 0."""
    return b if a is None else a if b is None else a + b.astype(a.dtype)


def _center_and_inverse(spec: Spec, stats: Stats, where, eps):
    """μ, None if it is not subtracted, and 1/σ, 0 where nothing counts."""
    mean, var, count = stats
    inverse = inverse_deviation(var, spec.eps if eps is None else eps)
    return mean if spec.centered else None, inverse if where is None else jnp.where(count > 0, inverse, 0)


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
