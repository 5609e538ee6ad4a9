"""Folding of a batch norm into the layer before it or after it."""

from __future__ import annotations

import dataclasses
import math

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
    follows: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm into the layer before it, or into the one after it, which makes the two a single layer.

    With m = scale/√(σ² + ε),

    - kernel' = kernel·m and bias' = (bias − μ)·m + offset, so that kernel'ᵀx + bias' = batch_norm(kernelᵀx + bias);
    - for a layer that follows, kernel' = m·kernel and bias' = kernelᵀ(offset − μ·m) + bias, so that
      kernel'ᵀx + bias' = kernelᵀ batch_norm(x) + bias.

    Args:
      kernel: kernel of a dense or convolution layer, also grouped, depthwise or transposed. Its output axis, or its
        input axis if it follows, is that of the features of the batch norm.
      bias: its bias, shape (out,); 0 by default.
      mean: running mean μ, shape (features,).
      var: running variance σ², shape (features,). `eps` dominates tiny values. Without ε, a feature of variance 0
        becomes its `offset`, and XLA flushes denormal variances (below 1.2e-38) to 0.
      scale: the batch norm's scale; 1 by default.
      offset: the batch norm's bias; 0 by default.
      eps: the batch norm's ε.
      axes: how `kernel` is read as a matrix; (..., in, out) by default. With batch axes (a stack of layers), all
        other arguments have shape (*batch, features).
      follows: whether the layer comes after the batch norm. That is exact only if the layer pads its input with no
        zeros, before or between its entries: the norm does not shift them, but the folded layer does.

    Returns:
      (kernel', bias') in the dtype of `kernel`, computed in float32 or wider.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: a shape does not fit, `kernel` has not exactly one output axis (input axis, if it follows), or `eps`
        is negative or NaN.

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
    side, name = (r.input, "input") if follows else (r.output, "output")
    if len(side) != 1:
        raise ValueError(f"kernel of shape {kernel.shape} must have exactly one {name} axis, axes names {side}")
    batch = tuple(kernel.shape[a] for a in r.batch)
    features = (*batch, kernel.shape[side[0]] * (r.groups if follows else 1))
    out = (*batch, math.prod(kernel.shape[a] for a in r.output))
    given = {"bias": bias, "mean": mean, "var": var, "scale": scale, "offset": offset}
    dtype = accumulation_dtype(kernel.dtype)
    values = {}
    for name, value in given.items():
        size, unit = (out, "output unit") if name == "bias" else (features, "input" if follows else "output unit")
        if value is None:
            value = jnp.full(size, 1.0 if name == "scale" else 0.0)
        values[name] = check_weight(value, name).astype(dtype)
        if values[name].shape != size:
            raise ValueError(f"{name} must have shape {size}, one per {unit}, got {values[name].shape}")
    factor = values["scale"] * inverse_deviation(values["var"], eps)
    wide = kernel.astype(dtype)
    if follows:
        split, inner = r.split_groups(wide)
        size = (*(split.shape[a] for a in inner.batch), split.shape[inner.input[0]])
        swapped = dataclasses.replace(inner, input=inner.output, output=inner.input)
        shift = swapped.spread((values["offset"] - values["mean"] * factor).reshape(size))
        numbered = (*inner.batch, *inner.output)
        order = [sorted(numbered).index(a) for a in numbered]
        new_bias = values["bias"] + (split * shift).sum(inner.contracted).transpose(order).reshape(out)
        new_kernel = (split * swapped.spread(factor.reshape(size))).reshape(kernel.shape)
    else:
        new_bias = (values["bias"] - values["mean"]) * factor + values["offset"]
        new_kernel = wide * r.spread(factor)
    return new_kernel.astype(kernel.dtype), new_bias.astype(kernel.dtype)
