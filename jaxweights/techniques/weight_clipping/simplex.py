"""Projections onto the probability simplex, the L1 ball and the L1 sphere, without a sort."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.transform import Number, Scalar, Transform
from jaxweights.numerics.dtypes import accumulation_dtype


def project_simplex(w: jax.Array, total: Number = 1.0, *, axes: Axes | None = None) -> jax.Array:
    """Makes each output unit's weights, a column of a kernel (in, out), non-negative with sum `total`.

    This is the projection onto the probability simplex: w' = max(w − τ, 0), where τ makes Σw' = total, the sum over all
    that one output unit sums over.

    Args:
      w: float array of any shape.
      total: the sum, >= 0, a number or a scalar array.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`, never negative, whose sums are `total` up to the rounding of its entries.
      Newton's method finds τ in a few sums over `w`, so a sharded `w` need not be gathered. A NaN weight makes its unit
      NaN, and +infinity becomes NaN. The gradient is that of the output less its mean at the positive entries, and 0 at
      the others.

    Raises:
      TypeError: `w` is not a float array, or `total` is not a number.
      ValueError: `total` is negative or NaN, or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(project_simplex(jnp.array([0.75, 0.5, -1.0])))
    [0.625 0.375 0.   ]

    References: Duchi et al., Efficient Projections onto the l1-Ball for Learning in High Dimensions, ICML 2008;
    Condat, Fast Projection onto the Simplex and the l1 Ball, Mathematical Programming 158, 2016.
    """
    w = check_weight(w)
    check_scalar("total", total, 0)
    return _simplex(w, total, Reading.of(axes, w.shape).contracted).astype(w.dtype)


def project_l1_ball(w: jax.Array, radius: Number, *, axes: Axes | None = None) -> jax.Array:
    """Projects each output unit's weights onto the L1 ball Σ|w'| <= radius, which sets small ones to zero.

    w' = sign(w) · max(|w| − τ, 0), where τ = 0 if Σ|w| <= radius, and otherwise makes Σ|w'| = radius.

    Args:
      w: float array of any shape.
      radius: the largest L1 norm, >= 0, a number or a scalar array.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`, whose L1 norms are at most `radius` up to the rounding of its entries. Units
      inside the ball are unchanged bit for bit. A NaN weight makes its unit NaN, and ±infinity becomes NaN.

    Raises:
      TypeError: `w` is not a float array, or `radius` is not a number.
      ValueError: `radius` is negative or NaN, or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(project_l1_ball(jnp.array([[0.75, 0.5], [-0.5, 0.25]]), 1.0))
    [[ 0.625  0.5  ]
     [-0.375  0.25 ]]

    References: Duchi et al., ICML 2008; Condat, Mathematical Programming 158, 2016.
    """
    w = check_weight(w)
    check_scalar("radius", radius, 0)
    over = Reading.of(axes, w.shape).contracted
    x = w.astype(accumulation_dtype(w.dtype))
    outside = ~(jnp.sum(jnp.abs(x), over, keepdims=True) <= jnp.asarray(radius, x.dtype))
    return jnp.where(outside, jnp.sign(x) * _simplex(jnp.abs(x), radius, over), x).astype(w.dtype)


def project_l1_sphere(w: jax.Array, radius: Number, *, axes: Axes | None = None) -> jax.Array:
    """Projects each output unit's weights onto the L1 sphere Σ|w'| = radius: units inside the ball grow.

    w' = sign(w) · max(|w| − τ, 0), where τ makes Σ|w'| = radius; τ is negative if Σ|w| < radius. A zero counts as
    positive. Arguments and errors as in `project_l1_ball`.

    >>> import jax.numpy as jnp
    >>> print(project_l1_sphere(jnp.array([[0.75, 0.5], [-0.5, 0.25]]), 1.0))
    [[ 0.625  0.625]
     [-0.375  0.375]]

    References: Duchi et al., ICML 2008.
    """
    w = check_weight(w)
    check_scalar("radius", radius, 0)
    over = Reading.of(axes, w.shape).contracted
    x = w.astype(accumulation_dtype(w.dtype))
    return (jnp.where(x < 0, -1, 1) * _simplex(jnp.abs(x), radius, over)).astype(w.dtype)


def _simplex(w: jax.Array, total: Number, over: tuple[int, ...]) -> jax.Array:
    """Projects `w` onto the simplex over the axes `over`, in float32 or wider."""
    x = w.astype(accumulation_dtype(w.dtype))
    if x.size == 0:
        return x
    total = jnp.asarray(total, x.dtype)

    def sum_units(y):
        return jnp.sum(y, over, keepdims=True)

    # x − max(x) has the same projection. It is at most 0, and precise near 0 however large x is.
    top = jax.lax.stop_gradient(jnp.max(x, over, keepdims=True))
    x = x - top
    fixed, limit = jax.lax.stop_gradient(x), jax.lax.stop_gradient(total)

    def newton(state):
        """A Newton step for Σmax(x − τ, 0) = total, which never overshoots the root from below."""
        tau, count, _ = state
        above = fixed > tau
        n = sum_units(above.astype(x.dtype))
        new = (sum_units(jnp.where(above, fixed, 0)) - limit) / jnp.maximum(n, 1)
        return jnp.maximum(tau, new), n, jnp.any(n != count)

    def has_changed(state):
        _, _, changed = state
        return changed

    start = jnp.zeros_like(top) - limit
    tau, _, _ = jax.lax.while_loop(has_changed, newton, (start, jnp.zeros_like(start), jnp.array(True)))
    # Repeat the last step with gradients.
    above = fixed > tau
    tau = (sum_units(jnp.where(above, x, 0)) - total) / jnp.maximum(sum_units(above.astype(x.dtype)), 1)
    return jnp.where(x <= tau, 0, x - tau)


@dataclasses.dataclass(frozen=True)
class Simplex(Transform):
    """Makes each output unit's weights, a column of a kernel (in, out), non-negative with sum `total`.

    This is the projection onto the probability simplex. For rows that sum to 1, give `axes=Axes(input=-1, output=-2)`.

    State: none, unless `total` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(Simplex().apply(jnp.array([0.75, 0.5, -1.0]), {}))
    [0.625 0.375 0.   ]
    """

    total: Scalar = 1.0
    axes: Axes | None = None
    scheduled: ClassVar[frozenset[str]] = frozenset({"total"})
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("total", self.total, 0, schedule=True)

    def apply(self, w, state):
        """`project_simplex(w, total)`."""
        return project_simplex(w, self.value("total", state), axes=self.axes)


@dataclasses.dataclass(frozen=True)
class L1Ball(Transform):
    """Projects each output unit's weights onto the L1 ball Σ|w| <= radius.

    State: none, unless `radius` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(L1Ball(1.0).apply(jnp.array([0.75, -0.5]), {}))
    [ 0.625 -0.375]
    """

    radius: Scalar
    axes: Axes | None = None
    scheduled: ClassVar[frozenset[str]] = frozenset({"radius"})
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("radius", self.radius, 0, schedule=True)

    def apply(self, w, state):
        """`project_l1_ball(w, radius)`."""
        return project_l1_ball(w, self.value("radius", state), axes=self.axes)


@dataclasses.dataclass(frozen=True)
class L1Sphere(Transform):
    """Projects each output unit's weights onto the L1 sphere Σ|w| = radius.

    State: none, unless `radius` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(L1Sphere(1.0).apply(jnp.array([0.25, -0.5]), {}))
    [ 0.375 -0.625]
    """

    radius: Scalar
    axes: Axes | None = None
    scheduled: ClassVar[frozenset[str]] = frozenset({"radius"})
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("radius", self.radius, 0, schedule=True)

    def apply(self, w, state):
        """`project_l1_sphere(w, radius)`."""
        return project_l1_sphere(w, self.value("radius", state), axes=self.axes)
