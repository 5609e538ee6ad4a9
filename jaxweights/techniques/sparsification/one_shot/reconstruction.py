"""Least-squares reconstruction: the kept weights, adjusted to make up for the pruned ones."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_integer, check_weight
from jaxweights.core.second_moment import with_second_moment
from jaxweights.numerics.inverse_factor import inverse_factor
from jaxweights.numerics.norms import safe_divide


def reconstruct(
    w: jax.Array, mask: jax.Array, second_moment: jax.Array, *, axes: Axes | None = None, n_steps: int = 200
) -> jax.Array:
    """Adjusts the kept weights so that the outputs come as close as possible to those of the dense weight.

    argmin E‖(W' − W)ᵀx‖² over all W' that are 0 where `mask` is false: for each output unit, least squares on the
    inputs that it keeps. All units are solved at once by conjugate gradients, preconditioned by the inverse of the
    full second moment, so no matrix per unit is formed.

    Args:
      w: float array of any shape, the weight before pruning.
      mask: boolean array of the shape of `w`, true where a weight is kept.
      second_moment: E[xxᵀ] of the inputs, or a multiple of it, float array (*batch, [groups,] rows, rows), as in
        the `InputStats` that `capture` returns.
      axes: how `w` is read as a matrix, (..., in, out) by default. `InputStats` has it.
      n_steps: maximum number of steps. The search stops earlier once it is accurate to the rounding of float32.

    Returns:
      Array of the shape and dtype of `w`, 0 where `mask` is false. If inputs are linearly dependent, there are many
      minimizers, and the result is one near `w`. NaN or infinity in `w` or `second_moment` makes NaN.

    Raises:
      TypeError: `w` or `second_moment` is not a float array, `mask` is not a boolean array, or `n_steps` is not an
        integer.
      ValueError: a shape or `axes` does not fit, or `n_steps` is negative.

    >>> import jax.numpy as jnp
    >>> second_moment = jnp.array([[1.0, 0.5], [0.5, 1.0]])  # two inputs that are often alike
    >>> print(reconstruct(jnp.array([[1.0], [4.0]]), jnp.array([[False], [True]]), second_moment).ravel().round(4))
    [0.  4.5]

    References: Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952.
    """
    w = check_weight(w)
    check_integer("n_steps", n_steps, 0)
    if not jnp.issubdtype(getattr(mask, "dtype", type(mask)), jnp.bool_):
        raise TypeError(f"mask must be a boolean array, got {getattr(mask, 'dtype', type(mask))}: compare w with 0")
    if mask.shape != w.shape:
        raise ValueError(f"mask must have the shape {w.shape} of w, got {mask.shape}: pass the mask of this weight")
    solve = partial(_solve, n_steps=n_steps)
    return with_second_moment(solve, w, second_moment, jnp.asarray(mask), axes=axes).astype(w.dtype)


_TOLERANCE = 1e-5
"""A unit is done when its next correction, measured in the outputs, is this small relative to the first one."""


class _Search(NamedTuple):
    """The state of preconditioned conjugate gradients, one search per column."""

    step: int | jax.Array
    v: jax.Array
    residual: jax.Array
    direction: jax.Array
    decrement: jax.Array  # residualᵀ·M·residual, M the preconditioner


@partial(jax.jit, static_argnames="n_steps")
def _solve(w: jax.Array, h: jax.Array, mask: jax.Array, *, n_steps: int) -> jax.Array:
    """Conjugate gradients for H_SS·v_S = (H·w)_S, S the kept rows of each column, from v = w on S."""

    def matmul(a, b):
        return jnp.matmul(a, b, precision="highest")

    def dot(a, b):
        return jnp.sum(a * b, 0)

    def keep(m):
        return jnp.where(mask, m, 0)

    u = inverse_factor(h, 0.01)
    inverse = matmul(u.T, u)
    v = keep(w)
    residual = keep(matmul(h, w - v))
    direction = keep(matmul(inverse, residual))
    start = _Search(0, v, residual, direction, dot(residual, direction))

    def unfinished(s):
        return s.decrement > _TOLERANCE**2 * start.decrement

    def more(s):
        return (s.step < n_steps) & jnp.any(unfinished(s))

    def step(s):
        change = keep(matmul(h, s.direction))
        length = jnp.where(unfinished(s), safe_divide(s.decrement, dot(s.direction, change)), 0)[None]
        v, residual = s.v + length * s.direction, s.residual - length * change
        steepest = keep(matmul(inverse, residual))
        decrement = dot(residual, steepest)
        direction = steepest + safe_divide(decrement, s.decrement)[None] * s.direction
        return _Search(s.step + 1, v, residual, direction, decrement)

    return jax.lax.while_loop(more, step, start).v
