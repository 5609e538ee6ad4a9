"""Weight decay: a gradient term that pulls weights towards zero, or towards a given centre."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.transform import Number
from jaxweights.numerics.dtypes import accumulation_dtype

PenaltyGrad = Callable[[jax.Array], jax.Array]
"""The gradient of a penalty: weight -> array of its shape."""


def weight_decay(
    grad: jax.Array,
    w: jax.Array,
    rate: Number,
    *,
    penalty_grad: PenaltyGrad | None = None,
    toward: jax.Array | None = None,
    cautious: bool = False,
) -> jax.Array:
    """Adds the gradient of (rate/2)·‖w‖², or of another penalty, to a gradient.

    g' = g + rate·w, and w ← w − η·g' is stochastic gradient descent with weight decay. In general,
    g' = g + rate·∇P(w − w₀) for a penalty P and a centre w₀. Cautious decay leaves g unchanged where g and ∇P have
    opposite signs.

    Args:
      grad: float array, the gradient (or update, before the learning rate) of `w`.
      w: float array of the same shape.
      rate: the decay λ >= 0, a number or a scalar array.
      penalty_grad: ∇P, a function of an array. The identity by default, for L2; `jnp.sign` is L1,
        `lambda w: w + jnp.sign(w)` an elastic net, and `weight_normalize` a group lasso over output units.
      toward: the centre w₀, a float array of the same shape. 0 by default.
      cautious: whether to decay only the weights that the gradient does not move away from the centre.

    Returns:
      Array of the shape and dtype of `grad`, computed in float32 or wider. A NaN weight gives NaN.

    Raises:
      TypeError: `grad`, `w` or `toward` is not a float array, `rate` is not a number, or `penalty_grad` is not a
        function.
      ValueError: the shapes differ, or `rate` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> grad, w = jnp.array([1.0, 0.0, 1.0]), jnp.array([2.0, -4.0, -8.0])
    >>> print(weight_decay(grad, w, 0.25))
    [ 1.5 -1.  -1. ]
    >>> print(weight_decay(grad, w, 0.25, penalty_grad=jnp.sign, cautious=True))
    [ 1.25 -0.25  1.  ]

    References: Krogh and Hertz, A Simple Weight Decay Can Improve Generalization, NeurIPS 1991; Li, Grandvalet and
    Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks, arXiv:1802.01483, 2018; Chen
    et al., Cautious Weight Decay, arXiv:2510.12402, 2025.
    """
    grad, w = check_weight(grad, "grad"), check_weight(w)
    check_scalar("rate", rate, 0)
    check_penalty(penalty_grad)
    if grad.shape != w.shape:
        raise ValueError(f"grad has shape {grad.shape} and w {w.shape}: pass the gradient of this weight")
    dtype = max(accumulation_dtype(grad.dtype), accumulation_dtype(w.dtype), key=lambda d: d.itemsize)
    slope = w.astype(dtype)
    if toward is not None:
        toward = check_weight(toward, "toward")
        if toward.shape != w.shape:
            raise ValueError(f"toward has shape {toward.shape} and w {w.shape}: pass the centre of this weight")
        slope -= toward.astype(dtype)
    if penalty_grad is not None:
        slope = check_weight(penalty_grad(slope), "the value of penalty_grad").astype(dtype)
        if slope.shape != w.shape:
            raise ValueError(f"penalty_grad must return the shape of its argument, {w.shape}, got {slope.shape}")
    g = grad.astype(dtype)
    decayed = g + jnp.asarray(rate, dtype) * slope
    if cautious:  # compare signs: the product of two small numbers underflows
        decayed = jnp.where(jnp.sign(g) * jnp.sign(slope) < 0, g, decayed)
    return decayed.astype(grad.dtype)


def check_penalty(penalty_grad) -> None:
    """Raises unless `penalty_grad` is a function or None."""
    if penalty_grad is not None and not callable(penalty_grad):
        raise TypeError(f"penalty_grad must be a function of a weight, got {penalty_grad!r}: pass jnp.sign for L1")
