"""Sparse initialization: output units that start with few inputs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_scalar, check_shape
from jaxweights.core.transform import Number
from jaxweights.numerics.counts import round_half_up
from jaxweights.techniques.initialization.distributions import normal
from jaxweights.techniques.initialization.orthogonal import matrix_shape


def sparse(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    sparsity: Number,
    std: Number = 0.01,
) -> jax.Array:
    """Sparse weights: round(sparsity·n) of the n inputs of each output unit have weight 0, the others N(0, std²).

    The zeros are drawn separately for each unit. (torch's `sparse_` counts along the columns of its (out, in) layout,
    so it limits how many units an input feeds. This function limits the inputs of a unit, as in the paper.)

    Args:
      key: a `jax.random` key.
      shape: shape of the weight.
      dtype: floating dtype.
      axes: how the weight is read as a matrix; (..., in, out) by default.
      sparsity: the fraction of zeros, from 0 to 1.
      std: standard deviation of the others.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or a parameter is not a number.
      ValueError: `axes` does not fit, `sparsity` is not in [0, 1], or `std` is negative.

    >>> import jax
    >>> w = sparse(jax.random.key(0), (8, 3), sparsity=0.75)
    >>> print((w != 0).sum(0))
    [2 2 2]

    References: Martens, Deep learning via Hessian-free optimization, ICML 2010.
    """
    check_scalar("sparsity", sparsity, 0, 1)
    axes = axes_or_default(axes, len(check_shape("shape", shape)))
    *batch, rows, columns = matrix_shape(shape, axes)
    values, places = jax.random.split(key)
    order = jnp.argsort(jax.random.bits(places, (*batch, rows, columns)), axis=-2)
    kept = axes.weight(order >= round_half_up(sparsity, rows), shape)
    w = normal(values, shape, dtype, std=std)
    return jnp.where(kept, w, jnp.zeros_like(w))
