"""Standardization of activations by mean and variance, shared by all normalization layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.numerics.batching import apply_if
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.moments import (
    DeviceSum,
    Moments,
    average_entries,
    count_entries,
    materialize,
    split_moments,
    subtract_square,
)


def inverse_deviation(var: jax.Array, eps) -> jax.Array:
    """1/√(var + eps), or 0 where var + eps is 0: without ε, a constant feature is only centred."""
    square = var + jnp.asarray(eps, var.dtype)
    if isinstance(eps, int | float) and eps >= jnp.finfo(var.dtype).tiny:
        return jax.lax.rsqrt(square)  # never 1/0; without comparisons, XLA on CPUs fuses a norm into one loop
    return jnp.where(square == 0, 0, jax.lax.rsqrt(jnp.where(square == 0, 1, square)))


def standardize(x, mean, var, scale, bias, eps, dtype=None) -> jax.Array:
    """(x − mean)/√(var + eps)·scale + bias with given statistics, in `dtype`, by default that of `x`.

    All broadcast to `x`. Computed in float32 or wider. The backward pass stores only the arguments and 1/√(var + eps).
    """
    dtype = x.dtype if dtype is None else dtype
    inverse = inverse_deviation(var.astype(_working_dtype(x.dtype, dtype)), eps)
    return jax.checkpoint(functools.partial(_affine, dtype))(x, None, mean, None, inverse, scale, bias)


def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    eps,
    *,
    axis: Sequence[int],
    where: jax.Array | None = None,
    device_sum: DeviceSum | None = None,
    centered: bool = True,
    known: Moments | None = None,
    dtype=None,
) -> jax.Array:
    """Standardises `x` by its own statistics: its `split_moments`, or `known` if they are already computed.

    `scale` and `bias` broadcast to `x`. The result is `bias` where no entry counts, and at masked-out entries that are
    not finite. It is of `dtype`, by default that of `x`. The backward pass stores `x` in its own dtype, the two floats
    of μ, 1/σ and `scale`. No gradient flows to `eps`.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    static = isinstance(eps, int | float)
    spec = Spec(tuple(axis), centered, float(eps) if static else None, _working_dtype(x.dtype, dtype), dtype)
    eps = None if static else jax.lax.stop_gradient(jnp.asarray(eps, spec.working))
    if device_sum is None:
        return _normalize(spec, x, where, scale, bias, eps, known)
    # A custom rule that sums over a mapped axis cannot be traced once `vmap` has removed the axis.
    m = _measure(spec, x, where, device_sum) if known is None else known
    inverse = _extend_range(spec, x, where, m, eps, _plain_inverse(spec, where, m, eps), device_sum)
    shift, rest, inverse = materialize((m.shift, m.rest, inverse))
    return jax.checkpoint(functools.partial(_affine, dtype))(x, where, shift, rest, inverse, scale, bias)


class Spec(NamedTuple):
    """What a norm reduces and computes: everything that is known before it runs."""

    axis: tuple[int, ...]
    centered: bool
    eps: float | None
    """ε, or None if it is an array."""
    working: jnp.dtype
    """The dtype to compute in."""
    result: jnp.dtype


def _working_dtype(of_x, result) -> jnp.dtype:
    wide = max(jnp.dtype(of_x), jnp.dtype(result), key=lambda d: jnp.finfo(d).bits)
    return accumulation_dtype(wide)


def _measure(spec: Spec, x, where, device_sum=None) -> Moments:
    return split_moments(x.astype(spec.working), spec.axis, where=where, device_sum=device_sum, centered=spec.centered)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(spec: Spec, x, where, scale, bias, eps, known: Moments | None):
    m = _measure(spec, x, where) if known is None else known
    shift, rest, inverse = materialize((m.shift, m.rest, _inverse(spec, x, where, m, eps)))
    return _affine(spec.result, x, where, shift, rest, inverse, scale, bias)


@_normalize.defjvp
def _(spec: Spec, primals, tangents):
    x, where, scale, bias, eps, known = primals
    dx, _, d_scale, d_bias, _, _ = tangents
    m = _measure(spec, x, where) if known is None else known
    shift, rest, inverse = materialize((m.shift, m.rest, _inverse(spec, x, where, m, eps)))
    # The part linear in the tangents stores only its arguments and recomputes x̂.
    derivative = jax.checkpoint(functools.partial(_derivative, spec))
    count = None if where is None else m.n
    dy = derivative(x, where, shift, rest, inverse, count, scale, dx, d_scale, d_bias)
    return _affine(spec.result, x, where, shift, rest, inverse, scale, bias), dy


def _derivative(spec: Spec, x, where, shift, rest, inverse, count, scale, dx, d_scale, d_bias):
    """scale·(u − ⟨u⟩ − x̂·⟨x̂·u⟩) + x̂·d_scale + d_bias, where u = dx/σ and ⟨·⟩ is the mean over the entries that count.

    If `scale` and the statistics together broadcast to less than the shape of `x`, the coefficients of x̂ and of 1 are
    added up before they are broadcast to it. The transpose then needs only two sums over `x`.
    """
    average = _average(spec, x, where, count)

    def scaled(y):
        return y if y is None or scale is None else y * scale.astype(y.dtype)

    z = _affine(spec.working, x, where, shift, rest, inverse, None, None)
    u = dx.astype(inverse.dtype) * inverse
    slope, offset = -average(z * u), -average(u) if spec.centered else None
    if scale is not None and jnp.broadcast_shapes(scale.shape, inverse.shape) == x.shape:
        dy = _add(scaled(_add(u + z * slope, offset)) + z * d_scale.astype(z.dtype), d_bias)
    else:
        dy = _add(scaled(u) + z * _add(scaled(slope), d_scale), _add(scaled(offset), d_bias))
    return dy.astype(spec.result)


def _average(spec: Spec, x, where, count):
    """The mean over the entries of `x` that count, as a function."""
    count = count_entries(x, spec.axis, None, None) if count is None else count

    def average(y):
        # XLA on CPUs (jaxlib 0.10) errs if it fuses a sum with its consumer and `vmap` batches only one factor.
        return materialize(average_entries(y, spec.axis, where, None, count))

    return average


def _add(a, b):
    """a + b in the dtype of `a`, where None counts as 0."""
    return b if a is None else a if b is None else a + b.astype(a.dtype)


# 1/σ


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inverse(spec: Spec, x, where, m: Moments, eps):
    """1/√(σ² + ε), also if σ² itself is beyond the range of its dtype; 0 where no entry counts."""
    inverse = _plain_inverse(spec, where, m, eps)

    def extend(inverse):
        return _extend_range(spec, x, where, m, eps, inverse, None)

    def extend_if_needed(inverse):
        return apply_if(jnp.any(_multiplier(spec, m, eps) != 1), extend, inverse)

    # A sum more is free where XLA reads x once for several sums, and a branch on the values is not. CPUs: the reverse.
    return jax.lax.platform_dependent(inverse, cpu=extend_if_needed, default=extend)


@_inverse.defjvp
def _(spec: Spec, primals, tangents):
    """−⟨x̂·dx/σ⟩/σ, for second derivatives."""
    x, where, m, eps = primals
    inverse = _inverse(spec, x, where, m, eps)
    z = _affine(spec.working, x, where, m.shift, m.rest, inverse, None, None)
    average = _average(spec, x, where, None if where is None else m.n)
    return inverse, -average(z * (tangents[0].astype(inverse.dtype) * inverse)) * inverse


def _plain_inverse(spec: Spec, where, m: Moments, eps):
    if spec.eps is not None and spec.eps >= jnp.finfo(spec.working).tiny:
        inverse = inverse_deviation(m.var, spec.eps)
    else:
        inverse = inverse_deviation(_without_rounding(m.var, m.rest), _epsilon(spec, eps))
    return inverse if where is None else jnp.where(m.n > 0, inverse, 0)


def _without_rounding(var, rest):
    """`var`, or 0 where all entries are equal, and only rounding is left of σ² = Σ(x − m)²/n − r²."""
    return var if rest is None else jnp.where(var < 2.0**-12 * jnp.square(rest), 0, var)


def _multiplier(spec: Spec, m: Moments, eps) -> jax.Array:
    """The power of two by which to multiply x before it is squared: 1 unless σ² + ε is beyond the range."""
    bits = jnp.finfo(spec.working).maxexp
    power, least = 2.0 ** int(0.6 * bits), 2.0 ** int(-0.8 * bits)
    multiplier = jnp.where(m.var == jnp.inf, jnp.asarray(1 / power, spec.working), 1)
    if spec.eps is not None and spec.eps >= least:
        return multiplier
    return jnp.where(m.var + _epsilon(spec, eps) < least, power, multiplier)


def _extend_range(spec: Spec, x, where, m: Moments, eps, inverse, device_sum: DeviceSum | None):
    """`inverse`, computed again from multiples of x where the variance is beyond the range of its dtype."""
    count = count_entries(x, spec.axis, None, device_sum) if where is None else m.n
    multiplier = _multiplier(spec, m, eps)
    y = x.astype(spec.working)
    y = (y if m.shift is None else y - m.shift) * multiplier
    y = y if where is None else jnp.where(where, y, 0)
    var = average_entries(jnp.square(y), spec.axis, None, device_sum, count)
    # Barriers, since XLA squares the factors of a product first if one is constant, and 0·∞ is NaN.
    if m.rest is not None:
        rest = jax.lax.optimization_barrier(m.rest * multiplier)
        var = _without_rounding(subtract_square(var, rest), rest)
    root = jax.lax.optimization_barrier(jnp.sqrt(_epsilon(spec, eps)) * multiplier)
    extended = inverse_deviation(var, jnp.square(root)) * multiplier
    return jnp.where((multiplier != 1) & (m.n > 0), extended, inverse)


def _epsilon(spec: Spec, eps) -> jax.Array:
    return jnp.asarray(spec.eps if eps is None else eps, spec.working)


def _affine(dtype, x, where, shift, rest, inverse, scale, bias):
    """((x − shift) − rest)·inverse·scale + bias in `dtype`, or `bias` at masked-out entries that are not finite."""
    y = x.astype(inverse.dtype)
    for part in (shift, rest):
        y = y if part is None else y - part.astype(inverse.dtype)
    if where is not None:
        y = jnp.where(where | jnp.isfinite(y), y, 0)
    y = y * (inverse if scale is None else inverse * scale.astype(inverse.dtype))
    if bias is not None:
        y = y + bias.astype(inverse.dtype)
    return y.astype(dtype)
