"""Weight normalization: the length of each output unit's weight vector, apart from its direction."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_scalar, check_state, check_weight
from jaxweights.core.transform import Transform
from jaxweights.numerics.norms import safe_divide, safe_norm


def weight_normalize(w: jax.Array, scale: jax.Array | None = None, *, axes: Axes | None = None) -> jax.Array:
    """Scales the weight vector of each output unit to length `scale`.

    w' = scale · w / ‖w‖₂, the norm over all that one output unit sums over (a 1-D `w` as a whole).

    Args:
      w: float array of any shape.
      scale: the lengths, shape (*batch, *output) of `w`, any float dtype; 1 by default.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`. Norms are taken in float32 or wider and do not overflow. A unit
      whose weights are all zero stays zero, with finite gradients; a NaN or infinite weight makes its unit NaN.

    Raises:
      TypeError: `w` is not a float array.
      ValueError: `axes` does not fit `w`, or `scale` has another shape.

    >>> import jax.numpy as jnp
    >>> print(weight_normalize(jnp.array([[3.0, 1.0], [4.0, 0.0]])))
    [[0.6 1. ]
     [0.8 0. ]]

    References: Salimans and Kingma, Weight Normalization: A Simple Reparameterization to Accelerate Training
    of Deep Neural Networks, arXiv:1602.07868, 2016.
    """
    w = check_weight(w)
    r = Reading.of(axes, w.shape)
    norm = safe_norm(w, r.contracted, keepdims=True)
    if scale is None:
        return safe_divide(w.astype(norm.dtype), norm).astype(w.dtype)
    # scale / norm first: a scale equal to the norm gives back w bit for bit.
    factor = safe_divide(check_units("scale", scale, w, r).astype(norm.dtype), norm)
    return (w.astype(norm.dtype) * factor).astype(w.dtype)


def check_units(name: str, value: jax.Array, w: jax.Array, r: Reading) -> jax.Array:
    """`value` with its axes in the places of those of `w`, or an error unless it has one entry per output unit."""
    value = check_weight(value, name)
    expected = tuple(s for a, s in enumerate(w.shape) if a not in r.contracted)
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, one per output unit of w {w.shape}, got {value.shape}")
    return jnp.expand_dims(value, r.contracted)


@dataclasses.dataclass(frozen=True)
class WeightNorm(Transform):
    """Weight normalization with a learned scale: w' = g · w / ‖w‖.

    State: `scale`, the learned g, shape (*batch, *output), float32 or wider. It starts at ‖w‖, so that
    wrapping a module leaves its function as it is, or at the number `scale` for every unit. With `axes.WHOLE` it is one
    number, the norm of the whole weight. `fold` of `jaxweights.linen` and `jaxweights.nnx` bakes it into an ordinary
    kernel.

    A unit whose weights are all zero has no direction. Neither they nor its scale get a gradient, so it never moves.
    For a layer that starts at zero, such as the last of a residual branch, draw the kernel at random as usual and start
    the scale at zero: `WeightNorm(scale=0.0)`. The first step moves the scale, the next ones the direction too.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    >>> WeightNorm().init(w, jax.random.key(0))
    {'scale': Array([5., 1.], dtype=float32)}

    References: Salimans and Kingma, arXiv:1602.07868, 2016.
    """

    axes: Axes | None = None
    scale: float | None = None
    learned: ClassVar[frozenset[str]] = frozenset({"scale"})
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        if self.scale is not None:
            check_scalar("scale", self.scale)

    def init(self, w, key):
        """The norms of `w`, or the initial scale of every unit."""
        w = check_weight(w)
        norm = safe_norm(w, Reading.of(self.axes, w.shape).contracted)
        return {"scale": norm if self.scale is None else jnp.full_like(norm, self.scale)}

    def apply(self, w, state):
        """`weight_normalize(w, scale)`."""
        check_state(state, scale=None)
        return weight_normalize(w, state["scale"], axes=self.axes)
