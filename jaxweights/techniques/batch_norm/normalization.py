"""Batch normalization: activations standardised over the batch."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxweights.core.checks import check_dtype, check_scalar
from jaxweights.core.devices import device_sum
from jaxweights.core.features import check_features
from jaxweights.numerics.standardize import normalize, standardize
from jaxweights.techniques.batch_norm.statistics import split_batch


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array | None = None,
    var: jax.Array | None = None,
    feature_axes: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    axis_name=None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    ghost_size: int | None = None,
    eps: float = 1e-5,
    dtype=None,
) -> jax.Array:
    """Standardises each feature over the batch.

    y = (x − μ_B)/√(σ²_B + ε)·scale + bias with the mean and biased variance over all axes but the last. μ_B is kept as
    two floats, so a mean far from 0 costs no digits; a given `mean` is one float, and is subtracted as it is. The
    backward pass stores `x` in its own dtype and three numbers per feature. Forward and reverse mode work, to any
    order.

    Args:
      x: float array, shape (..., features).
      scale: shape (features,); 1 by default.
      bias: shape (features,); 0 by default.
      mean: μ, shape (features,), to use in place of the batch mean, for evaluation with running statistics. Requires
        `var`.
      var: σ², shape (features,).
      feature_axes: axis or axes of the features. The shapes above are theirs.
      where: boolean array that broadcasts to `x`; only true entries count in the statistics.
      axis_name: name(s) of mapped axes over which to merge the statistics, weighted by count.
      axis_index_groups: groups of indices of the mapped axis to merge within, such as [[0, 1], [2, 3]].
      ghost_size: splits the first axis into ghost batches of this size, each standardised separately.
      eps: ε >= 0.
      dtype: float dtype of the result, by default that of `x`.

    Returns:
      Array of the shape of `x`, computed in float32 or wider. A feature that is constant becomes 0 before `scale` and
      `bias`. σ²_B may be beyond the range of float32, but Σ|x| may not, nor a given `var`. NaN does not spread to other
      features.

    Raises:
      TypeError: `x`, `scale`, `bias`, `mean` or `var` is not a float array, or `dtype` is not a float dtype.
      ValueError: an axis, a shape or a group does not fit, only one of `mean` and `var` is given, `ghost_size` does not
        divide the first axis, or `eps` is negative or NaN.

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
    dtype = x.dtype if dtype is None else check_dtype(dtype)
    batch = split_batch(x, feature_axes, where, axis_name, ghost_size)
    scale, bias = batch.spread("scale", scale), batch.spread("bias", bias)
    mean, var = batch.spread("mean", mean), batch.spread("var", var)
    merge = device_sum(axis_name, axis_index_groups)
    if mean is not None and var is not None:
        return standardize(x, mean, var, scale, bias, eps, dtype)
    y = normalize(batch.x, scale, bias, eps, axis=batch.axis, where=batch.where, device_sum=merge, dtype=dtype)
    return y.reshape(x.shape)
