"""Repair: the weights that are kept, adjusted to make up for those that are not."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_integer, check_weight
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.sparsification.one_shot.second_moment import inverse_factor, with_second_moment


def reconstruct(
    w: jax.Array, mask: jax.Array, second_moment: jax.Array, *, axes: Axes | None = None, n_steps: int = 200
) -> jax.Array:
    """The masked weight whose outputs are closest to those of the whole one.

    argmin E‖(W' − W)ᵀx‖² over all W' that are 0 where `mask` is false: for each output unit least squares on the inputs
    that it keeps. By conjugate gradients on these inputs, for all units at once, preconditioned by the inverse of
    the whole second moment; so there is nothing larger than that, and no matrix per unit.

    Args:
      w: float array of any shape, the weight before pruning.
      mask: boolean array of the shape of `w`, true where a weight is kept.
      second_moment: E[xxᵀ] of the inputs, or a multiple of it, float array (*batch, [groups,] rows, rows), as in
        the `InputStats` that `capture` returns.
      axes: how `w` is read as a matrix, (..., in, out) by default. `InputStats` has it.
      n_steps: the most steps; it stops before when nothing more is to be had in float32.

    Returns:
      Array of the shape and dtype of `w`, 0 where `mask` is false. Where inputs determine each other, of many best
      weights one near `w`. NaN or infinity in `w` or `second_moment` makes NaN.

    Raises:
      TypeError: `w` or `second_moment` is not a float array, `mask` not a boolean one, or `n_steps` not an integer.
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
"""Of the correction, measured by the outputs: a unit whose next one is smaller is done. Rounding has the rest."""


@partial(jax.jit, static_argnames="n_steps")
def _solve(w: jax.Array, h: jax.Array, mask: jax.Array, *, n_steps: int) -> jax.Array:
    """Conjugate gradients for H_SS·v_S = (H·w)_S, S the kept rows of each column, from v = w on S."""
    kept = lambda m: jnp.where(mask, m, 0)
    times = lambda a, b: jnp.matmul(a, b, precision="highest")
    dot = lambda a, b: jnp.sum(a * b, 0)
    u = inverse_factor(h, 0.01)
    inverse = times(u.T, u)

    v = kept(w)
    residual = kept(times(h, w - v))
    steep = kept(times(inverse, residual))
    start = dot(residual, steep)
    going = lambda size: size > _TOLERANCE**2 * start

    def step(state):
        i, v, residual, direction, size = state
        change = kept(times(h, direction))
        length = jnp.where(going(size), safe_divide(size, dot(direction, change)), 0)
        v, residual = v + length * direction, residual - length * change
        steep = kept(times(inverse, residual))
        new = dot(residual, steep)
        return i + 1, v, residual, steep + safe_divide(new, size) * direction, new

    more = lambda state: (state[0] < n_steps) & jnp.any(going(state[-1]))
    return jax.lax.while_loop(more, step, (0, v, residual, steep, start))[1]
