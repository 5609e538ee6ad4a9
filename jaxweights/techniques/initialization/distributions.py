"""Random initializers whose scale does not depend on the layer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_dtype, check_order, check_scalar, check_shape
from jaxweights.core.transform import Number
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.techniques.initialization.truncation import truncated


def normal(
    key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, mean: Number = 0.0, std: Number = 1.0
) -> jax.Array:
    """Normal distribution N(mean, std²).

    Args:
      key: a `jax.random` key.
      shape: shape of the weight.
      dtype: floating dtype. 16-bit values are rounded from a draw in float32.
      mean: μ.
      std: σ >= 0. The default is that of torch; JAX's is 0.01.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or a parameter is not a number.
      ValueError: `std` is negative.

    >>> import jax
    >>> print(f"{normal(jax.random.key(0), (300, 300), std=0.02).std():.3f}")
    0.020
    """
    check_scalar("mean", mean)
    check_scalar("std", std, 0)
    dtype = check_dtype(dtype)
    draw = jax.random.normal(key, check_shape("shape", shape), accumulation_dtype(dtype))
    return (mean + std * draw).astype(dtype)


def truncated_normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    mean: Number = 0.0,
    std: Number = 1.0,
    low: Number = -2.0,
    high: Number = 2.0,
) -> jax.Array:
    """Truncated normal distribution: mean + std·z with z ~ N(0, 1) restricted to [low, high].

    `std` is the standard deviation before truncation, as in JAX and torch: truncated at ±2, draws have 0.8796·std.
    (`truncated=True` of `xavier_normal`, `he_normal` and `lecun_normal` corrects for this factor.) The limits of
    torch's `trunc_normal_(mean, std, a, b)` are absolute: low = (a − mean)/std, high = (b − mean)/std.

    Any interval will do: without limits, far in a tail, or narrow. Wherever JAX's own sampler is precise, it gives the
    same draws.

    Args:
      key: a `jax.random` key.
      shape: shape of the weight.
      dtype: floating dtype. 16-bit values are rounded from a draw in float32.
      mean: μ.
      std: σ >= 0.
      low: the lower limit, in standard deviations from the mean; may be −inf.
      high: the upper limit, likewise; may be inf.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or a parameter is not a number.
      ValueError: `std` is negative, or `low` is not below `high`.

    >>> import jax
    >>> w = truncated_normal(jax.random.key(0), (300, 300), std=0.02)
    >>> print(f"{w.std():.4f} {abs(w).max():.4f}")
    0.0176 0.0400
    """
    check_scalar("mean", mean)
    check_scalar("std", std, 0)
    check_scalar("low", low)
    check_scalar("high", high)
    check_order("low", low, "high", high)
    if not isinstance(low, jax.Array) and not isinstance(high, jax.Array) and low == high:
        raise ValueError(f"low must be below high, got {low!r} for both: for one value use constant")
    dtype = check_dtype(dtype)
    shape = check_shape("shape", shape)
    return truncated(key, mean, std, low, high, shape, accumulation_dtype(dtype)).astype(dtype)


def uniform(
    key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, low: Number = 0.0, high: Number = 1.0
) -> jax.Array:
    """Uniform distribution U(low, high).

    Args:
      key: a `jax.random` key.
      shape: shape of the weight.
      dtype: floating dtype. 16-bit values are rounded from a draw in float32.
      low: the smallest value.
      high: the supremum. The default is that of torch; JAX's is 0.01.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or a parameter is not a number.
      ValueError: `low` is above `high`.

    >>> import jax
    >>> w = uniform(jax.random.key(0), (300, 300), low=-0.1, high=0.1)
    >>> print(f"{w.min():.3f} {w.max():.3f}")
    -0.100 0.100
    """
    check_scalar("low", low)
    check_scalar("high", high)
    check_order("low", low, "high", high)
    dtype = check_dtype(dtype)
    return jax.random.uniform(key, check_shape("shape", shape), accumulation_dtype(dtype), low, high).astype(dtype)
