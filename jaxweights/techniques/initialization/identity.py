"""Identity initializers: layers that initially pass their input through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading, axes_or_default
from jaxweights.core.checks import check_dtype, check_scalar, check_shape
from jaxweights.core.transform import Number
from jaxweights.techniques.initialization.orthogonal import matrix_shape, place_at_centre


def identity(
    key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None, gain: Number = 1.0
) -> jax.Array:
    """The identity gain·I; a matrix that is not square has its first rows or columns.

    Args:
      key: not used.
      shape: shape of the weight.
      dtype: floating dtype.
      axes: how the weight is read as a matrix; (..., in, out) by default. Each matrix of a stack is an identity.
      gain: the entries of the diagonal.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or `gain` is not a number.
      ValueError: `axes` does not fit, or the weight has a window.

    >>> import jax
    >>> print(identity(jax.random.key(0), (2, 3)))
    [[1. 0. 0.]
     [0. 1. 0.]]

    References: Le, Jaitly and Hinton, A Simple Way to Initialize Recurrent Networks of Rectified Linear Units,
    arXiv:1504.00941, 2015.
    """
    del key
    check_scalar("gain", gain)
    axes = axes_or_default(axes, len(check_shape("shape", shape)))
    if math.prod(shape[a] for a in Reading.of(axes, shape).window) != 1:
        raise ValueError(
            f"shape {tuple(shape)} has a window: use dirac for a convolution, or name the batch axes in axes"
        )
    *batch, rows, columns = matrix_shape(shape, axes)
    eye = gain * jnp.eye(rows, columns, dtype=check_dtype(dtype))
    return axes.weight(jnp.broadcast_to(eye, (*batch, rows, columns)), shape)


def dirac(
    key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None, gain: Number = 1.0
) -> jax.Array:
    """The identity (Dirac) convolution: the `identity` at the centre of the window, and 0 elsewhere.

    With stride 1 and padding "SAME" or "CIRCULAR", output i is gain times input i, as far as both exist. In a grouped
    convolution each group has its own identity.

    Args:
      key: not used.
      shape: shape of the kernel.
      dtype: floating dtype.
      axes: how the kernel is read as a matrix; (*window, in, out) by default.
      gain: the nonzero entries.

    Returns:
      Array of the given shape and dtype. The centre of an even window k is (k − 1)//2, as for "SAME" in JAX.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or `gain` is not a number.
      ValueError: `axes` does not fit.

    >>> import jax
    >>> print(dirac(jax.random.key(0), (3, 1, 1)).ravel())
    [0. 1. 0.]

    References: Zagoruyko and Komodakis, DiracNets: Training Very Deep Neural Networks Without Skip-Connections,
    arXiv:1706.00388, 2017.
    """
    return place_at_centre(lambda shape: identity(key, shape, dtype, axes=axes, gain=gain), shape, axes)
