"""Batch renormalization: normalization in training that is close to that in evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_scalar
from jaxweights.numerics.moments import Stats, moments
from jaxweights.numerics.standardize import inverse_deviation, normalize
from jaxweights.techniques.batch_norm.normalization import check_parameters
from jaxweights.techniques.batch_norm.statistics import check_features, split_batch


def batch_renorm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array,
    var: jax.Array,
    r_max: float | jax.Array,
    d_max: float | jax.Array,
    where: jax.Array | None = None,
    axis_name=None,
    eps: float = 1e-5,
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
      where: boolean array that broadcasts to `x`; only true entries count in the statistics.
      axis_name: name(s) of mapped axes over which to merge the statistics, weighted by count.
      eps: ε >= 0.

    Returns:
      Array of the shape and dtype of `x`, computed in float32 or wider. NaN does not spread to other features.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: a shape does not fit, or `r_max`, `d_max` or `eps` is out of range.

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
    check_parameters(x, scale=scale, bias=bias, mean=mean, var=var)
    x, where, axis = split_batch(x, where, axis_name, None)
    stats = moments(x, axis, where=where, axis_name=axis_name)
    scale, bias = renormalized_parameters(stats, mean, var, scale, bias, r_max, d_max, eps)
    return normalize(x, scale, bias, eps, axis=axis, where=where, axis_name=axis_name, stats=stats)


def renormalized_parameters(stats: Stats, mean, var, scale, bias, r_max, d_max, eps) -> tuple[jax.Array, jax.Array]:
    """(r·scale, d·scale + bias), the scale and bias of batch renormalization."""
    check_scalar("r_max", r_max, 1)
    check_scalar("d_max", d_max, 0)
    batch_mean, batch_var, _ = stats
    mean, var, r_max, d_max, epsilon = (jnp.asarray(a, batch_var.dtype) for a in (mean, var, r_max, d_max, eps))
    inverse = inverse_deviation(var, eps)
    r = jnp.clip(jnp.sqrt(batch_var + epsilon) * inverse, 1 / r_max, r_max)
    d = jnp.clip((batch_mean - mean) * inverse, -d_max, d_max)
    r, d = jax.lax.stop_gradient((r, d))
    factor = r if scale is None else r * scale.astype(r.dtype)
    shift = d if scale is None else d * scale.astype(r.dtype)
    return factor, shift if bias is None else shift + bias.astype(r.dtype)
