"""Batch renormalization: normalization in training that is close to that in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_dtype, check_scalar
from jaxweights.core.devices import device_sum
from jaxweights.core.features import check_features
from jaxweights.numerics.moments import Moments, split_moments
from jaxweights.numerics.standardize import inverse_deviation, normalize
from jaxweights.techniques.batch_norm.statistics import split_batch


def batch_renorm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array,
    var: jax.Array,
    r_max: float | jax.Array,
    d_max: float | jax.Array,
    feature_axes: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    axis_name=None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-5,
    dtype=None,
) -> jax.Array:
    """Standardises each feature over the batch, with a correction towards the running statistics.

    y = ((x − μ_B)/σ_B·r + d)·scale + bias with r = clip(σ_B/σ, 1/r_max, r_max),
    d = clip((μ_B − μ)/σ, −d_max, d_max), σ_B = √(σ²_B + ε) and σ = √(σ² + ε). No gradient flows through r and d.
    If nothing is clipped, y = (x − μ)/σ·scale + bias, as in evaluation. r_max = 1 with d_max = 0 is `batch_norm`.

    Args:
      x: float array, shape (..., features).
      scale: shape (features,); 1 by default.
      bias: shape (features,); 0 by default.
      mean: running mean μ, shape (features,).
      var: running variance σ², shape (features,). Update both with `running_stats` and `batch_stats`.
      r_max: at least 1. The paper raises it from 1 to 3 early in training.
      d_max: at least 0. The paper raises it from 0 to 5.
      feature_axes: axis or axes of the features. The shapes above are theirs.
      where: boolean array that broadcasts to `x`; only true entries count in the statistics.
      axis_name: name(s) of mapped axes over which to merge the statistics, weighted by count.
      axis_index_groups: groups of indices of the mapped axis to merge within, such as [[0, 1], [2, 3]].
      eps: ε >= 0.
      dtype: float dtype of the result, by default that of `x`.

    Returns:
      Array of the shape of `x`, computed in float32 or wider. NaN does not spread to other features.

    Raises:
      TypeError: an argument is not a float array, or `dtype` is not a float dtype.
      ValueError: an axis, a shape or a group does not fit, or `r_max`, `d_max` or `eps` is out of range.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0], [3.0]])
    >>> print(batch_renorm(x, mean=jnp.ones(1), var=4 * jnp.ones(1), r_max=3.0, d_max=5.0, eps=0.0))
    [[0.]
     [1.]]

    References: Ioffe, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
    arXiv:1702.03275, 2017.
    """
    x = check_features(x)
    check_scalar("eps", eps, 0)
    dtype = x.dtype if dtype is None else check_dtype(dtype)
    batch = split_batch(x, feature_axes, where, axis_name, None)
    scale, bias = batch.spread("scale", scale), batch.spread("bias", bias)
    running = batch.spread("mean", mean), batch.spread("var", var)
    merge = device_sum(axis_name, axis_index_groups)
    known = split_moments(x, batch.axis, where=batch.where, device_sum=merge)
    scale, bias = renormalized_parameters(known, *running, scale, bias, r_max, d_max, eps)
    return normalize(
        x, scale, bias, eps, axis=batch.axis, where=batch.where, device_sum=merge, known=known, dtype=dtype
    )


def renormalized_parameters(known: Moments, mean, var, scale, bias, r_max, d_max, eps) -> tuple[jax.Array, jax.Array]:
    """(r·scale, d·scale + bias), the scale and bias of batch renormalization. All arrays broadcast to the batch."""
    check_scalar("r_max", r_max, 1)
    check_scalar("d_max", d_max, 0)
    mean, var, r_max, d_max, epsilon = (jnp.asarray(a, known.var.dtype) for a in (mean, var, r_max, d_max, eps))
    inverse = inverse_deviation(var, eps)
    r = jnp.clip(jnp.sqrt(known.var + epsilon) * inverse, 1 / r_max, r_max)
    assert known.shift is not None and known.rest is not None
    d = jnp.clip(((known.shift - mean) + known.rest) * inverse, -d_max, d_max)
    r, d = jax.lax.stop_gradient((r, d))
    factor = r if scale is None else r * scale.astype(r.dtype)
    shift = d if scale is None else d * scale.astype(r.dtype)
    return factor, shift if bias is None else shift + bias.astype(r.dtype)
