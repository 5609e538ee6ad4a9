"""Projections to the simplex, and to the L1 ball and sphere, without a sort."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.transform import Number, Scalar, Transform
from jaxweights.numerics.dtypes import accumulation_dtype


def project_simplex(w: jax.Array, total: Number = 1.0, *, axes: Axes | None = None) -> jax.Array:
    """The nearest non-negative weights that sum to `total`, for each output unit.

    w' = max(w − τ, 0), with τ such that Σw' = total, the sum over all that one output unit sums over.

    Args:
      w: float array of any shape.
      total: the sum >= 0, a number or a scalar array.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`: never negative, and its sums are `total` up to the rounding of its entries.
      τ is found by Newton's method, in a few sums over `w`, so that a sharded `w` stays where it is. A NaN weight
      makes its unit NaN, and +infinity becomes NaN. The gradient of the entries that do not become 0 is what comes
      to them less its mean, of the others 0.

    Raises:
      TypeError: `w` is not a float array, or `total` not a number.
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
    """The nearest weights with Σ|w'| <= radius, for each output unit: small ones become zero.

    w' = sign(w) · max(|w| − τ, 0), with τ = 0 where Σ|w| <= radius and such that Σ|w'| = radius elsewhere.

    Args:
      w: float array of any shape.
      radius: the greatest L1 norm >= 0, a number or a scalar array.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`, its L1 norms at most `radius` up to the rounding of its entries. Units
      within the ball are kept bit for bit. A NaN weight makes its unit NaN, and ±infinity becomes NaN.

    Raises:
      TypeError: `w` is not a float array, or `radius` not a number.
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
    """The nearest weights with Σ|w'| = radius, for each output unit: those within the ball grow.

    w' = sign(w) · max(|w| − τ, 0), with τ, negative where Σ|w| < radius, such that Σ|w'| = radius. A zero counts as
    positive. Arguments and errors as `project_l1_ball`.

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
    """The projection over the axes `over`, in float32 or wider."""
    x = w.astype(accumulation_dtype(w.dtype))
    if x.size == 0:
        return x
    total = jnp.asarray(total, x.dtype)
    sum_ = lambda y: jnp.sum(y, over, keepdims=True)
    # The projection is the same for x - max(x), which is at most 0 and exact near it, however large x is.
    top = jax.lax.stop_gradient(jnp.max(x, over, keepdims=True))
    x = x - top
    fixed, limit = jax.lax.stop_gradient(x), jax.lax.stop_gradient(total)

    def newton(state):
        """A step of Newton's method for Σmax(x − τ, 0) = total, which from below never passes the root."""
        tau, count, _ = state
        above = fixed > tau
        n = sum_(above.astype(x.dtype))
        new = (sum_(jnp.where(above, fixed, 0)) - limit) / jnp.maximum(n, 1)
        return jnp.maximum(tau, new), n, jnp.any(n != count)

    start = jnp.zeros_like(top) - limit
    tau, _, _ = jax.lax.while_loop(lambda state: state[2], newton, (start, jnp.zeros_like(start), jnp.array(True)))
    # The last step once more, for its derivatives.
    above = fixed > tau
    tau = (sum_(jnp.where(above, x, 0)) - total) / jnp.maximum(sum_(above.astype(x.dtype)), 1)
    return jnp.where(x <= tau, 0, x - tau)


@dataclasses.dataclass(frozen=True)
class Simplex(Transform):
    """The nearest non-negative weights that sum to `total` in each output unit. State: none, but for a schedule.

    >>> import jax.numpy as jnp
    >>> print(Simplex().apply(jnp.array([0.75, 0.5, -1.0]), {}))
    [0.625 0.375 0.   ]
    """

    total: Scalar = 1.0
    axes: Axes | None = None

    def __post_init__(self):
        check_scalar("total", self.total, 0, schedule=True)

    def apply(self, w, state):
        """`project_simplex(w, total)`."""
        return project_simplex(w, self.value("total", state), axes=self.axes)


@dataclasses.dataclass(frozen=True)
class L1Ball(Transform):
    """The nearest weights with Σ|w| <= `radius` in each output unit. State: none, but for a schedule.

    >>> import jax.numpy as jnp
    >>> print(L1Ball(1.0).apply(jnp.array([0.75, -0.5]), {}))
    [ 0.625 -0.375]
    """

    radius: Scalar
    axes: Axes | None = None

    def __post_init__(self):
        check_scalar("radius", self.radius, 0, schedule=True)

    def apply(self, w, state):
        """`project_l1_ball(w, radius)`."""
        return project_l1_ball(w, self.value("radius", state), axes=self.axes)


@dataclasses.dataclass(frozen=True)
class L1Sphere(Transform):
    """The nearest weights with Σ|w| = `radius` in each output unit. State: none, but for a schedule.

    >>> import jax.numpy as jnp
    >>> print(L1Sphere(1.0).apply(jnp.array([0.25, -0.5]), {}))
    [ 0.375 -0.625]
    """

    radius: Scalar
    axes: Axes | None = None

    def __post_init__(self):
        check_scalar("radius", self.radius, 0, schedule=True)

    def apply(self, w, state):
        """`project_l1_sphere(w, radius)`."""
        return project_l1_sphere(w, self.value("radius", state), axes=self.axes)
