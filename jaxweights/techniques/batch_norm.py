"""Batch normalization: activations standardised over the batch, and folded into the layer before."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.axes import Axes, Reading
from jaxweights.checks import check_mask, check_scalar, check_weight
from jaxweights.moments import moments
from jaxweights.numerics import wide
from jaxweights.standardize import inverse_deviation, standardize


def batch_stats(
    x: jax.Array, *, where: jax.Array | None = None, axis_name=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, biased variance and count of each feature.

    μ = Σx/n and σ² = Σ(x − μ)²/n over all but the last axis, in two passes.

    Args:
      x: float array, shape (..., features).
      where: boolean array that broadcasts to `x`; only true entries count.
      axis_name: name(s) of mapped axes (`jax.vmap`, `jax.shard_map`) to merge over, by count.

    Returns:
      (mean, var, count), each of shape (features,), float32 or wider. Where nothing counts, all are 0.

    Raises:
      TypeError: `x` is not a float array.
      ValueError: `x` is a scalar, or `where` does not broadcast to it.

    >>> import jax.numpy as jnp
    >>> print(batch_stats(jnp.array([[1.0, 10.0], [3.0, 10.0]])))
    (Array([ 2., 10.], dtype=float32), Array([1., 0.], dtype=float32), Array([2., 2.], dtype=float32))

    References: Ioffe and Szegedy, arXiv:1502.03167, 2015; Chan, Golub and LeVeque, Algorithms for Computing the
    Sample Variance, 1983.
    """
    x = check_features(x)
    if where is not None:
        where = check_mask(where, x.shape)
    stats = moments(x, range(x.ndim - 1), where=where, axis_name=axis_name)
    return tuple(s.reshape(x.shape[-1]) for s in stats)  # type: ignore[return-value]


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mean: jax.Array | None = None,
    var: jax.Array | None = None,
    where: jax.Array | None = None,
    axis_name=None,
    eps: float = 1e-5,
) -> jax.Array:
    """Standardises each feature over the batch.

    y = (x − μ_B)/√(σ²_B + ε)·scale + bias, over all but the last axis, σ² biased.

    Args:
      x: float array, shape (..., features).
      scale: shape (features,); 1 by default.
      bias: shape (features,); 0 by default.
      mean: μ, shape (features,), in place of the batch's; give `var` too (evaluation with running statistics).
      var: σ², shape (features,).
      where: boolean array that broadcasts to `x`; only true entries count in the statistics.
      axis_name: name(s) of mapped axes to take the statistics over, by count.
      eps: ε >= 0.

    Returns:
      Array of the shape and dtype of `x`, computed in float32 or wider. A feature that is constant,
      or whose variance is beyond the range of float32, becomes 0 before `scale` and `bias`; NaN stays in its feature.

    Raises:
      TypeError: `x`, `scale`, `bias`, `mean` or `var` is not a float array.
      ValueError: a shape does not fit, only one of `mean` and `var` is given, or `eps` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(batch_norm(jnp.array([[1.0], [3.0]]), eps=0.0))
    [[-1.]
     [ 1.]]

    References: Ioffe and Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift, arXiv:1502.03167, 2015.
    """
    x = check_features(x)
    check_scalar("eps", eps, 0)
    if (mean is None) != (var is None):
        raise ValueError(f"{'mean' if mean is None else 'var'} is missing: give mean and var together, or neither")
    if mean is None or var is None:
        mean, var, _ = batch_stats(x, where=where, axis_name=axis_name)
    elif where is not None or axis_name is not None:
        raise ValueError("where and axis_name say how to take statistics: leave them out where mean and var are given")
    given = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    for name, value in given.items():
        if value is not None and check_weight(value, name).shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {x.shape[-1:]}, one per feature of x, got {jnp.shape(value)}")
    return standardize(x, mean, var, scale, bias, eps)


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
    """Folds a batch norm into the layer before it, so that the two are one layer.

    With m = scale/√(σ² + ε): kernel' = kernel·m, bias' = (bias − μ)·m + offset, and
    kernel'ᵀx + bias' = batch_norm(kernelᵀx + bias).

    Args:
      kernel: the kernel of a dense or convolution layer; its output axis numbers the batch norm's features.
      bias: its bias, shape (features,); 0 by default.
      mean: running mean μ, shape (features,).
      var: running variance σ², shape (features,). Tiny and zero values are governed by `eps`.
      scale: the batch norm's scale; 1 by default.
      offset: the batch norm's bias; 0 by default.
      eps: the batch norm's ε.
      axes: how `kernel` is read as a matrix; (..., in, out) by default.

    Returns:
      (kernel', bias') in the dtype of `kernel`, computed in float32 or wider.

    Raises:
      TypeError: an argument is not a float array.
      ValueError: a shape does not fit, `kernel` has not exactly one output axis, or `eps` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> mean, var = jnp.array([1.0]), jnp.array([4.0])
    >>> print(fold_batch_norm(jnp.array([[6.0]]), mean=mean, var=var, eps=0.0))
    (Array([[3.]], dtype=float32), Array([-0.5], dtype=float32))

    References: Jacob et al., arXiv:1712.05877, 2017, section 3.2.
    """
    kernel = check_weight(kernel, "kernel")
    check_scalar("eps", eps, 0)
    r = Reading.of(axes, kernel.shape)
    if len(r.output) != 1:
        raise ValueError(f"kernel of shape {kernel.shape} must have exactly one output axis, axes names {r.output}")
    features = (kernel.shape[r.output[0]],)
    given = {"bias": bias, "mean": mean, "var": var, "scale": scale, "offset": offset}
    dtype = wide(kernel.dtype)
    values = {}
    for name, value in given.items():
        if value is None:
            value = jnp.full(features, 1.0 if name == "scale" else 0.0)
        values[name] = check_weight(value, name).astype(dtype)
        if values[name].shape != features:
            raise ValueError(f"{name} must have shape {features}, one per output unit, got {values[name].shape}")
    factor = values["scale"] * inverse_deviation(values["var"], eps)
    shape = [1] * kernel.ndim
    shape[r.output[0]] = -1
    new_bias = (values["bias"] - values["mean"]) * factor + values["offset"]
    return (kernel.astype(dtype) * factor.reshape(shape)).astype(kernel.dtype), new_bias.astype(kernel.dtype)


def running_stats(
    running: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array, jax.Array], momentum: float
) -> tuple[jax.Array, jax.Array]:
    """momentum·running + (1 − momentum)·batch for mean and variance; as it was where the batch counts nothing.

    >>> import jax.numpy as jnp
    >>> now = batch_stats(jnp.array([[2.0], [4.0]]))
    >>> print(running_stats((jnp.zeros(1), jnp.ones(1)), now, 0.5))
    (Array([1.5], dtype=float32), Array([1.], dtype=float32))
    """
    if len(running) != 2 or len(batch) != 3:
        raise ValueError(
            f"running must be (mean, var) and batch (mean, var, count), got {len(running)} and {len(batch)} arrays: "
            f"take batch from batch_stats"
        )
    check_scalar("momentum", momentum, 0, 1)
    shape = jnp.shape(running[0])
    for name, value in zip(("running var", "mean", "var", "count"), (running[1], *batch), strict=True):
        if jnp.shape(value) != shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}, the running mean {shape}: both must have one entry per feature"
            )
    mean, var, count = batch
    mix = lambda old, new: jnp.where(count > 0, momentum * old + (1 - momentum) * new, old).astype(old.dtype)
    return mix(running[0], mean), mix(running[1], var)


def check_features(x) -> jax.Array:
    """`x` as a float array with a last axis, or an error."""
    x = check_weight(x, "x")
    if x.ndim < 1:
        raise ValueError("x must have a last axis of features, got a scalar: add one with x[None]")
    return x
