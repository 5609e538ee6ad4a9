"""Standardization of activations by mean and variance, shared by all normalization layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.moments import Stats, average_entries, count_entries, materialize, moments


def inverse_deviation(var: jax.Array, eps) -> jax.Array:
    """1/√(var + eps), or 0 where var + eps is 0: without ε, a constant feature is only centred."""
    square = var + jnp.asarray(eps, var.dtype)
    if isinstance(eps, int | float) and eps >= jnp.finfo(var.dtype).tiny:
        return jax.lax.rsqrt(square)  # never 1/0; without comparisons, XLA on CPUs fuses a norm into one loop
    return jnp.where(square == 0, 0, jax.lax.rsqrt(jnp.where(square == 0, 1, square)))


def standardize(x, mean, var, scale, bias, eps) -> jax.Array:
    """(x − mean)/√(var + eps)·scale + bias with given statistics, in the dtype of `x`.

    Computed in float32 or wider. The backward pass stores only the arguments and 1/√(var + eps).
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
    """Standardises `x` by its own statistics: its `moments`, or `stats` if they are already computed.

    `scale` and `bias` broadcast to `x`. The result is `bias` where no entry counts, and at masked-out entries that are
    not finite. The backward pass stores `x` in its own dtype, μ, 1/σ and `scale`. No gradient flows to `eps`.
    """
    known = isinstance(eps, int | float)
    spec = Spec(tuple(axis), centered, float(eps) if known else None)
    eps = None if known else jax.lax.stop_gradient(jnp.asarray(eps, accumulation_dtype(x.dtype)))
    if axis_name is None:
        return _normalize(spec, x, where, scale, bias, eps, stats)
    # A custom rule that sums over a mapped axis cannot be traced once `vmap` has removed the axis.
    stats = stats or moments(x, axis, where=where, axis_name=axis_name, centered=centered)
    return jax.checkpoint(_affine)(x, where, *_center_and_inverse(spec, stats, where, eps), scale, bias)


class Spec(NamedTuple):
    """The axes to reduce, whether to subtract the mean, and ε, or None if ε is an array."""

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
    _, _, count = stats
    # The part linear in the tangents stores only its arguments and recomputes x̂.
    derivative = jax.checkpoint(functools.partial(_derivative, spec))
    dy = derivative(x, where, mean, inverse, None if where is None else count, scale, dx, d_scale, d_bias)
    return _affine(x, where, mean, inverse, scale, bias), dy


def _derivative(spec: Spec, x, where, mean, inverse, count, scale, dx, d_scale, d_bias):
    """scale·(u − ⟨u⟩ − x̂·⟨x̂·u⟩) + x̂·d_scale + d_bias, where u = dx/σ and ⟨·⟩ is the mean over the entries that count.

    If `scale` and the statistics together broadcast to less than the shape of `x`, the coefficients of x̂ and of 1 are
    added up before they are broadcast to it. The transpose then needs only two sums over `x`.
    """
    count = count_entries(x, spec.axis, None, None) if count is None else count

    def average(y):
        # XLA on CPUs (jaxlib 0.10) errs if it fuses a sum with its consumer and `vmap` batches only one factor.
        return materialize(average_entries(y, spec.axis, where, None, count))

    def scaled(y):
        return y if y is None or scale is None else y * scale.astype(y.dtype)

    z = _affine(x.astype(inverse.dtype), where, mean, inverse, None, None)
    u = dx.astype(inverse.dtype) * inverse
    slope, shift = -average(z * u), -average(u) if spec.centered else None
    if scale is not None and jnp.broadcast_shapes(scale.shape, inverse.shape) == x.shape:
        dy = _add(scaled(_add(u + z * slope, shift)) + z * d_scale.astype(z.dtype), d_bias)
    else:
        dy = _add(scaled(u) + z * _add(scaled(slope), d_scale), _add(scaled(shift), d_bias))
    return dy.astype(x.dtype)


def _add(a, b):
    """a + b in the dtype of `a`, where None counts as 0."""
    return b if a is None else a if b is None else a + b.astype(a.dtype)


def _center_and_inverse(spec: Spec, stats: Stats, where, eps):
    """(μ, 1/σ): μ is None if it is not subtracted, and 1/σ is 0 where no entry counts."""
    mean, var, count = stats
    inverse = inverse_deviation(var, spec.eps if eps is None else eps)
    return mean if spec.centered else None, inverse if where is None else jnp.where(count > 0, inverse, 0)


def _affine(x, where, mean, inverse, scale, bias):
    """(x − mean)·inverse·scale + bias in the dtype of `x`, or `bias` at masked-out entries that are not finite."""
    y = x.astype(inverse.dtype)
    if mean is not None:
        y = y - mean.astype(inverse.dtype)
    if where is not None:
        y = jnp.where(where | jnp.isfinite(y), y, 0)
    y = y * (inverse if scale is None else inverse * scale.astype(inverse.dtype))
    if bias is not None:
        y = y + bias.astype(inverse.dtype)
    return y.astype(x.dtype)
