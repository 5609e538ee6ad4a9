"""Constant initializers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_dtype, check_scalar, check_shape
from jaxweights.core.transform import Number


def constant(key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, value: Number) -> jax.Array:
    """Fills a weight with one number.

    Args:
      key: not used.
      shape: shape of the weight.
      dtype: floating dtype.
      value: the number.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or `value` is not a number.

    >>> import jax
    >>> print(constant(jax.random.key(0), (3,), value=0.5))
    [0.5 0.5 0.5]
    """
    del key
    check_scalar("value", value)
    return jnp.full(check_shape("shape", shape), value, check_dtype(dtype))


def zeros(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """Zeros, for biases and the last layer of a residual branch. Arguments as in `constant`.

    >>> import jax
    >>> print(zeros(jax.random.key(0), (3,)))
    [0. 0. 0.]
    """
    return constant(key, shape, dtype, value=0)


def ones(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """Ones, for the scale of a normalization layer. Arguments as in `constant`.

    >>> import jax
    >>> print(ones(jax.random.key(0), (3,)))
    [1. 1. 1.]
    """
    return constant(key, shape, dtype, value=1)
