"""Norm constraints on each output unit's weight vector: projection onto a ball, a sphere or the shell between two."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_order, check_scalar, check_weight
from jaxweights.core.transform import Number, Scalar, Transform
from jaxweights.numerics.norms import safe_divide, safe_norm


def clip_norm(w: jax.Array, max_norm: Number, *, axes: Axes | None = None) -> jax.Array:
    """Projects the weight vector of each output unit onto the L2 ball of radius `max_norm` (max-norm regularization).

    w' = w · min(1, max_norm / ‖w‖₂), the norm over all that one output unit sums over.

    Args:
      w: float array of any shape.
      max_norm: the largest norm, >= 0, a number or a scalar array.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`. Units inside the ball are unchanged bit for bit, and so are units with a NaN
      or infinite weight.

    Raises:
      TypeError: `w` is not a float array, or `max_norm` is not a number.
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
    return _rescale(w, norm, jnp.where(norm > limit, limit, norm))


def bound_norm(w: jax.Array, low: Number, high: Number, *, rate: Number = 1.0, axes: Axes | None = None) -> jax.Array:
    """Rescales the weight vector of each output unit to a norm in [low, high]; `bound_norm(w, 1.0, 1.0)` makes it 1.

    w' = w · (rate · clip(‖w‖₂, low, high) + (1 − rate) · ‖w‖₂) / ‖w‖₂, the norm over all that one output unit sums
    over.

    Args:
      w: float array of any shape.
      low: the smallest norm, >= 0, a number or a scalar array.
      high: the largest norm, >= `low`, likewise. If an array `high` is less than `low`, `high` applies.
      rate: fraction of the way to go, in [0, 1].
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`. Units whose norm is in range are unchanged bit for bit. So are units with a
      NaN or infinite weight, and all-zero units, which have no direction to grow in.

    Raises:
      TypeError: `w` is not a float array, or `low`, `high` or `rate` is not a number.
      ValueError: `low` or `high` is negative or NaN, `low` is greater than `high`, `rate` outside [0, 1], or `axes`
        does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(bound_norm(jnp.array([[3.0, 0.1], [4.0, 0.0]]), 0.5, 1.0))
    [[0.6 0.5]
     [0.8 0. ]]

    References: Salimans and Kingma, Weight Normalization, arXiv:1602.07868, 2016, for the sphere; Keras's constraint
    MinMaxNorm, for the range and the rate.
    """
    w = check_weight(w)
    check_scalar("low", low, 0)
    check_scalar("high", high, 0)
    check_order("low", low, "high", high)
    check_scalar("rate", rate, 0, 1)
    norm = safe_norm(w, Reading.of(axes, w.shape).contracted, keepdims=True)
    low, high, rate = (jnp.asarray(number, norm.dtype) for number in (low, high, rate))
    nearest = jnp.where(norm > high, high, jnp.where(norm < low, low, norm))
    return _rescale(w, norm, jnp.where(nearest == norm, norm, rate * nearest + (1 - rate) * norm))


def _rescale(w: jax.Array, norm: jax.Array, length: jax.Array) -> jax.Array:
    """Rescales `w` from `norm` to `length`; unchanged bit for bit where they are equal or the norm is 0 or NaN."""
    x = w.astype(norm.dtype)
    kept = (length == norm) | (norm == 0) | jnp.isnan(norm)
    # Normalize first: x / norm is at most 1, whereas length / norm may overflow.
    return jnp.where(kept, x, safe_divide(x, norm) * length).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class ClipNorm(Transform):
    """Projects each output unit's weights onto the L2 ball of radius `max_norm`.

    State: none, unless `max_norm` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(ClipNorm(1.0).apply(jnp.array([3.0, 4.0]), {}))
    [0.6 0.8]
    """

    max_norm: Scalar
    axes: Axes | None = None
    scheduled: ClassVar[frozenset[str]] = frozenset({"max_norm"})
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("max_norm", self.max_norm, 0, schedule=True)

    def apply(self, w, state):
        """`clip_norm(w, max_norm)`."""
        return clip_norm(w, self.value("max_norm", state), axes=self.axes)


@dataclasses.dataclass(frozen=True)
class BoundNorm(Transform):
    """Rescales each output unit's weights to a norm in [low, high]; `BoundNorm(1.0, 1.0)` makes it 1.

    State: none, unless `low`, `high` or `rate` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(BoundNorm(1.0, 1.0).apply(jnp.array([3.0, 4.0]), {}))
    [0.6 0.8]
    """

    low: Scalar
    high: Scalar
    rate: Scalar = 1.0
    axes: Axes | None = None
    scheduled: ClassVar[frozenset[str]] = frozenset({"low", "high", "rate"})
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("low", self.low, 0, schedule=True)
        check_scalar("high", self.high, 0, schedule=True)
        check_order("low", self.low, "high", self.high)
        check_scalar("rate", self.rate, 0, 1, schedule=True)

    def apply(self, w, state):
        """`bound_norm(w, low, high, rate=rate)`."""
        low, high, rate = (self.value(name, state) for name in ("low", "high", "rate"))
        return bound_norm(w, low, high, rate=rate, axes=self.axes)
