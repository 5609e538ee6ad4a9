"""Weight clipping: by value, and by the norm of each output unit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxweights.axes import Axes, Reading
from jaxweights.checks import check_scalar, check_weight
from jaxweights.numerics import safe_divide, safe_norm, wide
from jaxweights.transform import Number, Scalar, Transform


def clip_weights(w: jax.Array, limit: Number) -> jax.Array:
    """Clips every weight to [−limit, limit].

    w' = c if w > c, −c if w < −c, else w; c is `limit` in the dtype of `w`.

    Args:
      w: float array of any shape.
      limit: c >= 0, a number or a scalar array.

    Returns:
      Array of the shape and dtype of `w`. The gradient is 1 where `w` is kept and 0 where it is cut; infinite
      weights become ±c and NaN stays NaN.

    Raises:
      TypeError: `w` is not a float array, or `limit` not a number.
      ValueError: `limit` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(clip_weights(jnp.array([-3.0, 0.5, 2.0]), 1.0))
    [-1.   0.5  1. ]

    References: Arjovsky, Chintala and Bottou, Wasserstein GAN, arXiv:1701.07875, 2017.
    """
    w = check_weight(w)
    check_scalar("limit", limit, 0)
    c = jnp.asarray(limit, wide(w.dtype)).astype(w.dtype)
    return jnp.where(w > c, c, jnp.where(w < -c, -c, w))


def clip_norm(w: jax.Array, max_norm: Number, *, axes: Axes | None = None) -> jax.Array:
    """Shortens the weight vector of each output unit to at most `max_norm` (max-norm regularization).

    w' = w · min(1, max_norm / ‖w‖₂), the norm over all that one output unit sums over.

    Args:
      w: float array of any shape.
      max_norm: the greatest length >= 0, a number or a scalar array.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`. Units that are short enough are kept bit for bit, and so are
      those with a NaN or infinite weight.

    Raises:
      TypeError: `w` is not a float array, or `max_norm` not a number.
      ValueError: `max_norm` is negative or NaN, or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(clip_norm(jnp.array([[3.0, 0.1], [4.0, 0.0]]), 1.0))
    [[0.6 0.1]
     [0.8 0. ]]

    References: Srebro, Rennie and Jaakkola, Maximum-Margin Matrix Factorization, NeurIPS 2004; Hinton et al.,
    Improving neural networks by preventing co-adaptation of feature detectors, arXiv:1207.0580, 2012.
    """
    w = check_weight(w)
    check_scalar("max_norm", max_norm, 0)
    norm = safe_norm(w, Reading.of(axes, w.shape).contracted, keepdims=True)
    limit = jnp.asarray(max_norm, norm.dtype)
    factor = jnp.where(norm > limit, safe_divide(jnp.broadcast_to(limit, norm.shape), norm), 1)
    return (w.astype(norm.dtype) * factor).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class ClipWeights(Transform):
    """Clips every weight to [−limit, limit]. State: none, unless `limit` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(ClipWeights(1.0).apply(jnp.array([-3.0, 0.5]), {}))
    [-1.   0.5]
    """

    limit: Scalar

    def __post_init__(self):
        check_scalar("limit", self.limit, 0, schedule=True)

    def apply(self, w, state):
        """`clip_weights(w, limit)`."""
        return clip_weights(w, self.value("limit", state))


@dataclasses.dataclass(frozen=True)
class ClipNorm(Transform):
    """Shortens the weights of each output unit to `max_norm`. State: none, unless `max_norm` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(ClipNorm(1.0).apply(jnp.array([3.0, 4.0]), {}))
    [0.6 0.8]
    """

    max_norm: Scalar
    axes: Axes | None = None

    def __post_init__(self):
        check_scalar("max_norm", self.max_norm, 0, schedule=True)

    def apply(self, w, state):
        """`clip_norm(w, max_norm)`."""
        return clip_norm(w, self.value("max_norm", state), axes=self.axes)
