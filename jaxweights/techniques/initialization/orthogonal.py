"""Orthogonal initializers: weights that preserve the norm of their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading, axes_or_default
from jaxweights.core.checks import check_dtype, check_scalar, check_shape
from jaxweights.core.transform import Number
from jaxweights.numerics.dtypes import accumulation_dtype


def orthogonal(
    key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None, gain: Number = 1.0
) -> jax.Array:
    """Random orthogonal matrices gain·Q, QᵀQ = I (or QQᵀ = I if there are more columns than rows).

    Q is distributed uniformly (by the Haar measure). It comes from the QR decomposition of a normal matrix, with the
    signs of R's diagonal moved to Q. Every matrix of a stack and group of a grouped convolution is drawn separately.

    Args:
      key: a `jax.random` key.
      shape: shape of the weight. A vector has norm `gain`.
      dtype: floating dtype. 16-bit values are rounded from float32, so they are orthogonal up to rounding.
      axes: how the weight is read as a matrix; (..., in, out) by default.
      gain: the singular values.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or `gain` is not a number.
      ValueError: `axes` does not fit.

    >>> import jax
    >>> w = orthogonal(jax.random.key(0), (3, 2), gain=2.0)
    >>> print((w.T @ w).round(4) + 0.0)
    [[4. 0.]
     [0. 4.]]

    References: Saxe, McClelland and Ganguli, Exact solutions to the nonlinear dynamics of learning in deep linear
    neural networks, arXiv:1312.6120, 2013; Mezzadri, How to generate random matrices from the classical compact groups,
    arXiv:math-ph/0609050, 2006.
    """
    check_scalar("gain", gain)
    dtype = check_dtype(dtype)
    axes = axes_or_default(axes, len(check_shape("shape", shape)))
    *batch, rows, columns = matrix_shape(shape, axes)
    q = jax.random.orthogonal(key, rows, tuple(batch), accumulation_dtype(dtype), columns)
    return axes.weight(gain * q, shape).astype(dtype)


def delta_orthogonal(
    key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None, gain: Number = 1.0
) -> jax.Array:
    """A norm-preserving convolution: an `orthogonal` matrix at the centre of the window, and 0 elsewhere.

    With stride 1, padding "CIRCULAR" or "SAME" and at least as many outputs as inputs, ‖conv(x)‖ = gain·‖x‖.

    Args:
      key: a `jax.random` key.
      shape: shape of the kernel, with at most as many inputs as outputs.
      dtype: floating dtype.
      axes: how the kernel is read as a matrix; (*window, in, out) by default.
      gain: the singular values of the matrix.

    Returns:
      Array of the given shape and dtype. The centre of an even window k is (k − 1)//2, as for "SAME" in JAX.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or `gain` is not a number.
      ValueError: `axes` does not fit, or a group has more inputs than outputs.

    >>> import jax
    >>> w = delta_orthogonal(jax.random.key(0), (3, 1, 2))
    >>> print((w**2).sum((1, 2)).round(4))
    [0. 1. 0.]

    References: Xiao et al., Dynamical Isometry and a Mean Field Theory of CNNs: How to Train 10,000-Layer Vanilla
    Convolutional Neural Networks, arXiv:1806.05393, 2018.
    """

    def draw_centre(shape: tuple[int, ...]) -> jax.Array:
        *_, n_in, n_out = matrix_shape(shape, axes_or_default(axes, len(shape)))
        if n_in > n_out:
            raise ValueError(
                f"a kernel with {n_in} inputs and {n_out} outputs cannot preserve norms: use orthogonal, whose "
                f"columns are then orthonormal"
            )
        return orthogonal(key, shape, dtype, axes=axes, gain=gain)

    return place_at_centre(draw_centre, shape, axes)


def place_at_centre(draw: Callable[[tuple[int, ...]], jax.Array], shape: Sequence[int], axes: Axes | None) -> jax.Array:
    """A kernel that is 0 except at the centre of the window, which is `draw(shape)` for a window of size 1."""
    shape = check_shape("shape", shape)
    window = Reading.of(axes, shape).window
    centre = draw(tuple(1 if a in window else n for a, n in enumerate(shape)))
    before = [(n - 1) // 2 if a in window else 0 for a, n in enumerate(shape)]
    return jnp.pad(centre, [(b, n - b - m) for b, n, m in zip(before, shape, centre.shape, strict=True)])


def matrix_shape(shape: Sequence[int], axes: Axes) -> tuple[int, ...]:
    """The shape of `axes.matrix(w)`: (*batch, [groups,] rows, columns)."""
    return jax.eval_shape(axes.matrix, jax.ShapeDtypeStruct(tuple(shape), jnp.float32)).shape
