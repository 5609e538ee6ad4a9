"""Folding of a batch norm into the preceding layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.standardize import inverse_deviation


def fold_batch_norm(
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    offset: jax.Array | None = None,
    eps: float = 1e-5,
    axes: Axes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm into the preceding layer, which makes the two a single layer.

    kernel' = kernel·m and bias' = (bias − μ)·m + offset with m = scale/√(σ² + ε), so that
    kernel'ᵀx + bias' = batch_norm(kernelᵀx + bias).

    Args:
      kernel: kernel of a dense or convolution layer, also depthwise or transposed. Its output axis is that of the
        features of the batch norm.
      bias: its bias, shape (features,); 0 by default.
      mean: running mean μ, shape (features,).
      var: running variance σ², shape (features,). `eps` dominates tiny values. Without ε, a feature of variance 0
        becomes its `offset`, and XLA flushes denormal variances (below 1.2e-38) to 0.
      scale: the batch norm's scale; 1 by default.
      offset: the batch norm's bias; 0 by default.
      eps: the batch norm's ε.
      axes: how `kernel` is read as a matrix; (..., in, out) by default. With batch axes (a stack of layers), all
        other arguments have shape (*batch, features).

    Returns:
      (kernel', bias') in the dtype of `kernel`, computed in float32 or wider.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: a shape does not fit, `kernel` has not exactly one output axis, or `eps` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> mean, var = jnp.array([1.0]), jnp.array([4.0])
    >>> print(fold_batch_norm(jnp.array([[6.0]]), mean=mean, var=var, eps=0.0))
    (Array([[3.]], dtype=float32), Array([-0.5], dtype=float32))

    References: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, arXiv:1712.05877, 2017, section 3.2.
    """
    kernel = check_weight(kernel, "kernel")
    check_scalar("eps", eps, 0)
    r = Reading.of(axes, kernel.shape)
    if len(r.output) != 1:
        raise ValueError(f"kernel of shape {kernel.shape} must have exactly one output axis, axes names {r.output}")
    features = tuple(kernel.shape[a] for a in (*r.batch, *r.output))
    given = {"bias": bias, "mean": mean, "var": var, "scale": scale, "offset": offset}
    dtype = accumulation_dtype(kernel.dtype)
    values = {}
    for name, value in given.items():
        if value is None:
            value = jnp.full(features, 1.0 if name == "scale" else 0.0)
        values[name] = check_weight(value, name).astype(dtype)
        if values[name].shape != features:
            raise ValueError(f"{name} must have shape {features}, one per output unit, got {values[name].shape}")
    factor = values["scale"] * inverse_deviation(values["var"], eps)
    new_bias = (values["bias"] - values["mean"]) * factor + values["offset"]
    return (kernel.astype(dtype) * r.spread(factor)).astype(kernel.dtype), new_bias.astype(kernel.dtype)
