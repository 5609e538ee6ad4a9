"""Projection onto a half-space, a slab or a hyperplane: bounds on a weighted sum of each output unit's weights."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_broadcast, check_order, check_scalar, check_weight
from jaxweights.core.transform import Number, Scalar, Transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.weight_clipping.value import limit_of


def bound_sum(
    w: jax.Array,
    low: Number = -math.inf,
    high: Number = math.inf,
    *,
    normal: jax.Array | None = None,
    axes: Axes | None = None,
) -> jax.Array:
    """Projects each output unit's weights onto a half-space, or the slab between two hyperplanes: low <= aᵀw' <= high.

    w' = w + a·(clip(aᵀw, low, high) − aᵀw)/aᵀa, the products over all that one output unit sums over. If `low` equals
    `high`, this is the projection onto a hyperplane; `center` is the one for sum 0.

    Args:
      w: float array of any shape.
      low: the smallest sum, a number or a scalar array.
      high: the largest sum, likewise. If an array `high` is less than `low`, the sum becomes `high`.
      normal: a, a float array that broadcasts to `w`; 1 by default, which makes aᵀw the sum.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`, whose sums are in range up to the rounding of its entries, and whose entries
      are clipped to the range of the dtype. Units whose sum is in range are unchanged bit for bit, and so are units
      whose a is 0. A NaN or infinite weight makes its unit NaN, unless an infinite sum is in range.

    Raises:
      TypeError: `w` or `normal` is not a float array, or `low` or `high` is not a number.
      ValueError: `low` or `high` is NaN, `low` is greater than `high`, or `normal` or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(bound_sum(jnp.array([[3.0, 0.25], [2.0, 0.5]]), high=1.0))
    [[1.   0.25]
     [0.   0.5 ]]

    References: Bauschke and Combettes, Convex Analysis and Monotone Operator Theory in Hilbert Spaces, 2011, examples
    29.18 and 29.20.
    """
    w = check_weight(w)
    check_scalar("low", low)
    check_scalar("high", high)
    check_order("low", low, "high", high)
    over = Reading.of(axes, w.shape).contracted
    x = w.astype(accumulation_dtype(w.dtype))
    a = jnp.ones((), x.dtype) if normal is None else check_weight(normal, "normal").astype(x.dtype)
    check_broadcast("normal", a.shape, w.shape)
    a = jnp.broadcast_to(a, w.shape)
    bottom, top = limit_of(low, x.dtype), limit_of(high, x.dtype)
    total = jnp.sum(a * x, over, keepdims=True)
    nearest = jnp.where(total > top, top, jnp.where(total < bottom, bottom, total))
    size = jnp.sum(jnp.square(a), over, keepdims=True)
    # The inner `where` avoids inf − inf in units that stay unchanged.
    kept = (nearest == total) | (size == 0)
    gap = jnp.where(kept, 0, nearest - total)
    most = float(jnp.finfo(w.dtype).max)
    return jnp.where(kept, x, jnp.clip(x + a * safe_divide(gap, size), -most, most)).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class BoundSum(Transform):
    """Projects each output unit's weights onto the slab low <= aᵀw <= high; `BoundSum(1.0, 1.0)` makes the sum 1.

    a is `normal`, numbers that broadcast to `w` as in `bound_sum`, such as (n_in, 1) for a dense kernel; 1 by default.
    It may be given as an array. The field holds nested tuples, so that specs can be compared and hashed.

    State: none, unless `low` or `high` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(BoundSum(1.0, 1.0).apply(jnp.array([3.0, 1.0]), {}))
    [ 1.5 -0.5]
    >>> print(BoundSum(high=0.0, normal=jnp.array([1.0, 0.0])).apply(jnp.array([3.0, 1.0]), {}))
    [0. 1.]
    """

    low: Scalar = -math.inf
    high: Scalar = math.inf
    axes: Axes | None = None
    normal: Any = dataclasses.field(default=None, kw_only=True)
    scheduled: ClassVar[frozenset[str]] = frozenset({"low", "high"})
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("low", self.low, schedule=True)
        check_scalar("high", self.high, schedule=True)
        check_order("low", self.low, "high", self.high)
        if self.normal is not None:
            object.__setattr__(self, "normal", _nested_tuples(_numbers(self.normal).tolist()))

    def apply(self, w, state):
        """`bound_sum(w, low, high, normal=normal)`."""
        w = check_weight(w)
        normal = None if self.normal is None else jnp.asarray(self.normal, accumulation_dtype(w.dtype))
        return bound_sum(w, self.value("low", state), self.value("high", state), normal=normal, axes=self.axes)


def _numbers(normal: Any) -> np.ndarray:
    """`normal` as an array of float64, or an error."""
    if isinstance(normal, Tracer):
        raise TypeError("normal must be known when the spec is made, got a traced array: use bound_sum")
    try:
        numbers = np.asarray(normal)
    except ValueError:  # rows of several lengths
        numbers = np.asarray(None)
    if not (jnp.issubdtype(numbers.dtype, jnp.floating) or jnp.issubdtype(numbers.dtype, jnp.integer)):
        raise TypeError(f"normal must be numbers, got {normal!r}: pass an array or nested tuples of one length")
    numbers = numbers.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError("normal must be finite, got NaN or infinity: look where it was computed")
    return numbers


def _nested_tuples(numbers: Any) -> Any:
    return tuple(map(_nested_tuples, numbers)) if isinstance(numbers, list) else numbers
