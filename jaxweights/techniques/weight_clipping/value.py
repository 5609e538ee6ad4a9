"""Weight clipping by value: projection onto the box [−limit, limit] or [low, high]."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_broadcast, check_order, check_scalar, check_weight
from jaxweights.core.transform import Number, Scalar, Transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.sixteen_bits import where


def clip_weights(w: jax.Array, limit: Number) -> jax.Array:
    """Clips every weight to [−limit, limit].

    w' = c if w > c, −c if w < −c, else w; c is `limit` in the dtype of `w`.

    Args:
      w: float array of any shape.
      limit: c >= 0, a number or a scalar array.

    Returns:
      Array of the shape and dtype of `w`. The gradient is 1 where `w` is kept and 0 where it is clipped. Infinite
      weights become ±c; NaN stays NaN.

    Raises:
      TypeError: `w` is not a float array, or `limit` is not a number.
      ValueError: `limit` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(clip_weights(jnp.array([-3.0, 0.5, 2.0]), 1.0))
    [-1.   0.5  1. ]

    References: Arjovsky, Chintala and Bottou, Wasserstein GAN, arXiv:1701.07875, 2017.
    """
    w = check_weight(w)
    check_scalar("limit", limit, 0)
    c = jnp.asarray(limit, accumulation_dtype(w.dtype)).astype(w.dtype)
    return _clip(w, -c, c)


def clip_range(w: jax.Array, low: Number = -math.inf, high: Number = math.inf) -> jax.Array:
    """Clips every weight to [low, high]: `clip_range(w, 0.0)` makes it non-negative.

    w' = high if w > high, low if w < low, else w; both in the dtype of `w`.

    Args:
      w: float array of any shape.
      low: the lower limit, a number or an array that broadcasts to `w`.
      high: the upper limit, likewise. Where a JAX array `high` is less than `low`, the result is `high`.

    Returns:
      Array of the shape and dtype of `w`. The gradient is 1 where `w` is kept and 0 where it is clipped. NaN stays NaN.

    Raises:
      TypeError: `w` is not a float array, or `low` or `high` is not a number or an array of numbers.
      ValueError: `low` or `high` is NaN or does not broadcast to `w`, or `low` is greater than `high`.

    >>> import jax.numpy as jnp
    >>> print(clip_range(jnp.array([-3.0, 0.5, 2.0]), 0.0, 1.0))
    [0.  0.5 1. ]
    >>> print(clip_range(jnp.array([-3.0, 0.5, 2.0]), jnp.array([-1.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 1.0])))
    [-1.  0.  1.]

    References: Lee and Seung, Learning the parts of objects by non-negative matrix factorization, Nature 401, 1999.
    """
    w = check_weight(w)
    _check_limit("low", low, w.shape)
    _check_limit("high", high, w.shape)
    check_order("low", low, "high", high)
    return _clip(w, limit_of(low, w.dtype, w.ndim), limit_of(high, w.dtype, w.ndim))


def _check_limit(name: str, limit, shape: tuple[int, ...]) -> None:
    """Raises unless `limit` is a real number, or an array of them that broadcasts to `shape`. See `check_scalar`."""
    if not isinstance(limit, jax.Array | np.ndarray) or limit.ndim == 0:
        return check_scalar(name, limit)
    check_broadcast(name, limit.shape, shape)
    if not (jnp.issubdtype(limit.dtype, jnp.integer) or jnp.issubdtype(limit.dtype, jnp.floating)):
        raise TypeError(f"{name} must be a number, got an array of dtype {limit.dtype}: pass real numbers")
    if isinstance(limit, np.ndarray) and np.isnan(limit.astype(np.float64)).any():
        raise ValueError(f"{name} must be made of numbers, got NaN: look where it was computed")


def limit_of(limit: Number | np.ndarray, dtype: jnp.dtype, ndim: int = 0) -> jax.Array | np.ndarray:
    """`limit` in a dtype, with `ndim` axes. Numbers stay in NumPy: `jax.debug_infs` allows no infinite JAX array."""
    wide = accumulation_dtype(dtype)
    a = (limit.astype(wide) if isinstance(limit, jax.Array) else np.asarray(limit, wide)).astype(dtype)
    return a.reshape((1,) * (ndim - a.ndim) + a.shape) if a.ndim else a


def _clip(w: jax.Array, low: jax.Array | np.ndarray, high: jax.Array | np.ndarray) -> jax.Array:
    if not _is_number(low, -math.inf):
        w = where(w < low, jnp.asarray(low), w)
    return w if _is_number(high, math.inf) else where(w > high, jnp.asarray(high), w)


def _is_number(limit: jax.Array | np.ndarray, number: float) -> bool:
    return isinstance(limit, np.ndarray) and limit.ndim == 0 and bool(limit == number)


@dataclasses.dataclass(frozen=True)
class ClipWeights(Transform):
    """Clips every weight to [−limit, limit]. State: none, unless `limit` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(ClipWeights(1.0).apply(jnp.array([-3.0, 0.5]), {}))
    [-1.   0.5]
    """

    limit: Scalar
    scheduled: ClassVar[frozenset[str]] = frozenset({"limit"})

    def __post_init__(self):
        check_scalar("limit", self.limit, 0, schedule=True)

    def apply(self, w, state):
        """`clip_weights(w, limit)`."""
        return clip_weights(w, self.value("limit", state))


@dataclasses.dataclass(frozen=True)
class ClipRange(Transform):
    """Clips every weight to [low, high]: `ClipRange(0.0)` keeps it non-negative. Limits per weight: `clip_range`.

    State: none, unless `low` or `high` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(ClipRange(0.0).apply(jnp.array([-3.0, 0.5]), {}))
    [0.  0.5]
    """

    low: Scalar = -math.inf
    high: Scalar = math.inf
    scheduled: ClassVar[frozenset[str]] = frozenset({"low", "high"})

    def __post_init__(self):
        check_scalar("low", self.low, schedule=True)
        check_scalar("high", self.high, schedule=True)
        check_order("low", self.low, "high", self.high)

    def apply(self, w, state):
        """`clip_range(w, low, high)`."""
        return clip_range(w, self.value("low", state), self.value("high", state))

    def anchor(self, w, state):
        """The midpoint of the range, or the infinite end of a half-line."""
        low, high = (jnp.asarray(self.value(name, state), accumulation_dtype(w.dtype)) for name in ("low", "high"))
        return jnp.where(jnp.isinf(low) & jnp.isinf(high), 0, low / 2 + high / 2)
