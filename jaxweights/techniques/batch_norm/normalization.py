"""Batch normalization: activations standardised over the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.numerics.standardize import normalize, standardize
from jaxweights.techniques.batch_norm.statistics import check_features, split_batch


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array | None = None,
    var: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name=None,
    ghost_size: int | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """Standardises each feature over the batch.

    y = (x − μ_B)/√(σ²_B + ε)·scale + bias with the mean and biased variance over all axes but the last. The backward
    pass stores `x` in its own dtype and two numbers per feature. Forward and reverse mode work, to any order.

    Args:
      x: float array, shape (..., features).
      scale: shape (features,); 1 by default.
      bias: shape (features,); 0 by default.
      mean: μ, shape (features,), to use in place of the batch mean, for evaluation with running statistics. Requires
        `var`.
      var: σ², shape (features,).
      where: boolean array that broadcasts to `x`; only true entries count in the statistics.
      axis_name: name(s) of mapped axes over which to merge the statistics, weighted by count.
      ghost_size: splits the first axis into ghost batches of this size, each standardised separately.
      eps: ε >= 0.

    Returns:
      Array of the shape and dtype of `x`, computed in float32 or wider. A feature that is constant, or whose variance
      is beyond the range of float32, becomes 0 before `scale` and `bias`. NaN does not spread to other features.

    Raises:
      TypeError: `x`, `scale`, `bias`, `mean` or `var` is not a float array.
      ValueError: a shape does not fit, only one of `mean` and `var` is given, `ghost_size` does not divide the
        first axis, or `eps` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(batch_norm(jnp.array([[1.0], [3.0]]), eps=0.0))
    [[-1.]
     [ 1.]]

    References: Ioffe and Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift, arXiv:1502.03167, 2015; Hoffer, Hubara and Soudry, Train longer, generalize better: closing the
    generalization gap in large batch training of neural networks, arXiv:1705.08741, 2017, for ghost batches.
    """
    x = check_features(x)
    check_scalar("eps", eps, 0)
    if (mean is None) != (var is None):
        raise ValueError(f"{'mean' if mean is None else 'var'} is missing: give mean and var together, or neither")
    if mean is not None and not (where is None and axis_name is None and ghost_size is None):
        raise ValueError(
            "where, axis_name and ghost_size control how statistics are taken: leave them out if mean and var are given"
        )
    check_parameters(x, scale=scale, bias=bias, mean=mean, var=var)
    if mean is not None and var is not None:
        return standardize(x, mean, var, scale, bias, eps)
    batch, where, axis = split_batch(x, where, axis_name, ghost_size)
    return normalize(batch, scale, bias, eps, axis=axis, where=where, axis_name=axis_name).reshape(x.shape)


def check_parameters(x: jax.Array, **given) -> None:
    """Raises unless every given array has one entry per feature of `x`."""
    for name, value in given.items():
        if value is not None and check_weight(value, name).shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {x.shape[-1:]}, one per feature of x, got {jnp.shape(value)}")
